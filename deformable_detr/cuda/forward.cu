// Multi-scale deformable attention on the GPU, forward: output = sum over points of
// weight * (bilinear sample of value). launch.cuh tells how teams of lanes share the work.

#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

// Half types are faster in small blocks, which end sooner: hardly anything waits in common.
template <typename scalar_t>
constexpr int kForwardThreads = sizeof(scalar_t) == 2 ? kThreads / 2 : kThreads;
// That many of them share a multiprocessor's registers.
template <typename scalar_t, int kAhead>
constexpr int kForwardBlocks = (kAhead == 1 ? 1024 : 768) / kForwardThreads<scalar_t>;

// kSplit groups of kLanes lanes share a row: each adds up every kSplit-th point. The corners of
// kAhead points are loaded before they are used: more are under way at a time, but fewer warps fit.
template <typename scalar_t, Source kSource, int kVec, int kLanes, int kSplit, int kAhead>
__global__ void __launch_bounds__(kForwardThreads<scalar_t>, kForwardBlocks<scalar_t, kAhead>)
    forward_kernel(const __grid_constant__ Params p, int tiles) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, kSplit, kForwardThreads<scalar_t>>;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  // Strips bring more samples into L1, but what half types wait for is instructions.
  constexpr bool kStrips = sizeof(scalar_t) > 2;
  constexpr bool kFused = kIsFused<kSource>;
  extern __shared__ __align__(16) char memory[];
  __shared__ int4 offsets[Layout::kSlots];           // of each corner in value
  __shared__ PerCorner<acc> shares[Layout::kSlots];  // of each corner, times the point's weight

  LevelOf<scalar_t, kSource>* levels = reinterpret_cast<LevelOf<scalar_t, kSource>*>(memory);

  const int lane = threadIdx.x % Layout::kTeam;
  const int split = lane / kLanes;
  const int32_t all_points = p.points;
  const int own_slot = Layout::first_slot() + lane * Layout::kPitch;
  const int group_slot = Layout::first_slot() + split * Layout::kPitch;
  const bool strips = kStrips && queries_are_pixels(p);

  const int64_t first_tile = int64_t(blockIdx.x) * tiles;
  Work work = find_work<Layout>(p, first_tile);
  PointReader<scalar_t, kSource> next;
  const auto start = [&] {
    next.start(p, work.row, work.query_row(p), lane);
    if (lane < work.points) next.read(p);
  };

  // The first points are on their way while the levels arrive.
  LevelLoader<LevelOf<scalar_t, kSource>> level_loader;
  level_loader.load(p);
  if (!strips) start();
  level_loader.store(p, levels);

  for (int tile = 0; tile < tiles; ++tile) {
    if (tile > 0) work = find_work<Layout>(p, first_tile + tile);
    if (strips) follow_strips(p, levels, work);
    if (strips || tile > 0) start();
    const scalar_t* value = static_cast<const scalar_t*>(p.value) +
                            (work.batch * p.spatial_size * p.heads + work.head) * p.channels;

    for (int32_t part = 0; part < p.channels; part += kLanes * kVec) {
      const int32_t channel = part + lane % kLanes * kVec;
      const bool has_channel = channel < p.channels;
      const scalar_t* value_part = settled(value + channel);
      acc sum[kVec] = {};
      RunningSoftmax<acc, Layout::kTeam> softmax;
      // A corner outside is not loaded: its share is zero, and what is left in its place is an
      // earlier corner of this row, or zero.
      Row corner[kAhead][4];

      if (part > 0) start();
      PointCursor cursor(p, lane);
      for (int32_t first = 0; first < all_points; first += Layout::kTeam) {
        // Each lane works out one point.
        const bool has_point = first + lane < work.points;
        acc weight = 0;
        if constexpr (kFused) {
          acc shrink;
          weight = softmax.take(has_point ? next.weight(p) : acc(-INFINITY), shrink);
#pragma unroll
          for (int c = 0; c < kVec; ++c) sum[c] *= shrink;
        }
        Corners<acc> corners;
        PerCorner<acc> share = {};
        if (has_point) {
          if constexpr (!kFused) weight = next.weight(p);
          corners = place(p, next, cursor.level, levels[cursor.level]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            share.corner[j] = corners.pixel[j] == kOutside ? 0 : weight * corners.share(j);
          }
        }
        next.skip(p, Layout::kTeam);
        if (first + Layout::kTeam + lane < work.points) next.read(p);
        cursor.advance(p, Layout::kTeam);
        __syncwarp();
        offsets[own_slot] = Rows::offsets(p, corners.pixel);
        shares[own_slot] = share;
        __syncwarp();

        // Each group adds up its points.
#pragma unroll
        for (int i = 0; i < kLanes; i += kAhead) {
          if ((kAhead > 1 || i % 4 == 0) && first + i * kSplit >= all_points) break;
          PerCorner<acc> of[kAhead];
#pragma unroll
          for (int k = 0; k < kAhead; ++k) {
            const int4 offset = offsets[group_slot + (i + k) * kSplit * Layout::kPitch];
            of[k] = shares[group_slot + (i + k) * kSplit * Layout::kPitch];
            const int32_t offset_of[4] = {offset.x, offset.y, offset.z, offset.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (offset_of[j] >= 0 && has_channel) {
                corner[k][j] = Row::load(Rows::at(p, value_part, offset_of[j]));
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
              for (int c = 0; c < kVec; ++c) sum[c] += of[k].corner[j] * x[c];
            }
          }
        }
      }

#pragma unroll
      for (int offset = kLanes; offset < Layout::kTeam; offset *= 2) {
#pragma unroll
        for (int c = 0; c < kVec; ++c) sum[c] += __shfl_xor_sync(0xffffffff, sum[c], offset);
      }
      if constexpr (kFused) {
        const acc scale = softmax.scale();
#pragma unroll
        for (int c = 0; c < kVec; ++c) sum[c] *= scale;
      }
      if (work.active() && has_channel && split == 0) {
        Row::pack(sum).store(static_cast<scalar_t*>(p.output) + work.row * p.channels + channel);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename scalar_t, int kVec, int kLanes, int kSplit, int kAhead>
const char* launch_forward(const Params& p, int tiles, void* stream) {
  using Layout = cuda::Layout<kLanes, kSplit, kForwardThreads<scalar_t>>;
  return with_source<scalar_t>(p, [&](auto source) {
    return launch(forward_kernel<scalar_t, source.value, kVec, kLanes, kSplit, kAhead>, p,
                  tile_blocks<Layout>(p, tiles), head_blocks<Layout>(p), kForwardThreads<scalar_t>,
                  p.levels * sizeof(LevelOf<scalar_t, source.value>), false, stream, tiles);
  });
}

// With fewer rows a GPU waits for memory more than for anything else.
constexpr int64_t kManyRows = 131072;

}  // namespace

// ------------------------------------------------------------------------------------------- entry

const char* forward(const Params& params, void* stream) {
  const char* error = nullptr;
  const int64_t rows = params.batch * params.queries * params.heads;
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    if (params.channels % kVec != 0 || !Rows<scalar_t, kVec>::fits(params)) {
      error = launch_forward<scalar_t, 1, 32, 1, 1>(params, 1, stream);
      return;
    }
    error = with_lanes<2, 32>(params.channels / kVec, [&](auto lanes) {
      constexpr int kLanes = lanes.value;
      constexpr bool kHalf = sizeof(scalar_t) == 2;
      if constexpr (kHalf && kLanes <= 4) {
        if (rows <= kFewRows) {
          return launch_forward<scalar_t, kVec, kLanes, 4, 2>(params, 1, stream);
        }
      }
      if constexpr (!kHalf) {
        if (rows <= kManyRows) {
          return launch_forward<scalar_t, kVec, kLanes, 1, 2>(params, 1, stream);
        }
      }
      // A block's next tile finds the samples of the one before in L1.
      const int tiles = !kHalf && queries_are_pixels(params) ? 4 : 1;
      return launch_forward<scalar_t, kVec, kLanes, 1, 1>(params, tiles, stream);
    });
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
