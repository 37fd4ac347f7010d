// Multi-scale deformable attention on the CPU, backward.
//
// Each (batch, head) is one piece of work and owns its slice of every gradient, so that nothing is
// shared, and sums come out the same for any number of threads. Per point, the four corners' dot
// products with grad_output give the gradients of its weight and its location; grad_output times
// weight and share is added to the corners' grad_value.
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "deformable_detr/cpu/levels.h"
#include "deformable_detr/cpu/simd.h"

namespace ms_deform_attn::cpu {
namespace {

// ------------------------------------------------------------------------------------------ kernel

// In a fixed order of sixteen partial sums, which the compiler keeps in SIMD registers.
template <typename scalar_t>
inline __attribute__((always_inline)) acc_t<scalar_t> dot_product(
    const acc_t<scalar_t>* __restrict__ a, const scalar_t* __restrict__ b, int32_t channels) {
  using acc = acc_t<scalar_t>;
  constexpr int32_t kWidth = 16;
  acc partial[kWidth] = {};
  int32_t channel = 0;
  for (; channel + kWidth <= channels; channel += kWidth) {
    for (int32_t k = 0; k < kWidth; ++k) {
      partial[k] += a[channel + k] * static_cast<acc>(b[channel + k]);
    }
  }
  acc sum = 0;
  for (; channel < channels; ++channel) sum += a[channel] * static_cast<acc>(b[channel]);
  for (int32_t k = 0; k < kWidth; ++k) sum += partial[k];
  return sum;
}

// Slices [begin, end) of batch * heads.
template <typename scalar_t>
inline __attribute__((always_inline)) void backward_slices(const BackwardParams& p,
                                                           const Level* levels, int64_t begin,
                                                           int64_t end) {
  using acc = acc_t<scalar_t>;
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  std::vector<acc> grads(p.channels);
  acc* __restrict__ grad = grads.data();

  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t batch = slice / p.heads, head = slice % p.heads;
    const int64_t origin = batch * p.spatial_size * pixel_stride + head * p.channels;
    const scalar_t* value = static_cast<const scalar_t*>(p.value) + origin;
    acc* grad_value = static_cast<acc*>(p.grad_value) + origin;

    for (int64_t query = 0; query < p.queries; ++query) {
      const int64_t row = (batch * p.queries + query) * p.heads + head;
      const scalar_t* grad_output = static_cast<const scalar_t*>(p.grad_output) + row * p.channels;
      for (int32_t channel = 0; channel < p.channels; ++channel) {
        grad[channel] = static_cast<acc>(grad_output[channel]);
      }
      const auto differentiate_point = [&](int64_t point, acc weight, const Corners<acc>& corners,
                                           const Level& level) {
        acc dot[4] = {0, 0, 0, 0};
        for (int corner = 0; corner < 4; ++corner) {
          if (corners.pixel[corner] == kOutside) continue;
          const acc share = weight * corners.share(corner);
          const int64_t offset = corners.pixel[corner] * pixel_stride;
          acc* __restrict__ grad_pixel = grad_value + offset;
          dot[corner] = dot_product<scalar_t>(grad, value + offset, p.channels);
          for (int32_t channel = 0; channel < p.channels; ++channel) {
            grad_pixel[channel] += share * grad[channel];
          }
        }
        store_operand<scalar_t>(p.grad_attention_weights, p.weights_dtype, point,
                                corners.sample(dot));
        store_operand<scalar_t>(p.grad_sampling_locations, p.locations_dtype, 2 * point,
                                weight * corners.d_location_x(dot, level));
        store_operand<scalar_t>(p.grad_sampling_locations, p.locations_dtype, 2 * point + 1,
                                weight * corners.d_location_y(dot, level));
      };
      for_each_point<scalar_t>(p, levels, row, differentiate_point);
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

void backward(const BackwardParams& params) {
  const std::vector<Level> levels = read_levels(params);
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto slices = [&](int64_t begin, int64_t end) {
      backward_slices<scalar_t>(params, levels.data(), begin, end);
    };
    torch::stable::parallel_for(0, params.batch * params.heads, 1, [&](int64_t begin, int64_t end) {
      run_vectorised(slices, begin, end);
    });
  });
}

}  // namespace ms_deform_attn::cpu
