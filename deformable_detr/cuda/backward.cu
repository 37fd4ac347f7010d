// Multi-scale deformable attention on the GPU, backward. launch.cuh tells how teams share the work.
//
// Per point, the dot products of grad_output with value at the four corners give the gradients of
// its weight and location; grad_output times weight and share is added to grad_value at the corners.
#include "deformable_detr/cuda/launch.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

template <typename acc>
struct alignas(4 * sizeof(acc)) PerCorner {
  acc corner[4];
};

// Adds up four numbers over a team. Halves are exchanged instead of copied where possible: lane l
// ends up with the total of number l % 4 (of a team of two: of l and l + 2; of one: of all).
template <int kLanes, typename acc>
__device__ __forceinline__ void reduce_corners(acc (&x)[4], int lane) {
  if constexpr (kLanes >= 2) {
    const bool odd = lane & 1;
    const acc keep0 = odd ? x[1] : x[0], give0 = odd ? x[0] : x[1];
    const acc keep2 = odd ? x[3] : x[2], give2 = odd ? x[2] : x[3];
    x[0] = keep0 + __shfl_xor_sync(0xffffffff, give0, 1);
    x[1] = keep2 + __shfl_xor_sync(0xffffffff, give2, 1);
  }
  if constexpr (kLanes >= 4) {
    const bool upper = lane & 2;
    const acc keep = upper ? x[1] : x[0], give = upper ? x[0] : x[1];
    x[0] = keep + __shfl_xor_sync(0xffffffff, give, 2);
  }
#pragma unroll
  for (int offset = 4; offset < kLanes; offset *= 2) {
    x[0] += __shfl_xor_sync(0xffffffff, x[0], offset);
  }
}

template <typename scalar_t, int kVec, int kLanes>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ BackwardParams p,
                    const __grid_constant__ Tiling tiling) {
  using acc = acc_t<scalar_t>;
  extern __shared__ TiledLevel table[];
  __shared__ int4 pixels[kThreads];
  __shared__ PerCorner<acc> shares[kThreads];
  __shared__ PerCorner<acc> dots[kThreads];

  const int lane = threadIdx.x % kLanes;
  const int first_slot = threadIdx.x - lane;
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  const int32_t all_points = p.levels * p.points;

  const Levels levels = load_levels(p, tiling, table);
  const int64_t tiles = levels.tiles * tiling.head_groups * p.batch;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Work work = tile_work(p, tiling, levels, tile, threadIdx.x / kLanes);
    const bool active = work.query >= 0;
    const int64_t row = active ? work.row(p) : 0;
    const int64_t origin =
        work.batch * p.spatial_size * pixel_stride + int64_t(work.head) * p.channels;
    const scalar_t* value = static_cast<const scalar_t*>(p.value) + origin;
    acc* grad_value = static_cast<acc*>(p.grad_value) + origin;
    const scalar_t* grad_output = static_cast<const scalar_t*>(p.grad_output) + row * p.channels;

    for (int32_t first = 0; first < all_points; first += kLanes) {
      // Each lane works out one point.
      const int32_t point = first + lane;
      const int64_t index = row * all_points + point;
      const bool has_point = active && point < all_points;
      Corners<acc> corners;
      acc weight = 0;
      if (has_point) {
        const auto location = load_location<scalar_t>(p, index);
        weight = load_weight<scalar_t>(p, index);
        corners = Corners<acc>(location.x, location.y, levels.level[point / p.points]);
      }
      __syncwarp();
      pixels[threadIdx.x] =
          make_int4(corners.pixel[0], corners.pixel[1], corners.pixel[2], corners.pixel[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shares[threadIdx.x].corner[i] = weight * corners.share(i);
        dots[threadIdx.x].corner[i] = 0;
      }
      __syncwarp();

      // The team walks over the channels, and for each part of them over the points.
      for (int32_t part = 0; part < p.channels; part += kLanes * kVec) {
        const int32_t channel = part + lane * kVec;
        const bool has_channel = active && channel < p.channels;
        acc grad[kVec] = {};
        if (has_channel) {
          const auto stored = Vec<scalar_t, kVec>::load(grad_output + channel);
#pragma unroll
          for (int k = 0; k < kVec; ++k) grad[k] = to_acc(stored.data[k]);
        }
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          if (first + i >= all_points) break;
          const int4 pixel = pixels[first_slot + i];
          const PerCorner<acc> share = shares[first_slot + i];
          const int32_t pixel_of[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
          Vec<scalar_t, kVec> corner[4] = {};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (has_channel && pixel_of[j] != kOutside) {
              corner[j] = Vec<scalar_t, kVec>::load(value + pixel_of[j] * pixel_stride + channel);
            }
          }
          acc dot[4] = {};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            acc add[kVec];
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
              dot[j] += grad[k] * to_acc(corner[j].data[k]);
              add[k] = grad[k] * share.corner[j];
            }
            if (has_channel && pixel_of[j] != kOutside) {
              atomic_add<kVec>(grad_value + pixel_of[j] * pixel_stride + channel, add);
            }
          }
          reduce_corners<kLanes>(dot, lane);
#pragma unroll
          for (int j = 0; j < 4; j += kLanes) {
            if (lane + j < 4) dots[first_slot + i].corner[lane + j] += dot[j / kLanes];
          }
        }
      }

      // Each lane finishes its point.
      __syncwarp();
      if (has_point) {
        const PerCorner<acc> dot = dots[threadIdx.x];
        const Level& level = levels.level[point / p.points];
        store_weight<scalar_t>(p, index, corners.sample(dot.corner));
        store_location<scalar_t>(p, index,
                                 {weight * corners.d_location_x(dot.corner, level),
                                  weight * corners.d_location_y(dot.corner, level)});
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename scalar_t, int kVec, int kLanes>
const char* launch_backward(const BackwardParams& p, void* stream) {
  const Tiling tiling =
      make_tiling(p, kThreads / kLanes, int64_t(p.channels) * sizeof(acc_t<scalar_t>));
  return launch(backward_kernel<scalar_t, kVec, kLanes>, p, tiling, stream);
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

const char* backward(const BackwardParams& params, void* stream) {
  const char* error = nullptr;
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    // A lane's channels fill 16 bytes of grad_value, so that a team's additions are contiguous.
    constexpr int kVec = 16 / sizeof(acc_t<scalar_t>);
    if (params.channels % kVec != 0) {
      error = launch_backward<scalar_t, 1, 32>(params, stream);
      return;
    }
    error = with_lanes<2>(params.channels / kVec, [&](auto lanes) {
      return launch_backward<scalar_t, kVec, lanes.value>(params, stream);
    });
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
