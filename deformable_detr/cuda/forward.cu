// Multi-scale deformable attention on the GPU, forward: output = sum over points of
// attention weight * (bilinear sample of value). layout.cuh tells how teams of lanes share the
// work.
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

// Half types are faster in small blocks: a block's place is free when its last warp ends.
template <typename scalar_t>
constexpr int kForwardThreads = sizeof(scalar_t) == 2 ? kThreads / 2 : kThreads;
// Blocks that share the registers of a multiprocessor.
template <typename scalar_t, int kAhead>
constexpr int kForwardBlocks = (kAhead == 1 ? 1024 : 768) / kForwardThreads<scalar_t>;
// Whether the queries of an encoder are served in strips, four tiles a block: that brings more
// samples into L1. Half types are bound by instructions instead, and in fused calls the longer
// blocks cost as much as they save. On an H100, 2026-11-28, with and without, in us: fp32
// dino5_encoder_b1 440, 457; ddetr_encoder_b4 344, 355; fused bevformer_tsa 160, 154.
template <typename scalar_t, Source kSource>
constexpr bool kForwardStrips = sizeof(scalar_t) > 2 && !kIsFused<kSource>;
constexpr int kStripTiles = 4;

// Stores the channels of lanes whose sum is not finite. The kernel below multiplies what it has in
// the place of a corner outside the map by zero, which makes NaN of an infinity that is no corner
// of the point. Here such corners are left out. Not inlined and with its arguments by value, so
// that it takes no registers from the kernel, to which it costs one test a row. To zero the corners
// in the kernel instead costs 14 to 21%. The whole warp takes part, as a call by some of its lanes
// would change the uniform registers of the others.
template <typename scalar_t, Source kSource, int kVec, typename LevelEntry>
__device__ __noinline__ void store_not_finite(const Params& p, const LevelEntry* levels,
                                              TeamRow row, int32_t channel, bool stores,
                                              Softmax<acc_t<scalar_t>> softmax) {
  using acc = acc_t<scalar_t>;
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  const scalar_t* value = static_cast<const scalar_t*>(p.value) +
                          (row.batch * p.spatial_size * p.heads + row.head) * p.channels + channel;
  acc sum[kVec] = {};
  PointCursor cursor(p, 0);
  PointReader<scalar_t, kSource> reader;
  reader.seek(p, row.index, row.query_index(p), 0);
  for (int32_t point = 0; point < p.points; ++point) {
    if (stores) {
      reader.read(p);
      const acc weight = find_weight(p, reader, softmax);
      const Corners<acc> corners = find_corners(p, reader, cursor.level, levels[cursor.level]);
      for (int j = 0; j < 4; ++j) {
        if (corners.pixel[j] == kOutside) continue;
        acc x[kVec];
        Vector::load(Indexing::at(p, value, Indexing::offset(p, corners.pixel[j]))).unpack(x);
#pragma unroll
        for (int c = 0; c < kVec; ++c) sum[c] += weight * corners.corner_weight(j) * x[c];
      }
    }
    reader.skip(p, 1);
    cursor.advance(p, 1);
  }
  if (!stores) return;
  Vector::pack(sum).store(static_cast<scalar_t*>(p.output) + row.index * p.channels + channel);
}

// kSplit groups of kLanes lanes share a row: each adds up every kSplit-th point. The corners of
// kAhead points are loaded before they are used: more loads are in flight, but fewer warps fit.
// kTiles: adjacent tiles that a block serves, of which the next finds samples of the last in L1.
template <typename scalar_t, Source kSource, int kVec, int kLanes, int kSplit, int kAhead,
          int kTiles>
