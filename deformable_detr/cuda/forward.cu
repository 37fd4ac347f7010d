// Multi-scale deformable attention on the GPU, forward: output = sum over points of
// attention weight * (bilinear sample of value). layout.cuh tells how teams of lanes share the
// work.
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/not_finite.cuh"
#include "deformable_detr/cuda/softmax.cuh"
#include "deformable_detr/cuda/windows.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

// How rows are served; choose() below says which for what.
//
// split: groups of lanes that share the points of a row.
// ahead: points whose corners a group loads before it uses the first. More loads are in flight, but
//     fewer warps fit.
// threads: of a block. In small blocks a place is free sooner, when the last warp ends.
// compact: code that is executed once. A small problem takes as long as its instructions take to
//     arrive, 15 KB of them else: levels are read by the lanes that need them, without a table in
//     shared memory, and loops are not unrolled.
template <int split, int ahead, int threads, bool compact = false>
struct Schedule {
  static constexpr int kSplit = split, kAhead = ahead, kThreads = threads;
  static constexpr bool kCompact = compact;
  // Blocks that share the registers of a multiprocessor.
  static constexpr int kBlocks = (ahead == 1 ? 1024 : ahead == 2 ? 768 : 512) / threads;
};

// Whether the queries of an encoder are served in strips, four tiles a block: that brings more
// samples into L1. Half types are bound by instructions instead, and in fused calls the longer
// blocks cost as much as they save. On an H100, 2026-11-28, with and without, in us: fp32
// dino5_encoder_b1 440, 457; ddetr_encoder_b4 344, 355; fused bevformer_tsa 160, 154.
template <typename scalar_t, Source kSource>
constexpr bool kForwardStrips = sizeof(scalar_t) > 2 && !kIsFused<kSource>;
constexpr int kStripTiles = 4;

// The tile that a block fetched of a call that windows left. In shared memory, as every register
// is taken.
struct alignas(16) FetchedTile {
  int32_t queries, head_block, batch;
  int32_t index;  // of all tiles, one batch after the other

  // Forwards. By one thread, without divisions.
  template <typename Layout>
  __device__ __forceinline__ void move(const Params& p, int32_t to) {
    const int32_t tiles = ceil_div(static_cast<int32_t>(p.queries), Layout::kTileQueries);
    const int32_t head_blocks = ceil_div(p.heads, Layout::kTileHeads);
    FetchedTile tile = *this;
    tile.queries += to - tile.index;
    tile.index = to;
    for (; tile.queries >= tiles; tile.queries -= tiles) {
      if (++tile.head_block < head_blocks) continue;
      tile.head_block = 0;
      ++tile.batch;
    }
    *this = tile;
  }
};

// kTiles: adjacent tiles that a block serves, of which the next finds samples of the last in L1.
// kIfLeft: the call is an encoder's that windows may have served before. Blocks that end at once
// take time, too, so there are only as many as run at once, and they fetch tiles. With a fixed
// share of the tiles they would end at different times: on an H100, 2026-11-28, ddetr_encoder_b4
// fp16 with offsets times 2 takes 273 us then instead of 242.
// ParamsType: UsualParams make a stage of 32 points 447 instead of 518 instructions long in fp16,
// and 504 instead of 612 where it is fused: on an H100, 2026-11-28, encoders in half types take
// 0.98 of the time, and 0.93 fused. In float decoders took up to 1.03.
template <typename scalar_t, Source kSource, int kVec, int kLanes, typename Schedule, int kTiles,
          typename ParamsType = Params, bool kIfLeft = false>
