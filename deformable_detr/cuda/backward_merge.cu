// Strategy::direct, the levels with few pixels: their part of grad_value, by fewer atomics than one
// for each corner of each point.
//
// A coarse level has as many points as a fine one, so that many fall on the same pixels. A block
// sorts up to 4096 points of a level by cell (the four pixels around a point), and adds up in
// registers what falls into the same cell before it adds that to grad_value; what a cell has for
// its eastern pixels is taken on to the next cell of the row. The order of additions varies.
// merged_levels.cuh tells which levels these are. On an H100 it takes bevformer_sca (fp16) from
// 2431 to 1599 us.
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/block_scan.cuh"
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/merged_levels.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {
namespace {

constexpr int kMergeThreads = 512;
constexpr int kMergeBlocks = 2;  // of a multiprocessor
constexpr int kPointsPerThread = kMergePoints / kMergeThreads;
constexpr int kReadAtOnce = 4;  // of a thread's points, before they are looked at
constexpr int kVec = 4;         // a lane's channels: 16 bytes of sums
constexpr int kMostLanes = 8;   // of a team: the 32 channels that most models have
constexpr int kAhead = 4;       // points whose rows of grad_output are loaded before they are added

// A point's entry: the number of its cell, which of its corners are inside, and a place: where it
// is among the points of the cell, then of the block; once it is there, its query among the
// block's.
//
// Cells are counted from the one whose se corner is the map's first pixel. The cells past both ends
// of a row share their numbers, but not the corners that are inside.
constexpr int kPlaceBits = 12, kCornerBits = 4, kNumberAt = kPlaceBits + kCornerBits;
constexpr int32_t kPlace = (1 << kPlaceBits) - 1;
constexpr int32_t kWest = 5 << kPlaceBits, kEast = 10 << kPlaceBits;  // nw and sw, ne and se
static_assert(kMergePoints <= kPlace + 1);

// The point's entry with place 0, or kOutside if none of its corners is in the map.
__device__ __forceinline__ int32_t find_entry(const Corners<float>& corners, const Level& level) {
  int32_t number = kOutside, inside = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (corners.pixel[j] == kOutside) continue;
    number = corners.pixel[j] - level.start + (j & 1 ? 0 : 1) + (j & 2 ? 0 : level.width);
    inside |= 1 << j;
  }
  return number == kOutside ? kOutside : (number << kCornerBits | inside) << kPlaceBits;
}

// Where a block's points are, by cell. While they are counted, it keeps the counts instead.
struct SortedPoints {
  PerCorner<float> weights[kMergePoints + kAhead];  // corner weight * attention weight
  alignas(16) int32_t entries[kMergePoints + kAhead];
};
constexpr int64_t kMostCells = 2 * kMostMergedPixels + 1;
static_assert(kMostCells * sizeof(int32_t) <= sizeof(SortedPoints));
static_assert(kMostCells <= 1 << (31 - kNumberAt));

// softmaxes: [batch, queries, heads], in a fused call.
template <typename scalar_t, Source kSource, int kLanes>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocks)
    merge_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch,
                 const Softmax<float>* softmaxes) {
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  constexpr int kTeams = kMergeThreads / kLanes, kTeamChannels = kVec * kLanes;
  extern __shared__ __align__(32) char memory[];
  SortedPoints& sorted = *reinterpret_cast<SortedPoints*>(memory);
  int32_t* bins = reinterpret_cast<int32_t*>(memory);  // the count of points, then where they start

  let_next_kernel_start();
  // Blocks that read the same rows of grad_output are adjacent.
  const int32_t channel_blocks = ceil_div(p.channels, kTeamChannels);
  const int32_t channel_block = blockIdx.x % channel_blocks;
  const int32_t head = blockIdx.x / channel_blocks % p.heads;
  const int32_t level_and_share = blockIdx.x / channel_blocks / p.heads;
  const int32_t level_index = level_and_share % p.levels, share = level_and_share / p.levels;
  const LevelEntry level = read_level_entry<LevelEntry>(p, level_index);
  const int64_t first_query = is_merged(p, level_index, level)
                                  ? share * int64_t(queries_of_share(p, level_index))
                                  : p.queries;
  if (first_query >= p.queries) {
    wait_for_previous_kernel();  // the next kernel relies on it: see let_next_kernel_start
    return;
  }
  const int32_t n_queries =
      static_cast<int32_t>(min(int64_t(queries_of_share(p, level_index)), p.queries - first_query));
  const int64_t batch = first_batch + blockIdx.z;
  const int64_t first_row = batch * p.queries + first_query;

  // ------------------------------------------------- points, counted by cell
  const int32_t cells = (level.height + 1) * level.width + 1;
  for (int32_t i = threadIdx.x; i < cells; i += kMergeThreads) bins[i] = 0;
  if constexpr (kIsFused<kSource>) wait_for_previous_kernel();  // which leaves the softmaxes

  const int32_t points = points_of_level(p, level_index);
  const int32_t first_point = first_point_of_level(p, level_index);
  const int32_t query_step = kMergeThreads / points, point_step = kMergeThreads % points;
  const int32_t own_query = threadIdx.x / points, own_point = threadIdx.x % points;
  // for_points([&](int i, int32_t query, int32_t point) { ... }): this thread's, from `first` on.
  const auto for_points = [&](int first, int end, auto&& function) {
    int32_t query = own_query, point = own_point;
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
      if (i >= first && i < end && query < n_queries) function(i, query, point);
      query += query_step;
      point += point_step;
      if (point >= points) {
        point -= points;
        ++query;
      }
    }
  };
  __syncthreads();
  int32_t entries[kPointsPerThread];
  float right[kPointsPerThread], down[kPointsPerThread], weight[kPointsPerThread];
