// Multi-scale deformable attention on the GPU, forward: output = sum over points of
// weight * (bilinear sample of value). launch.cuh tells how teams of lanes share the work.
#include "deformable_detr/cuda/launch.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

// What the lanes of a team tell each other of a point.
template <typename acc>
struct alignas(16) Slot {
  int32_t offset[4];  // of each corner in value, negative where it is outside
  acc share[4];       // of each corner, times the point's weight
};

// kSplit groups of kLanes lanes share a (batch, query, head): each adds up every kSplit-th point.
template <typename scalar_t, bool kMixed, int kVec, int kLanes, int kSplit, int kAhead>
__global__ void __launch_bounds__(kThreads, kAhead == 1 ? 4 : kAhead == 2 ? 3 : 2)
    forward_kernel(const __grid_constant__ Params p, int tiles) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, kSplit>;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  extern __shared__ Level levels[];
  constexpr int kShares = Layout::kSlots;
  __shared__ int4 slots[Layout::kSlots * (1 + sizeof(acc) / 4)];

  const int lane = threadIdx.x % Layout::kTeam;
  const int split = lane / kLanes;
  const int32_t all_points = p.points;
  const int first_slot = Layout::first_slot();
  int4* own_slot = slots + first_slot + lane * Layout::kPitch;
  const int4* group_slots = slots + first_slot + split * Layout::kPitch;

  LevelLoader level_loader;
  level_loader.load(p);
  Work work = find_work<Layout>(p, int64_t(blockIdx.x) * tiles);
  PointReader<scalar_t, kMixed> next;
  const auto read_next = [&](int32_t first) {
    next.read(p, first + lane < work.points);
    next.skip(p, Layout::kTeam);
  };
  const bool use_strips = sizeof(scalar_t) > 2 && queries_are_pixels(p);
  if (!use_strips) {
    next.start(p, work.row, lane);
    read_next(0);
  }
  level_loader.store(p, levels);
  for (int tile = 0; tile < tiles; ++tile) {
  if (tile > 0) work = find_work<Layout>(p, int64_t(blockIdx.x) * tiles + tile);
  if (use_strips) follow_strips<kForwardStrip>(p, levels, work);
  if (tile > 0 || use_strips) {
    next.start(p, work.row, lane);
    read_next(0);
  }
  const scalar_t* value = static_cast<const scalar_t*>(p.value) +
                          (work.batch * p.spatial_size * p.heads + work.head) * p.channels;

  for (int32_t part = 0; part < p.channels; part += kLanes * kVec) {
    const int32_t channel = part + lane % kLanes * kVec;
    const bool has_channel = channel < p.channels;
    const scalar_t* value_part = value + channel;
    acc sum[kVec] = {};
    // A corner outside is not loaded: its share is zero, and what is left in its place is an
    // earlier corner of this row, or zero.
    Row corner[kAhead][4];

    if (part > 0) {
      next.start(p, work.row, lane);
      read_next(0);
    }
    PointCursor cursor(p, lane);
    for (int32_t first = 0; first < all_points; first += Layout::kTeam) {
      // Each lane works out one point.
      Corners<acc> corners;
      if (first + lane < work.points) {
        const auto location = next.location(p);
        corners = Corners<acc>(location.x, location.y, levels[cursor.level]);
      }
      const acc weight = next.weight(p);
      corners.row_share[0] *= weight;
      corners.row_share[1] *= weight;
      read_next(first + Layout::kTeam);
      cursor.advance(p, Layout::kTeam);
      __syncwarp();
      *own_slot = make_int4(Rows::offset(p, corners.pixel[0]), Rows::offset(p, corners.pixel[1]), Rows::offset(p, corners.pixel[2]), Rows::offset(p, corners.pixel[3]));
      *reinterpret_cast<float4*>(own_slot + kShares) = make_float4(corners.share(0), corners.share(1), corners.share(2), corners.share(3));
      __syncwarp();

      // Each group adds up its points, some at a time.
#pragma unroll
      for (int i = 0; i < kLanes; i += kAhead) {
        if ((kAhead > 1 || i % 4 == 0) && first + i * kSplit >= all_points) break;
        Slot<acc> slot[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int4 o = group_slots[(i + k) * kSplit * Layout::kPitch];
          const float4 f = *reinterpret_cast<const float4*>(group_slots + (i + k) * kSplit * Layout::kPitch + kShares);
          slot[k] = {{o.x, o.y, o.z, o.w}, {f.x, f.y, f.z, f.w}};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (slot[k].offset[j] >= 0 && has_channel) {
              corner[k][j] = Row::load(Rows::at(p, value_part, slot[k].offset[j]));
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            acc x[kVec];
            corner[k][j].unpack(x);
#pragma unroll
            for (int c = 0; c < kVec; ++c) sum[c] += slot[k].share[j] * x[c];
          }
        }
      }
    }

#pragma unroll
    for (int offset = kLanes; offset < Layout::kTeam; offset *= 2) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[c] += __shfl_xor_sync(0xffffffff, sum[c], offset);
    }
    if (work.active() && has_channel && split == 0) {
      Row::pack(sum).store(static_cast<scalar_t*>(p.output) + work.row * p.channels + channel);
    }
  }
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename scalar_t, int kVec, int kLanes, int kSplit, int kAhead>
const char* launch_forward(const Params& p, void* stream) {
  const bool encoder = p.queries == p.spatial_size;
  const int tiles = kAhead == 1 && sizeof(scalar_t) > 2 && encoder ? 4 : 1;
  return with_mixed<scalar_t>(p, [&](auto mixed) {
    return launch<Layout<kLanes, kSplit>>(
        forward_kernel<scalar_t, mixed.value, kVec, kLanes, kSplit, kAhead>, p, stream, tiles, tiles);
  });
}

// Below this many rows a GPU has lanes to spare: the points of each are spread over four groups of
// lanes, where those are small.
constexpr int64_t kFewRows = 16384;
constexpr int64_t kManyRows = 131072;
constexpr int kFewSplit = 4, kFewAhead = 2;

}  // namespace

// ------------------------------------------------------------------------------------------- entry

const char* forward(const Params& params, void* stream) {
  const char* error = nullptr;
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    const int64_t rows = params.batch * params.queries * params.heads;
    if (params.channels % kVec != 0 || !Rows<scalar_t, kVec>::fits(params)) {
      error = launch_forward<scalar_t, 1, 32, 1, 1>(params, stream);
      return;
    }
    error = with_lanes<2>(params.channels / kVec, [&](auto lanes) {
      constexpr int kLanes = lanes.value;
      if constexpr (sizeof(scalar_t) == 2) {
        if constexpr (kLanes <= 4) {
          if (rows <= kFewRows) {
            return launch_forward<scalar_t, kVec, kLanes, kFewSplit, kFewAhead>(params, stream);
          }
        }
      } else {
        if (rows <= kManyRows) return launch_forward<scalar_t, kVec, kLanes, 1, 2>(params, stream);
      }
      return launch_forward<scalar_t, kVec, kLanes, 1, 1>(params, stream);
    });
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