__global__ void __launch_bounds__(Schedule::kThreads, Schedule::kBlocks)
    forward_kernel(const __grid_constant__ ParamsType p, int64_t first_batch) {
  using acc = acc_t<scalar_t>;
  constexpr int kSplit = Schedule::kSplit, kAhead = Schedule::kAhead;
  constexpr bool kCompact = Schedule::kCompact, kFused = kIsFused<kSource>;
  using Layout = cuda::Layout<kLanes, kSplit, Schedule::kThreads>;
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  // Whether a level's points are whole stages.
  constexpr bool kWholeStages =
      std::is_same_v<ParamsType, UsualParams> && UsualParams::points_per_level % Layout::kTeam == 0;
  extern __shared__ __align__(16) char memory[];
  __shared__ int4 offsets[Layout::kSlots];            // of each corner in value
  __shared__ PerCorner<acc> weights[Layout::kSlots];  // corner weight * attention weight

  const int lane = threadIdx.x % Layout::kTeam;
  const int split = lane / kLanes;
  const int32_t all_points = p.points;
  const int own_slot = Layout::first_slot() + lane * Layout::kPitch;
  const int group_slot = Layout::first_slot() + split * Layout::kPitch;
  const bool strips =
      !kCompact && !kIfLeft && kForwardStrips<scalar_t, kSource> && queries_are_pixels(p);

  __shared__ FetchedTile fetched;
  const auto row_of = [&](int tile) {
    if constexpr (kIfLeft) {
      return find_row<Layout>(p, fetched.batch, fetched.head_block, fetched.queries);
    } else {
      return find_row<Layout>(p, first_batch + blockIdx.z, blockIdx.y,
                              int64_t(blockIdx.x) * kTiles + tile);
    }
  };
  TeamRow row{};
  if constexpr (kIfLeft) {
    // Blocks may end while windows are still being served. One waits for them, and with it whatever
    // follows in the stream.
    if (blockIdx.x == 0) wait_for_previous_kernel();
    if (!left_by_windows(p, sizeof(scalar_t) == 2 ? kMostMissed : kMostMissedFloat)) return;
    if (threadIdx.x == 0) {
      fetched = {};
      fetched.move<Layout>(p, blockIdx.x);
    }
  } else {
    row = row_of(0);
  }
  PointReader<scalar_t, kSource> reader;
  // A compact kernel reads a point where it is used, the others one stage before.
  const auto read = [&](int32_t point) {
    if (point < row.points) reader.read(p);
  };
  const auto read_first = [&] {
    reader.seek(p, row.index, row.query_index(p), lane);
    if (!kCompact) read(lane);
  };

  LevelEntry* levels = reinterpret_cast<LevelEntry*>(memory);
  if constexpr (!kCompact) {
    // The first points are on their way while the levels arrive.
    LevelLoader<LevelEntry> level_loader;
    level_loader.load(p);
    if (!strips && !kIfLeft) read_first();
    level_loader.store(p, levels);
  } else {
    read_first();
  }

  int32_t next_tile = 0;
  for (int tile = 0; kIfLeft || tile < kTiles; ++tile) {
    if (kIfLeft && fetched.batch >= p.batch) return;
    if (kIfLeft || tile > 0) row = row_of(tile);
    if (strips) follow_strips(p, levels, row);
    if (strips || kIfLeft || tile > 0) read_first();
    if constexpr (kIfLeft) {
      __syncthreads();
      // It arrives while this tile is served.
      if (threadIdx.x == 0) next_tile = atomicAdd(fetched_tiles(p), 1) + gridDim.x;
    }
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
        const bool has_point = kWholeStages ? row.active() : first + lane < row.points;
        if constexpr (kCompact) read(first + lane);
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
          corners =
              find_corners(p, reader, cursor.level, find_level<kCompact>(p, levels, cursor.level));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            own_weights.corner[j] =
                corners.pixel[j] == kOutside ? 0 : weight * corners.corner_weight(j);
          }
        }
        reader.skip(p, Layout::kTeam);
        if constexpr (!kCompact) read(first + Layout::kTeam + lane);
        cursor.advance(p, Layout::kTeam);
        __syncwarp();
        offsets[own_slot] = Indexing::offsets(p, corners.pixel);
        weights[own_slot] = own_weights;
        __syncwarp();

        // Each group adds up its points.
#pragma unroll(kCompact ? 1 : kLanes / kAhead)
        for (int i = 0; i < kLanes; i += kAhead) {
          if (!kWholeStages && (kAhead > 1 || i % 4 == 0) && first + i * kSplit >= all_points) {
            break;
          }
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
        store_not_finite<scalar_t, kSource, kVec, kCompact>(
            p, levels, row, channel, stores && finite != 0, {softmax.largest, scale});
      }
    }
    if constexpr (kIfLeft) {
      if (threadIdx.x == 0) fetched.move<Layout>(p, next_tile);
      __syncthreads();
    }
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename scalar_t, int kVec, int kLanes, typename Schedule>
void launch_forward(const Params& p, void* stream) {
  using Layout = cuda::Layout<kLanes, Schedule::kSplit, Schedule::kThreads>;
  with_source<scalar_t>(p, [&](auto source) {
    const int64_t level_bytes =
        Schedule::kCompact ? 0 : p.levels * int64_t(sizeof(LevelEntry<scalar_t, source.value>));
    const auto launch_tiles = [&](auto tiles) {
      const Grid grid{Layout::query_blocks(p, tiles.value), Layout::head_blocks(p),
                      Schedule::kThreads, level_bytes};
      if constexpr (kVec > 1 && kVec * kLanes == UsualParams::channels && Schedule::kSplit == 1 &&
                    sizeof(scalar_t) == 2 && !kIsMixed<source.value>) {
        if (UsualParams::fit(p)) {
          return launch(forward_kernel<scalar_t, source.value, kVec, kLanes, Schedule, tiles.value,
                                       UsualParams>,
                        UsualParams{p}, grid, stream);
        }
      }
      launch(forward_kernel<scalar_t, source.value, kVec, kLanes, Schedule, tiles.value>, p, grid,
             stream);
    };
    if constexpr (kForwardStrips<scalar_t, source.value> && Schedule::kAhead == 1) {
      if (queries_are_pixels(p)) {
        return launch_tiles(std::integral_constant<int, kStripTiles>{});
      }
    }
    launch_tiles(std::integral_constant<int, 1>{});
  });
}

