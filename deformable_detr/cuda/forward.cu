// Multi-scale deformable attention on the GPU, forward: output = sum over points of
// weight * (bilinear sample of value). launch.cuh tells how teams of lanes share the work.
#include "deformable_detr/cuda/launch.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

// kSplit groups of kLanes lanes share a (batch, query, head): each adds up every kSplit-th point.
template <typename scalar_t, int kVec, int kLanes, int kSplit>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(const __grid_constant__ Params p) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, kSplit>;
  using Row = Vec<scalar_t, kVec>;
  extern __shared__ Level levels[];
  __shared__ int4 pixels[Layout::kSlots];
  __shared__ PerCorner<acc> shares[Layout::kSlots];  // of each corner, times the point's weight

  load_levels(p, levels);
  const Work work = find_work<Layout>(p);
  const int lane = threadIdx.x % Layout::kTeam;
  const int split = lane / kLanes;
  const int first_slot = Layout::first_slot();
  const int32_t all_points = p.points;
  const int32_t pixel_bytes = p.heads * p.channels * static_cast<int32_t>(sizeof(scalar_t));
  const scalar_t* value = static_cast<const scalar_t*>(p.value) +
                          (work.batch * p.spatial_size * p.heads + work.head) * p.channels;

  for (int32_t part = 0; part < p.channels; part += kLanes * kVec) {
    const int32_t channel = part + lane % kLanes * kVec;
    const bool has_channel = channel < p.channels;
    const scalar_t* value_part = value + channel;
    acc sum[kVec] = {};
    // A corner outside is not loaded: its share is zero, and what is left in its place is an
    // earlier corner of this row, or zero.
    Row corner[4];

    PointCursor cursor(p, lane);
    int64_t point = work.row * all_points + lane;
    for (int32_t first = 0; first < all_points; first += Layout::kTeam) {
      // Each lane works out one point.
      Corners<acc> corners;
      PerCorner<acc> share = {};
      if (work.active && first + lane < all_points) {
        const auto location = load_location<scalar_t>(p, point);
        const acc weight = load_weight<scalar_t>(p, point);
        corners = Corners<acc>(location.x, location.y, levels[cursor.level]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (corners.pixel[j] != kOutside) share.corner[j] = weight * corners.share(j);
        }
      }
      point += Layout::kTeam;
      cursor.advance(p, Layout::kTeam);
      __syncwarp();
      pixels[first_slot + lane * Layout::kPitch] =
          make_int4(corners.pixel[0], corners.pixel[1], corners.pixel[2], corners.pixel[3]);
      shares[first_slot + lane * Layout::kPitch] = share;
      __syncwarp();

      // Each group adds up its points.
      const int group_slot = first_slot + split * Layout::kPitch;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (i % 4 == 0 && first + i * kSplit >= all_points) break;
        const int4 pixel = pixels[group_slot + i * kSplit * Layout::kPitch];
        const PerCorner<acc> of = shares[group_slot + i * kSplit * Layout::kPitch];
        const int32_t pixel_of[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const scalar_t* row = corner_row(value_part, pixel_of[j], pixel_bytes);
          if (pixel_of[j] != kOutside && has_channel) corner[j] = Row::load(row);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc x[kVec];
          corner[j].unpack(x);
#pragma unroll
          for (int c = 0; c < kVec; ++c) sum[c] += of.corner[j] * x[c];
        }
      }
    }

#pragma unroll
    for (int offset = kLanes; offset < Layout::kTeam; offset *= 2) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[c] += __shfl_xor_sync(0xffffffff, sum[c], offset);
    }
    if (work.active && has_channel && split == 0) {
      Row::pack(sum).store(static_cast<scalar_t*>(p.output) + work.row * p.channels + channel);
    }
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename scalar_t, int kVec, int kLanes, int kSplit>
const char* launch_forward(const Params& p, void* stream) {
  return launch<Layout<kLanes, kSplit>>(forward_kernel<scalar_t, kVec, kLanes, kSplit>, p, stream);
}

// Below this many rows a GPU has lanes to spare: the points of each are spread over four groups of
// lanes, where those are small.
constexpr int64_t kFewRows = 16384;

}  // namespace

// ------------------------------------------------------------------------------------------- entry

const char* forward(const Params& params, void* stream) {
  const char* error = nullptr;
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    if (params.channels % kVec != 0) {
      error = launch_forward<scalar_t, 1, 32, 1>(params, stream);
      return;
    }
    error = with_lanes<2>(params.channels / kVec, [&](auto lanes) {
      if constexpr (lanes.value <= 4) {
        if (params.batch * params.queries * params.heads <= kFewRows) {
          return launch_forward<scalar_t, kVec, lanes.value, 4>(params, stream);
        }
      }
      return launch_forward<scalar_t, kVec, lanes.value, 1>(params, stream);
    });
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