#pragma unroll
  for (int first = 0; first < kPointsPerThread; first += kReadAtOnce) {
    PointReader<scalar_t, kSource> readers[kReadAtOnce];
    Softmax<float> row_softmaxes[kReadAtOnce];
    for_points(first, first + kReadAtOnce, [&](int i, int32_t query, int32_t point) {
      const int64_t row = (first_row + query) * p.heads + head;
      readers[i - first].seek(p, row, first_row + query, first_point + point);
      readers[i - first].read(p);
      if constexpr (kIsFused<kSource>) row_softmaxes[i - first] = softmaxes[row];
    });
    for_points(first, first + kReadAtOnce, [&](int i, int32_t, int32_t) {
      const Corners<float> corners =
          find_corners<scalar_t, kSource>(p, readers[i - first], level_index, level);
      right[i] = corners.right;
      down[i] = corners.down;
      weight[i] = find_weight(p, readers[i - first], row_softmaxes[i - first]);
      entries[i] = find_entry(corners, level);
      if (entries[i] != kOutside) entries[i] += atomicAdd(bins + (entries[i] >> kNumberAt), 1);
    });
  }
  __syncthreads();

  // -------------------------------------------------------- and put in order
  const int32_t cells_per_thread = ceil_div(cells, kMergeThreads) | 1;  // odd: without conflicts
  const int32_t first_cell = min(cells, static_cast<int32_t>(threadIdx.x) * cells_per_thread);
  const int32_t end_cell = min(cells, first_cell + cells_per_thread);
  int32_t of_thread = 0, total;
  for (int32_t i = first_cell; i < end_cell; ++i) of_thread += bins[i];
  int32_t start = exclusive_scan<kMergeThreads / 32>(of_thread, total);
  for (int32_t i = first_cell; i < end_cell; ++i) {
    const int32_t count = bins[i];
    bins[i] = start;
    start += count;
  }
  __syncthreads();
  for_points(0, kPointsPerThread, [&](int i, int32_t, int32_t) {
    if (entries[i] != kOutside) entries[i] += bins[entries[i] >> kNumberAt];
  });
  __syncthreads();
  for_points(0, kPointsPerThread, [&](int i, int32_t query, int32_t) {
    if (entries[i] == kOutside) return;
    Corners<float> corners;
    corners.right = right[i];
    corners.down = down[i];
    sorted.weights[entries[i] & kPlace] = weigh_corners(corners, weight[i]);
    sorted.entries[entries[i] & kPlace] = (entries[i] & ~kPlace) | query;
  });
  // Pads the points to a multiple of kAhead with points that have no corner inside.
  if (threadIdx.x < kAhead) {
    sorted.weights[total + threadIdx.x] = {};
    sorted.entries[total + threadIdx.x] = 0;
  }
  __syncthreads();
  wait_for_previous_kernel();  // and so for the one before, which clears the sums

  // ------------------------------------------------------------------- added
  const int32_t own_channel = channel_block * kTeamChannels + threadIdx.x % kLanes * kVec;
  const bool has_channel = own_channel < p.channels;
  const int32_t channel = has_channel ? own_channel : 0;  // loads, but adds nothing
  const int32_t cell_mask = has_channel ? ~kPlace : ~kPlace & ~(kWest | kEast);
  const scalar_t* grad_output = opaque(static_cast<const scalar_t*>(p.grad_output) +
                                       (first_row * p.heads + head) * p.channels + channel);
  float* of_corner[4];  // in grad_value, for the cell with number 0
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t pixel =
        batch * p.spatial_size + level.start - (j & 1 ? 0 : 1) - (j & 2 ? 0 : level.width);
    of_corner[j] =
        opaque(static_cast<float*>(p.grad_value) + (pixel * p.heads + head) * p.channels + channel);
  }

  // Each team adds up an equal run of the sorted points.
  const int of_team = ceil_div(total, kTeams * kAhead) * kAhead;
  const int begin = min(static_cast<int>(threadIdx.x) / kLanes * of_team, total);
  const int end = min(begin + of_team, total);
  if (begin >= end) return;
  int32_t cell = sorted.entries[begin] & cell_mask;
  CornerSums<kVec> sums;
  // Adds what the cell has on its western corners, and on its eastern ones.
  const auto flush = [&](bool eastern) {
    const int32_t offset = Indexing::offset(p, cell >> kNumberAt);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float* to = Indexing::at(p, of_corner[j], offset);
      const bool inside = cell & (1 << (kPlaceBits + j));
      if (inside && (eastern || !(j & 1))) atomic_add<kVec>(to, sums.of[j]);
    }
  };
  for (int i = begin; i < end; i += kAhead) {
    const int4 next_entries = reinterpret_cast<const int4&>(sorted.entries[i]);
    const int32_t next_entry[kAhead] = {next_entries.x, next_entries.y, next_entries.z,
                                        next_entries.w};
    Vector rows[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      rows[k] =
          Vector::load(Indexing::at(p, grad_output, Indexing::offset(p, next_entry[k] & kPlace)));
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const PerCorner<float> weights = sorted.weights[i + k];
      const int32_t next = next_entry[k] & cell_mask;
      if (next != cell) {
        // The eastern corners are the next cell's western ones, if that is in the same row.
        const bool adjacent = next - cell == 1 << kNumberAt && (cell & kWest) && (cell & kEast);
        flush(!adjacent);
        sums.move(adjacent);
        cell = next;
      }
      sums.add(weights, rows[k]);
    }
  }
  flush(true);
}