// Half types are faster in small blocks.
template <typename scalar_t>
using Plain = Schedule<1, 1, sizeof(scalar_t) == 2 ? kThreads / 2 : kThreads>;

// After forward_windows().
void launch_if_left(const Params& p, void* stream) {
  const DeviceLimits limits;
  const auto launch_as = [&](auto zero, auto source) {
    using scalar_t = decltype(zero);
    using Schedule = Plain<scalar_t>;
    constexpr int kVec = 16 / sizeof(scalar_t);
    const Grid grid{int64_t(limits.multiprocessors) * Schedule::kBlocks, 1, Schedule::kThreads,
                    p.levels * int64_t(sizeof(LevelEntry<scalar_t, source.value>)),
                    limits.overlaps_kernels};
    launch_blocks(forward_kernel<scalar_t, source.value, kVec, UsualParams::channels / kVec,
                                 Schedule, 1, UsualParams, true>,
                  grid, 1, stream, UsualParams{p}, int64_t{0});
  };
  const auto launch_source = [&](auto zero) {
    p.fused() ? launch_as(zero, std::integral_constant<Source, Source::fused>{})
              : launch_as(zero, std::integral_constant<Source, Source::plain>{});
  };
  if (p.value_dtype == DType::f32) return launch_source(float{});
  p.value_dtype == DType::f16 ? launch_source(half_t{}) : launch_source(bfloat16_t{});
}

// choose<scalar_t, kLanes, kVec>(p, [&](auto schedule) { ... }): with fewer rows a GPU waits for
// memory more than for anything else. On an H100, 2026-11-28, in us, beside what was there before:
//
//   rows up to 2048      seed_b1_q100 fp32 7.2, 9.8; fp16 6.5, 7.1. An empty kernel takes 3.2.
//   8192, fp32           hub_b2_q300 11.1, 12.6; seed_b2_q300 8.7, 10.7
//   131072, fp32         gdino_decoder_b4 42.3, 44.7; rtdetr_decoder_b16 48.3, 50.8. Between 8192
//   and
//                        16384 rows (ddetr_decoder_b4) it would be slower by a tenth.
//   131072, half         rtdetr_decoder_b16 fp16 36.3, 41.7, whose value does not fit into L2;
//                        where it does, it would be slower by up to 3%
//
// Those with their own kernels are for the 32 channels that most models have, so that the library
// stays small.
template <typename scalar_t, int kLanes, int kVec, typename Function>
void choose(const Params& p, Function&& function) {
  constexpr int64_t kManyRows = 131072;
  constexpr int64_t kL2Bytes = 50 << 20;
  constexpr bool kHalf = sizeof(scalar_t) == 2, kFloat = sizeof(scalar_t) == 4;
  const int64_t rows = count_rows(p);
  if (rows > kManyRows) return function(Plain<scalar_t>{});
  if constexpr (kLanes * kVec == 32 && (kHalf || kFloat)) {
    const int64_t bytes = p.batch * p.spatial_size * p.heads * p.channels * sizeof(scalar_t);
    if (rows <= kFewRows / 8) return function(Schedule<4, 4, 64, true>{});
    if constexpr (kFloat) {
      if (rows <= kFewRows / 2) return function(Schedule<2, 2, 128, true>{});
    }
    if (rows > kFewRows && (kFloat || bytes > kL2Bytes)) return function(Schedule<1, 4, 128>{});
  }
  if constexpr (!kHalf) return function(Schedule<1, 2, kThreads>{});
  if constexpr (kHalf && kLanes <= 4) {
    if (rows <= kFewRows) return function(Schedule<4, 2, kThreads / 2>{});
  }
  function(Plain<scalar_t>{});
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

void forward(const Params& params, const ForwardPlan& plan, void* stream) {
  if (plan.windows.regions > 0) {
    forward_windows(params, plan.windows, stream);
    return launch_if_left(params, stream);
  }
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    if (params.channels % kVec != 0 || !Indexing<scalar_t, kVec>::fits(params)) {
      return launch_forward<scalar_t, 1, 32, Plain<scalar_t>>(params, stream);
    }
    with_lanes<2, 32>(params.channels / kVec, [&](auto lanes) {
      choose<scalar_t, lanes.value, kVec>(params, [&](auto schedule) {
        launch_forward<scalar_t, kVec, lanes.value, decltype(schedule)>(params, stream);
      });
    });
  });
}

}  // namespace ms_deform_attn::cuda
