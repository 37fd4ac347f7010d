// Multi-scale deformable attention on the GPU, backward. launch.cuh tells how teams share the work.
//
// Per point, the dot products of grad_output with value at the four corners give the gradients of
// its weight and location; grad_output times weight and share is added to grad_value at the
// corners.
#include "deformable_detr/cuda/launch.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

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
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, 1>;
  using Row = Vec<scalar_t, kVec>;
  extern __shared__ Level levels[];
  __shared__ int4 pixels[Layout::kSlots];
  __shared__ PerCorner<acc> shares[Layout::kSlots];  // of each corner, times the point's weight
  __shared__ PerCorner<acc> dots[Layout::kSlots];    // of grad_output with value at each corner

  load_levels(p, levels);
  const Work work = find_work<Layout>(p);
  const int lane = threadIdx.x % kLanes;
  const int first_slot = Layout::first_slot();
  const int own_slot = first_slot + lane * Layout::kPitch;
  const int32_t all_points = p.points;
  const int32_t pixel_bytes = p.heads * p.channels * static_cast<int32_t>(sizeof(scalar_t));
  const int32_t grad_pixel_bytes = p.heads * p.channels * static_cast<int32_t>(sizeof(acc));
  const int64_t origin = (work.batch * p.spatial_size * p.heads + work.head) * p.channels;

  PointCursor cursor(p, lane);
  int64_t point = work.row * all_points + lane;
  for (int32_t first = 0; first < all_points; first += kLanes) {
    // Each lane works out one point.
    const bool has_point = work.active && first + lane < all_points;
    Corners<acc> corners;
    acc weight = 0;
    if (has_point) {
      const auto location = load_location<scalar_t>(p, point);
      weight = load_weight<scalar_t>(p, point);
      corners = Corners<acc>(location.x, location.y, levels[cursor.level]);
    }
    PerCorner<acc> share;
#pragma unroll
    for (int j = 0; j < 4; ++j) share.corner[j] = weight * corners.share(j);
    __syncwarp();
    pixels[own_slot] =
        make_int4(corners.pixel[0], corners.pixel[1], corners.pixel[2], corners.pixel[3]);
    shares[own_slot] = share;
    dots[own_slot] = {};
    __syncwarp();

    // The team walks over the channels, and for each part of them over the points.
    for (int32_t part = 0; part < p.channels; part += kLanes * kVec) {
      const int32_t channel = part + lane * kVec;
      const bool has_channel = work.active && channel < p.channels;
      const scalar_t* value = static_cast<const scalar_t*>(p.value) + origin + channel;
      acc* grad_value = static_cast<acc*>(p.grad_value) + origin + channel;
      acc grad[kVec] = {};
      if (has_channel) {
        Row::load(static_cast<const scalar_t*>(p.grad_output) + work.row * p.channels + channel)
            .unpack(grad);
      }
      Row corner[4];  // outside: not loaded, and the dot product not used
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (i % 4 == 0 && first + i >= all_points) break;
        const int4 pixel = pixels[first_slot + i * Layout::kPitch];
        const PerCorner<acc> of = shares[first_slot + i * Layout::kPitch];
        const int32_t pixel_of[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const scalar_t* row = corner_row(value, pixel_of[j], pixel_bytes);
          if (pixel_of[j] != kOutside && has_channel) corner[j] = Row::load(row);
        }
        acc dot[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc x[kVec], add[kVec];
          corner[j].unpack(x);
#pragma unroll
          for (int c = 0; c < kVec; ++c) {
            dot[j] += grad[c] * x[c];
            add[c] = grad[c] * of.corner[j];
          }
          acc* row = corner_row(grad_value, pixel_of[j], grad_pixel_bytes);
          if (pixel_of[j] != kOutside && has_channel) atomic_add<kVec>(row, add);
        }
        reduce_corners<kLanes>(dot, lane);
#pragma unroll
        for (int j = 0; j < 4; j += kLanes) {
          if (lane + j < 4)
            dots[first_slot + i * Layout::kPitch].corner[lane + j] += dot[j / kLanes];
        }
      }
    }

    // Each lane finishes its point.
    __syncwarp();
    if (has_point) {
      PerCorner<acc> dot = dots[own_slot];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (corners.pixel[j] == kOutside) dot.corner[j] = 0;
      }
      const Level& level = levels[cursor.level];
      store_weight<scalar_t>(p, point, corners.sample(dot.corner));
      store_location<scalar_t>(p, point,
                               {weight * corners.d_location_x(dot.corner, level),
                                weight * corners.d_location_y(dot.corner, level)});
    }
    point += kLanes;
    cursor.advance(p, kLanes);
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename scalar_t, int kVec, int kLanes>
const char* launch_backward(const BackwardParams& p, void* stream) {
  return launch<Layout<kLanes, 1>>(backward_kernel<scalar_t, kVec, kLanes>, p, stream);
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