// The shares of points of a batch and a team's channels, as many as if each level had the most.
int64_t count_shares(const BackwardParams& p) {
  const int64_t most_queries = kMergePoints / (max_level_points(p) / p.queries);
  return ceil_div<int64_t>(p.queries, most_queries) * p.levels * p.heads;
}

// The kernel for a problem, and its teams' channels.
struct MergeLaunch {
  void (*kernel)(BackwardParams, int64_t, const Softmax<float>*);
  int32_t team_channels;
};

MergeLaunch choose_kernel(const BackwardParams& p) {
  MergeLaunch result;
  with_types<false>(p, [&](auto zero, auto source) {
    with_lanes<kMostLanes / 2, kMostLanes>(p.channels / kVec, [&](auto lanes) {
      result = {merge_kernel<decltype(zero), source.value, lanes.value>, lanes.value * kVec};
    });
  });
  return result;
}

}  // namespace

// ----------------------------------------------------------------------------------------- entries

bool can_merge(const BackwardParams& params) {
  const int64_t points = max_level_points(params);
  const int64_t elements =
      std::max(params.spatial_size, params.queries) * params.heads * params.channels;
  // Offsets of cells count up to twice the pixels.
  const bool suits = params.channels % kVec == 0 && params.channels > kMostLanes / 4 * kVec &&
                     2 * elements / kVec <= INT32_MAX && points <= kMergePoints * params.queries;
  // points_kernel must not split the points of a row.
  const bool many = count_rows(params) > kFewRows;
  // Where pixels have fewer than two points on average, or a block has few, little is merged: of
  // rfdetr_decoder_b8 51 becomes 68 us (H200). Blocks that do not fill the GPU take too long.
  const bool pays =
      points >= kMergePoints / 2 && params.queries * params.points >= 2 * params.spatial_size;
  return suits && many && pays &&
         params.batch * count_shares(params) >= DeviceLimits().multiprocessors &&
         fits_shared_memory(choose_kernel(params).kernel, sizeof(SortedPoints));
}

void launch_merge(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  const MergeLaunch chosen = choose_kernel(params);
  const int64_t blocks = count_shares(params) * ceil_div(params.channels, chosen.team_channels);
  const Grid grid{blocks, 1, kMergeThreads, sizeof(SortedPoints), plan.overlaps_sums};
  launch(chosen.kernel, params, grid, stream,
         in_scratch<const Softmax<float>>(params, plan.scratch.softmaxes));
}

}  // namespace ms_deform_attn::cuda
