// Multi-scale deformable attention on the CPU, forward.
//
// Each (batch, query) is one piece of work. Its heads' points are sampled one after the other; the
// channels of a corner are adjacent in memory and are added up side by side, in SIMD registers.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "deformable_detr/cpu/levels.h"
#include "deformable_detr/cpu/simd.h"

namespace ms_deform_attn::cpu {
namespace {

// ------------------------------------------------------------------------------------------ kernel

// Rows [begin, end) of batch * queries.
template <typename scalar_t>
inline __attribute__((always_inline)) void forward_rows(const Params& p, const Level* levels,
                                                        int64_t begin, int64_t end) {
  using acc = acc_t<scalar_t>;
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  std::vector<acc> sums(p.channels);
  acc* __restrict__ sum = sums.data();

  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / p.queries;
    for (int32_t head = 0; head < p.heads; ++head) {
      const scalar_t* value = static_cast<const scalar_t*>(p.value) +
                              batch * p.spatial_size * pixel_stride + int64_t(head) * p.channels;
      std::fill_n(sum, p.channels, acc(0));
      const auto add_point = [&](int64_t, acc weight, const Corners<acc>& corners, const Level&) {
        for (int corner = 0; corner < 4; ++corner) {
          if (corners.pixel[corner] == kOutside) continue;
          const acc share = weight * corners.share(corner);
          const scalar_t* __restrict__ pixel = value + corners.pixel[corner] * pixel_stride;
          for (int32_t channel = 0; channel < p.channels; ++channel) {
            sum[channel] += share * static_cast<acc>(pixel[channel]);
          }
        }
      };
      for_each_point<scalar_t>(p, levels, row * p.heads + head, add_point);
      scalar_t* output = static_cast<scalar_t*>(p.output) + (row * p.heads + head) * p.channels;
      for (int32_t channel = 0; channel < p.channels; ++channel) {
        output[channel] = static_cast<scalar_t>(sum[channel]);
      }
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

void forward(const Params& params) {
  const std::vector<Level> levels = read_levels(params);
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rows = [&](int64_t begin, int64_t end) {
      forward_rows<scalar_t>(params, levels.data(), begin, end);
    };
    torch::stable::parallel_for(
        0, params.batch * params.queries, 1,
        [&](int64_t begin, int64_t end) { run_vectorised(rows, begin, end); });
  });
}

}  // namespace ms_deform_attn::cpu