__global__ void __launch_bounds__(kForwardThreads<scalar_t>, kForwardBlocks<scalar_t, kAhead>)
    forward_kernel(const __grid_constant__ Params p, int64_t first_batch) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, kSplit, kForwardThreads<scalar_t>>;
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  constexpr bool kFused = kIsFused<kSource>;
  extern __shared__ __align__(16) char memory[];
  __shared__ int4 offsets[Layout::kSlots];            // of each corner in value
  __shared__ PerCorner<acc> weights[Layout::kSlots];  // corner weight * attention weight

  LevelEntry* levels = reinterpret_cast<LevelEntry*>(memory);

  const int lane = threadIdx.x % Layout::kTeam;
  const int split = lane / kLanes;
  const int32_t all_points = p.points;
  const int own_slot = Layout::first_slot() + lane * Layout::kPitch;
  const int group_slot = Layout::first_slot() + split * Layout::kPitch;
  const bool strips = kForwardStrips<scalar_t, kSource> && queries_are_pixels(p);

  const int64_t first_tile = int64_t(blockIdx.x) * kTiles;
  TeamRow row = find_row<Layout>(p, first_batch, first_tile);
  PointReader<scalar_t, kSource> reader;
  const auto read_first = [&] {
    reader.seek(p, row.index, row.query_index(p), lane);
    if (lane < row.points) reader.read(p);
  };

  // The first points are on their way while the levels arrive.
  LevelLoader<LevelEntry> level_loader;
  level_loader.load(p);
  if (!strips) read_first();
  level_loader.store(p, levels);

  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile > 0) row = find_row<Layout>(p, first_batch, first_tile + tile);
    if (strips) follow_strips(p, levels, row);
    if (strips || tile > 0) read_first();
    const scalar_t* value = static_cast<const scalar_t*>(p.value) +
                            (row.batch * p.spatial_size * p.heads + row.head) * p.channels;

    // A team of fewer than 32 lanes holds all channels, and the loop has one turn. Were it left to
    // run time, bfloat16 would spill 28 to 40 bytes, at 5 to 8% of the time.
    const int32_t end_channel = kLanes < 32 ? 1 : p.channels;
    for (int32_t team_channel = 0; team_channel < end_channel; team_channel += kLanes * kVec) {
      const int32_t channel = team_channel + lane % kLanes * kVec;
      const bool has_channel = channel < p.channels;
      const scalar_t* value_at_channel = opaque(value + channel);
      acc sum[kVec] = {};
      RunningSoftmax<acc, Layout::kTeam> softmax;
      // A corner outside the map is not loaded: its weight is zero, and what stays in its place is
      // an earlier corner of this row, or zero.
      Vector corner[kAhead][4];

      if (team_channel > 0) read_first();
      PointCursor cursor(p, lane);
      for (int32_t first = 0; first < all_points; first += Layout::kTeam) {
        // Each lane works out one point.
        const bool has_point = first + lane < row.points;
        acc weight = 0;
        if constexpr (kFused) {
          acc rescale;
          weight = softmax.take(has_point ? reader.weight(p) : acc(-INFINITY), rescale);
#pragma unroll
          for (int c = 0; c < kVec; ++c) sum[c] *= rescale;
        }
        Corners<acc> corners;
        PerCorner<acc> own_weights = {};
        if (has_point) {
          if constexpr (!kFused) weight = reader.weight(p);
          corners = find_corners(p, reader, cursor.level, levels[cursor.level]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            own_weights.corner[j] =
                corners.pixel[j] == kOutside ? 0 : weight * corners.corner_weight(j);
          }
        }
        reader.skip(p, Layout::kTeam);
        if (first + Layout::kTeam + lane < row.points) reader.read(p);
        cursor.advance(p, Layout::kTeam);
        __syncwarp();
        offsets[own_slot] = Indexing::offsets(p, corners.pixel);
        weights[own_slot] = own_weights;
        __syncwarp();

        // Each group adds up its points.
#pragma unroll
        for (int i = 0; i < kLanes; i += kAhead) {
          if ((kAhead > 1 || i % 4 == 0) && first + i * kSplit >= all_points) break;
          PerCorner<acc> of[kAhead];
#pragma unroll
          for (int k = 0; k < kAhead; ++k) {
            const int4 offset = offsets[group_slot + (i + k) * kSplit * Layout::kPitch];
            of[k] = weights[group_slot + (i + k) * kSplit * Layout::kPitch];
            const int32_t offset_of[4] = {offset.x, offset.y, offset.z, offset.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (offset_of[j] >= 0 && has_channel) {
                corner[k][j] = Vector::load(Indexing::at(p, value_at_channel, offset_of[j]));
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
      acc scale = 1;
      if constexpr (kFused) {
        scale = softmax.scale();
#pragma unroll
        for (int c = 0; c < kVec; ++c) sum[c] *= scale;
      }
      acc finite = 0;  // NaN, if an element of the sum is not finite
#pragma unroll
      for (int c = 0; c < kVec; ++c) finite += sum[c] * 0;
      const bool stores = row.active() && has_channel && split == 0;
      if (stores && finite == 0) {
        Vector::pack(sum).store(static_cast<scalar_t*>(p.output) + row.index * p.channels +
                                channel);
      }
      if (__any_sync(0xffffffff, stores && finite != 0)) {
        store_not_finite<scalar_t, kSource, kVec>(p, levels, row, channel, stores && finite != 0,
                                                  {softmax.largest, scale});
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename scalar_t, int kVec, int kLanes, int kSplit, int kAhead>
void launch_forward(const Params& p, void* stream) {
  using Layout = cuda::Layout<kLanes, kSplit, kForwardThreads<scalar_t>>;
  with_source<scalar_t>(p, [&](auto source) {
    const auto launch_tiles = [&](auto tiles) {
      const auto kernel =
          forward_kernel<scalar_t, source.value, kVec, kLanes, kSplit, kAhead, tiles.value>;
      const Grid grid{Layout::query_blocks(p, tiles.value), Layout::head_blocks(p),
                      kForwardThreads<scalar_t>,
                      p.levels * int64_t(sizeof(LevelEntry<scalar_t, source.value>))};
      return launch(kernel, p, grid, stream);
    };
    if constexpr (kForwardStrips<scalar_t, source.value> && kAhead == 1) {
      if (queries_are_pixels(p)) {
        return launch_tiles(std::integral_constant<int, kStripTiles>{});
      }
    }
    return launch_tiles(std::integral_constant<int, 1>{});
  });
}

// With fewer rows a GPU waits for memory more than for anything else.
constexpr int64_t kManyRows = 131072;

}  // namespace

// ------------------------------------------------------------------------------------------- entry

void forward(const Params& params, void* stream) {
  const int64_t rows = count_rows(params);
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    if (params.channels % kVec != 0 || !Indexing<scalar_t, kVec>::fits(params)) {
      return launch_forward<scalar_t, 1, 32, 1, 1>(params, stream);
    }
    with_lanes<2, 32>(params.channels / kVec, [&](auto lanes) {
      constexpr int kLanes = lanes.value;
      constexpr bool kHalf = sizeof(scalar_t) == 2;
      if constexpr (kHalf && kLanes <= 4) {
        if (rows <= kFewRows) return launch_forward<scalar_t, kVec, kLanes, 4, 2>(params, stream);
      }
      if constexpr (!kHalf) {
        if (rows <= kManyRows) return launch_forward<scalar_t, kVec, kLanes, 1, 2>(params, stream);
      }
      launch_forward<scalar_t, kVec, kLanes, 1, 1>(params, stream);
    });
  });
}

}  // namespace ms_deform_attn::cuda
