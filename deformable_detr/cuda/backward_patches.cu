// Strategy::patches: the gradient of value for problems whose queries are the pixels, in half
// types, on tensor cores.
//
// A patch is 8 x 2 pixels, and the 7 cells (squares between four pixels) among them. A block takes
// the queries of all levels in a region of the image, as those sample about the same part of each
// level, and sorts their points of one level by patch. A warp then takes some of the sorted points,
// 16 at a time: the gradient of the patch's pixels is the product of the points' shares (corner
// weight * attention weight), pixels x points, and their rows of grad_output, points x channels.
// Patches are sorted column after column, so that what a patch's southern row got is the next one's
// northern row, and a pixel is added to memory about once for all the block's points near it.
//
// Points that meet too few others are added to memory one by one, so that this is no slower where
// points lie anywhere. Sums are in any order.
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/block_scan.cuh"
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/matrix.cuh"
#include "deformable_detr/cuda/query_regions.cuh"
#include "deformable_detr/cuda/softmax.cuh"
#include "deformable_detr/cuda/window_points.cuh"

namespace ms_deform_attn::cuda {
namespace {

constexpr int kPatchThreads = 384;
constexpr int kPatchBlocks = 2;  // that share a multiprocessor
constexpr int kPatchWarps = kPatchThreads / 32;
constexpr int kStagePoints = 4;  // of each query, in a level, sorted at a time
constexpr int kOwnPoints = 5;    // of a thread, in a stage
constexpr int kPoints = kPatchThreads * kOwnPoints;
constexpr int kQueries = kPoints / kStagePoints;  // of a block, at a time
constexpr int kThreadQueries = kPatchThreads / kStagePoints;
constexpr int kPatchChannels = 32;  // of a block
constexpr int kPieceChannels = 8;   // 16 bytes
constexpr int kPieces = kPatchChannels / kPieceChannels;
constexpr int kCells = 7;        // of a patch
constexpr float kMiddle = 3.5f;  // of a patch's columns
constexpr int kThreadBins = 4;   // a bin counts the points of a patch, or of some in a large level
constexpr int kBins = kPatchThreads * kThreadBins;
constexpr int kStep = 16;       // points that are multiplied at once
constexpr int kFewPoints = 2;   // of a patch, that are added one by one
constexpr int kMinPoints = 2;   // of a patch on average, or all are added so
constexpr int kPatchCost = 40;  // what a patch costs beside its points, as points

// ----------------------------------------------------------------------------------------- product

// Rows of grad_output in shared memory, and their product with shares.
//
// In mma's layout a lane is g = lane / 4, t = lane % 4. It has the shares of the pixels g of both
// rows, for points 4 * t to 4 * t + 3, and gets the sums of these pixels: of channels 4 * t to 4 *
// t + 3 and of the same plus 16, for which the channels of a row are put in another order.
template <typename scalar_t>
struct Product {
  using Shares = cuda::Shares<scalar_t>;
  static constexpr int kPitch = 80;  // bytes of a row; many rows lie in different banks
  // Shares are scaled, so that what rounding them to fp16 leaves is in its range, too.
  static constexpr float kScale = Shares::kIsHalf ? 1024 : 1;
  static constexpr float kLargest = Shares::kIsHalf ? 60.f : 3e38f;  // attention weight

  static __device__ __forceinline__ void store_piece(uint32_t row, int piece, const uint4& x) {
    const uint32_t to = row + piece / 2 * 32 + piece % 2 * 8;
    store_shared(to, x.x);
    store_shared(to + 4, x.z);
    store_shared(to + 16, x.y);
    store_shared(to + 20, x.w);
  }
  // Channels 4 * i to 4 * i + 3.
  static __device__ __forceinline__ void load_four(uint32_t row, int i, float (&x)[4]) {
    const uint32_t from = row + i / 4 * 32 + i % 4 * 4;
    const float2 first = to_acc_pair(load_shared_word(from), scalar_t{});
    const float2 second = to_acc_pair(load_shared_word(from + 16), scalar_t{});
    x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
  }

  float sums[4][4] = {};

  // north, south: shares of this lane's points. offsets: of all 16 points' rows, from `rows` on.
  __device__ __forceinline__ void add(const float (&north)[4], const float (&south)[4],
                                      uint32_t rows, const uint16_t* offsets) {
    const int lane = threadIdx.x % 32;
    const int point = lane % 8 / 2 * 4 + lane % 2 + lane / 8 % 2 * 2;
    const uint32_t row = rows + offsets[point] + lane / 16 * 16;
    uint32_t b[2][4];
    load_matrices(b[0], row);
    load_matrices(b[1], row + 32);
    uint32_t a[4], rest[4];
    const auto split = [&](int i, float x, float y) {
      a[i] = Shares::pack(x, y);
      const float2 had = to_acc_pair(a[i], scalar_t{});
      rest[i] = Shares::pack(x - had.x, y - had.y);
    };
    split(0, north[0], north[1]);
    split(1, south[0], south[1]);
    split(2, north[2], north[3]);
    split(3, south[2], south[3]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      multiply_add<scalar_t>(sums[j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      multiply_add<scalar_t>(sums[j], rest, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
  // Ends the sums of the northern row: of this lane's 8 channels. The southern ones become the next
  // patch's northern ones.
  __device__ __forceinline__ void take(float (&of_channels)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      of_channels[i / 4][i % 4] = sums[i / 2][i % 2] * (1 / kScale);
      sums[i / 2][i % 2] = sums[i / 2][i % 2 + 2];
      sums[i / 2][i % 2 + 2] = 0;
    }
  }
};

// ------------------------------------------------------------------------------------------ memory

// Points that are sorted at a time.
struct PointStage {
  int32_t level;
  int32_t first;        // in the level
  int32_t first_point;  // of the level
  int32_t bins;         // 0 and 1 in turn
};

struct PatchMemory {
  // Sorted points, and as many more as a multiplication may read beyond the last.
  alignas(16) float x[kPoints + kStep];      // from the patch's middle
  alignas(16) float north[kPoints + kStep];  // weight * share of the patch's northern row
  alignas(16) float south[kPoints + kStep];
  alignas(16) uint16_t rows[kPoints + kStep];  // of grad_output, in bytes from the first
  alignas(128) char grad_output[kQueries * Product<half_t>::kPitch];
  // Counts of points, then where they start; of this stage, and of the next.
  alignas(16) int32_t bins[2][kBins];
  int32_t owners[kBins];          // the patch of a bin, in a level with more patches than bins
  uint32_t patches[kPoints + 2];  // that have points: the bin, and where its points start
  PointStage stage;
  int32_t count, first_query;  // of the region's queries; of those that are here
  bool any_not_finite;
  int32_t queries[kQueries];
  bool finite[kQueries];  // a query's row of grad_output
};

// ------------------------------------------------------------------------------------------- point

// Where a point's cell is, and how far in it the point.
struct CellPoint {
  int32_t column, row;  // of the northwestern pixel; may be -1
  float right, down;
  bool touches;  // a pixel
};

// The position of a point, in pixels. Of operands in a half type one rounding to float does no
// harm: the gradient of value is continuous.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ Position<float> find_rounded_position(
    const Params& p, const PointReader<scalar_t, kSource>& point, int32_t level_index,
    const LevelEntry<scalar_t, kSource>& level) {
  if constexpr (sizeof(scalar_t) == 2 && !kIsMixed<kSource>) {
    const Xy<float> xy = point.xy(p);
    const float width = level.width, height = level.height;
    float x, y;
    if constexpr (kIsFused<kSource>) {
      const Reference<float> reference = point.reference(p, level_index);
      x = xy.x, y = xy.y;
      if (p.reference_coordinates == 4) {
        x *= reference.width * level.units.x.rounded;
        y *= reference.height * level.units.y.rounded;
      }
      x = fmaf(reference.x, width, x - 0.5f);
      y = fmaf(reference.y, height, y - 0.5f);
    } else {
      x = fmaf(xy.x, width, -0.5f);
      y = fmaf(xy.y, height, -0.5f);
    }
    Position<float> position{Coordinate<float>({0, 0}), Coordinate<float>({0, 0})};
    position.x.floor = floorf(x);
    position.x.fraction = x - position.x.floor;
    position.y.floor = floorf(y);
    position.y.fraction = y - position.y.floor;
    return position;
  } else {
    return find_position(p, point, level_index, level);
  }
}

template <typename scalar_t, Source kSource>
__device__ __forceinline__ CellPoint find_cell(const Params& p,
                                               const PointReader<scalar_t, kSource>& reader,
                                               int32_t level_index,
                                               const LevelEntry<scalar_t, kSource>& level) {
  const auto position = find_rounded_position<scalar_t, kSource>(p, reader, level_index, level);
  CellPoint point;
  point.touches = position.x.touches(level.width) && position.y.touches(level.height);
  point.column = static_cast<int32_t>(point.touches ? position.x.floor : 0);
  point.row = static_cast<int32_t>(point.touches ? position.y.floor : 0);
  point.right = position.x.fraction;
  point.down = position.y.fraction;
  return point;
}

// A point, worked out anew.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ CellPoint read_cell(const Params& p, int64_t query_index, int32_t head,
                                               int32_t point, int32_t level_index,
                                               const LevelEntry<scalar_t, kSource>& level,
                                               const Softmax<float>* softmaxes, float& weight) {
  const int64_t row = query_index * p.heads + head;
  PointReader<scalar_t, kSource> reader;
  reader.seek(p, row, query_index, point);
  reader.read(p);
  Softmax<float> softmax;
  if constexpr (kIsFused<kSource>) softmax = softmaxes[row];
  weight = find_weight(p, reader, softmax);
  return find_cell<scalar_t, kSource>(p, reader, level_index, level);
}

// What a warp adds for one point: a lane has a corner and 4 channels. Only channels of pieces that
// are finite, or that are not: the other ones are left to others.
template <typename scalar_t>
__device__ __forceinline__ void add_point(const BackwardParams& p, const CellPoint& point,
                                          float weight, int64_t batch, int64_t query_index,
                                          int32_t head, int32_t channel, const Level& level,
                                          bool adds_finite) {
  const int lane = threadIdx.x % 32, corner = lane / 8;
  channel += lane % 8 * 4;
  const int32_t column = point.column + (corner & 1), row = point.row + (corner >> 1);
  if (!is_inside(column, level.width) || !is_inside(row, level.height) || channel >= p.channels) {
    return;
  }
  const scalar_t* const grad_output = static_cast<const scalar_t*>(p.grad_output) +
                                      (query_index * p.heads + head) * p.channels + channel;
  using Piece = Vec<scalar_t, kPieceChannels>;
  float piece[kPieceChannels], finite = 0;
  Piece::load(grad_output - lane % 2 * 4).unpack(piece);
#pragma unroll
  for (int c = 0; c < kPieceChannels; ++c) finite += piece[c] * 0;
  if ((finite == 0) != adds_finite) return;
  const float share = weight * ((corner & 1 ? point.right : 1 - point.right) *
                                (corner & 2 ? point.down : 1 - point.down));
  float add[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) add[c] = share * (lane % 2 ? piece[c + 4] : piece[c]);
  const int64_t pixel = batch * p.spatial_size + level.start + row * level.width + column;
  atomic_add<4>(static_cast<float*>(p.grad_value) + (pixel * p.heads + head) * p.channels + channel,
                add);
}

// Adds points of a warp one by one. Bit i of a lane's `alone` stands for its point of
// own_query[i * kThreadQueries].
template <typename scalar_t, Source kSource>
__device__ __noinline__ void add_alone(const BackwardParams& p, unsigned alone, int64_t batch,
                                       int32_t head, int32_t channel, int32_t level_index,
                                       const LevelEntry<scalar_t, kSource>& level, int32_t point,
                                       const int32_t* own_query, const Softmax<float>* softmaxes) {
#pragma unroll 1
  for (int i = 0; i < kOwnPoints; ++i) {
    unsigned lanes = __ballot_sync(kAllLanes, alone >> i & 1);
    if (lanes == 0) continue;
    const int64_t own_index = batch * p.queries + own_query[i * kThreadQueries];
    float own_weight;
    const CellPoint own = read_cell<scalar_t, kSource>(p, own_index, head, point, level_index,
                                                       level, softmaxes, own_weight);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int from = __ffs(lanes) - 1;
      const CellPoint of{
          __shfl_sync(kAllLanes, own.column, from), __shfl_sync(kAllLanes, own.row, from),
          __shfl_sync(kAllLanes, own.right, from), __shfl_sync(kAllLanes, own.down, from), true};
      add_point<scalar_t>(p, of, __shfl_sync(kAllLanes, own_weight, from), batch,
                          __shfl_sync(kAllLanes, own_index, from), head, channel, level, true);
    }
  }
}

// Adds what was left out of the product: pieces of rows of grad_output that are not finite, of
// which a share of zero would make NaN.
template <typename scalar_t, Source kSource>
__device__ __noinline__ void add_not_finite(const BackwardParams& p,
                                            const LevelEntry<scalar_t, kSource>* levels,
                                            int64_t batch, int32_t head, int32_t channel,
                                            const int32_t* queries, const bool* finite,
                                            int32_t n_queries, const Softmax<float>* softmaxes) {
  for (int32_t i = threadIdx.x / 32; i < n_queries; i += kPatchWarps) {
    if (finite[i]) continue;
    const int64_t query_index = batch * p.queries + queries[i];
    PointCursor cursor(p, 0);
    for (int32_t point = 0; point < p.points; ++point, cursor.advance(p, 1)) {
      const LevelEntry<scalar_t, kSource>& level = levels[cursor.level];
      float weight;
      const CellPoint cell = read_cell<scalar_t, kSource>(p, query_index, head, point, cursor.level,
                                                          level, softmaxes, weight);
      if (!cell.touches) continue;
      add_point<scalar_t>(p, cell, weight, batch, query_index, head, channel, level, false);
    }
  }
}

// ------------------------------------------------------------------------------------------ kernel

// Adds to memory if active, without a branch.
__device__ __forceinline__ void atomic_add_if(float* to, const float (&x)[4], bool active) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %5, 0; @q red.global.add.v4.f32 [%0], {%1, %2, %3, %4};}" ::
          "l"(to),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(static_cast<int>(active))
      : "memory");
#else
  if (active) atomic_add<4>(to, x);
#endif
}

// The first pixel's column and row of a patch. per_row: 1 / bin_rows, rounded.
__device__ __forceinline__ int2 find_patch(int32_t patch, float per_row, int32_t bin_rows) {
  int32_t column = static_cast<int32_t>(patch * per_row), row = patch - column * bin_rows;
  if (row < 0) --column, row += bin_rows;
  if (row >= bin_rows) ++column, row -= bin_rows;
  return make_int2(column * kCells - 1, row - 1);
}

// Where a warp's part of the sorted points begins: the patch among those that have points, and the
// point. By the whole warp.
__device__ __forceinline__ int2 find_part(const uint32_t* patches, int32_t n_points,
                                          int32_t n_patches, int of_warp) {
  const auto start_of = [&](int32_t i) { return static_cast<int32_t>(patches[i] & 0xffff); };
  const int32_t wanted = (n_points + n_patches * kPatchCost) * of_warp / kPatchWarps;
  int32_t at = 0;
  for (int32_t span = n_patches + 1; span > 1;) {
    const int32_t step = (span + 31) / 32, own = static_cast<int32_t>(threadIdx.x % 32) * step;
    const bool before = own < span && start_of(at + own) + (at + own) * kPatchCost <= wanted;
    const int32_t skipped = (__popc(__ballot_sync(kAllLanes, before)) - 1) * step;
    at += skipped;
    span = min(step, span - skipped);
  }
  const int32_t points = (wanted - start_of(at) - (at + 1) * kPatchCost) / kStep * kStep;
  return make_int2(at, start_of(at) + max(points, 0));
}

// Adds a point whose shares are worked out: a lane has a corner and 4 channels.
template <typename Product>
__device__ __forceinline__ void add_sorted_point(const Params& p, int32_t column, int32_t row,
                                                 float right, float north, float south,
                                                 uint32_t grad_output, const Level& level,
                                                 float* grad_value, int32_t channel,
                                                 int32_t pitch) {
  const int lane = threadIdx.x % 32, corner = lane / 8, of = lane % 8 * 4;
  const int32_t x = column + (corner & 1), y = row + (corner >> 1);
  const float share =
      (corner & 1 ? right : 1 - right) * (corner & 2 ? south : north) * (1 / Product::kScale);
  float add[4];
  Product::load_four(grad_output, lane % 8, add);
#pragma unroll
  for (int c = 0; c < 4; ++c) add[c] *= share;
  const bool inside = is_inside(x, level.width) && is_inside(y, level.height);
  atomic_add_if(grad_value + int64_t(level.start + y * level.width + x) * pitch + of, add,
                inside && channel + of < p.channels);
}

template <typename scalar_t, Source kSource>
__global__ void __launch_bounds__(kPatchThreads, kPatchBlocks)
    patches_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch, int32_t regions,
                   const Softmax<float>* softmaxes) {
#if __CUDA_ARCH__ >= 800 || defined(MSDA_EMULATED)
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  using Product = cuda::Product<scalar_t>;
  extern __shared__ __align__(128) char memory[];
  PatchMemory& shared = *reinterpret_cast<PatchMemory*>(memory);
  LevelEntry* const levels = reinterpret_cast<LevelEntry*>(memory + sizeof(PatchMemory));
  QueryPart* const parts = reinterpret_cast<QueryPart*>(levels + p.levels);

  LevelLoader<LevelEntry> level_loader;
  level_loader.load(p);
  level_loader.store(p, levels);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t channel_blocks = ceil_div(p.channels, kPatchChannels);
  const int32_t head_and_channels = blockIdx.x / regions;
  const int32_t region = blockIdx.x - head_and_channels * regions;
  const int32_t head = head_and_channels / channel_blocks;
  const int32_t channel = head_and_channels % channel_blocks * kPatchChannels;
  const int64_t batch = first_batch + blockIdx.z;
  const int32_t pitch = p.heads * p.channels;
  float* const grad_value = opaque(static_cast<float*>(p.grad_value) +
                                   batch * p.spatial_size * pitch + head * p.channels + channel);
  const uint32_t rows_at = shared_address(shared.grad_output);
  if (warp == 0) {
    const int32_t across = choose_across(p, levels, regions, kQueries);
    const int32_t down = regions / across;
    int32_t count = 0;
    if (region < across * down) count = find_parts(p, levels, across, down, region, parts);
    if (lane == 0) {
      shared.count = count;
      shared.first_query = 0;
    }
  }
  for (int i = threadIdx.x; i < 2 * kBins / 4; i += kPatchThreads) {
    reinterpret_cast<int4*>(shared.bins)[i] = make_int4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < kPoints + kStep; i += kPatchThreads) shared.rows[i] = 0;
  __syncthreads();

  if (threadIdx.x == 0) shared.stage.bins = 0;
  while (true) {  // once, where the region's queries fit
    const int32_t n_queries = min(kQueries, shared.count - shared.first_query);
    if (n_queries <= 0) break;
    for (int i = threadIdx.x; i < kQueries; i += kPatchThreads) {
      shared.queries[i] = i < n_queries ? query_of_parts(p, parts, shared.first_query + i) : 0;
      shared.finite[i] = true;
    }
    if (threadIdx.x == 0) {
      shared.any_not_finite = false;
      shared.stage = {0, 0, 0, shared.stage.bins};
    }
    __syncthreads();
    {
      using Piece = Vec<scalar_t, kPieceChannels>;
      constexpr int kThreadRows = kPatchThreads / kPieces, kOwnPieces = kQueries / kThreadRows;
      const int piece = threadIdx.x % kPieces, own_row = threadIdx.x / kPieces;
      const scalar_t* const grad_output = static_cast<const scalar_t*>(p.grad_output) +
                                          batch * p.queries * pitch + head * p.channels + channel +
                                          piece * kPieceChannels;
      const bool has_piece = channel + piece * kPieceChannels < p.channels;
      Piece pieces[kOwnPieces];
#pragma unroll
      for (int i = 0; i < kOwnPieces; ++i) {
        const int row = own_row + i * kThreadRows;
        if (has_piece && row < n_queries) {
          pieces[i] = Piece::load(grad_output + int64_t(shared.queries[row]) * pitch);
        }
      }
#pragma unroll
      for (int i = 0; i < kOwnPieces; ++i) {
        const int row = own_row + i * kThreadRows;
        float of[kPieceChannels], finite = 0;
        pieces[i].unpack(of);
#pragma unroll
        for (int c = 0; c < kPieceChannels; ++c) finite += of[c] * 0;
        if (finite != 0) {  // NaN
          shared.finite[row] = false;
          shared.any_not_finite = true;
          pieces[i] = Piece{};
        }
        Product::store_piece(rows_at + row * Product::kPitch, piece, pieces[i].bits);
      }
    }

    // A thread's points: of every kThreadQueries-th query.
    const int own_query = threadIdx.x / kStagePoints, own_point = threadIdx.x % kStagePoints;
    while (true) {
      // Kept in shared memory, as there are no registers left.
      const PointStage stage = shared.stage;
      if (stage.level == p.levels) break;
      const LevelEntry level = levels[stage.level];
      const int32_t level_points = points_of_level(p, stage.level);
      const int32_t bin_rows = level.height + 2;  // one free, so that columns do not meet
      const int64_t all_bins = int64_t(ceil_div(level.width + 1, kCells)) * bin_rows;
      const bool shares_bins = all_bins > kBins;
      const int32_t n_bins = shares_bins ? kBins : static_cast<int32_t>(all_bins);
      int32_t* const bins = shared.bins[stage.bins];
      if (shares_bins) {
        __syncthreads();
        for (int i = threadIdx.x; i < kBins; i += kPatchThreads) shared.owners[i] = -1;
        __syncthreads();
      }
      // Each thread works out some points, and counts those of each bin.
      const bool has_points = stage.first + own_point < level_points;
      const int32_t point = stage.first_point + min(stage.first + own_point, level_points - 1);
      PointReader<scalar_t, kSource> readers[kOwnPoints];
      Softmax<float> softmax[kOwnPoints];
      readers[0].seek(p, batch * p.queries * p.heads + head, batch * p.queries, point);
#pragma unroll
      for (int i = kOwnPoints - 1; i >= 0; --i) {
        const int32_t query = shared.queries[own_query + i * kThreadQueries];
        readers[i] = readers[0];
        readers[i].skip_few_bytes(p, query);
        readers[i].read(p);
        if constexpr (kIsFused<kSource>) {
          softmax[i] = softmaxes[(batch * p.queries + query) * p.heads + head];
        }
      }
      float xs[kOwnPoints], norths[kOwnPoints], souths[kOwnPoints];
      int32_t place[kOwnPoints];  // the patch; of what is sorted the bin, and the rank in it
      // A bit for each point: those that are sorted, those that are not, and those whose weight
      // would not do for the product.
      unsigned sorted = 0, unsorted = 0, irregular = 0;
#pragma unroll
      for (int i = 0; i < kOwnPoints; ++i) {
        const float weight = find_weight(p, readers[i], softmax[i]);
        const CellPoint cell = find_cell<scalar_t, kSource>(p, readers[i], stage.level, level);
        const uint32_t column = cell.column + 1;
        const uint32_t patch_column = __umulhi(column, 0x24924925);  // column / kCells
        place[i] = patch_column * bin_rows + (cell.row + 1);
        if (cell.touches && has_points && own_query + i * kThreadQueries < n_queries) {
          (fabsf(weight) <= Product::kLargest ? sorted : irregular) |= 1u << i;
        }
        xs[i] =
            (static_cast<float>(static_cast<int32_t>(column - patch_column * kCells)) - kMiddle) +
            cell.right;
        const float scaled = weight * Product::kScale;
        souths[i] = scaled * cell.down;
        norths[i] = scaled - souths[i];
      }
      if (shares_bins) {
        // The first patch has the bin.
#pragma unroll
        for (int i = 0; i < kOwnPoints; ++i) {
          if (!(sorted >> i & 1)) continue;
          const int32_t bin = static_cast<uint32_t>(place[i]) % kBins;
          const int32_t owner = atomicCAS(shared.owners + bin, -1, place[i]);
          const bool owns = owner == -1 || owner == place[i];
          place[i] = owns ? bin : place[i];
          unsorted |= owns ? 0 : 1u << i;
        }
        sorted &= ~unsorted;
      }
      int32_t rank[kOwnPoints] = {};
#pragma unroll
      for (int i = 0; i < kOwnPoints; ++i) {
        if (sorted >> i & 1) rank[i] = atomicAdd(bins + place[i], 1);
      }
#pragma unroll
      for (int i = 0; i < kOwnPoints; ++i) {
        place[i] = sorted >> i & 1 ? place[i] << 16 | rank[i] : place[i];
      }
      __syncthreads();

      // A counting sort.
      const int32_t first_bin = threadIdx.x * kThreadBins;
      int32_t counts[kThreadBins], points_and_patches = 0;
      if (first_bin < n_bins) {
#pragma unroll
        for (int i = 0; i < kThreadBins; i += 4) {
          reinterpret_cast<int4&>(counts[i]) = *reinterpret_cast<const int4*>(bins + first_bin + i);
        }
#pragma unroll
        for (int i = 0; i < kThreadBins; ++i) {
          points_and_patches += counts[i] + (counts[i] > 0 ? 1 << 16 : 0);
        }
      }
      int32_t totals;
      const int32_t before = exclusive_scan<kPatchWarps>(points_and_patches, totals);
      const int32_t n_points = totals & 0xffff, n_patches = totals >> 16;
      if (points_and_patches > 0) {
        int32_t start = before & 0xffff, patch = before >> 16;
#pragma unroll
        for (int i = 0; i < kThreadBins; ++i) {
          const int32_t count = counts[i];
          counts[i] = start;
          if (count > 0) shared.patches[patch++] = (first_bin + i) << 16 | start;
          start += count;
        }
#pragma unroll
        for (int i = 0; i < kThreadBins; i += 4) {
          *reinterpret_cast<int4*>(bins + first_bin + i) = reinterpret_cast<const int4&>(counts[i]);
        }
      }
      if (threadIdx.x == 0) {
        shared.patches[n_patches] = shared.patches[n_patches + 1] = n_points;
        const bool level_ends = stage.first + kStagePoints >= level_points;
        shared.stage = {stage.level + level_ends, level_ends ? 0 : stage.first + kStagePoints,
                        stage.first_point + (level_ends ? level_points : 0), 1 - stage.bins};
      }
      __syncthreads();
      const bool sparse = n_points < n_patches * kMinPoints;
#pragma unroll
      for (int i = 0; i < kOwnPoints; ++i) {
        if (!(sorted >> i & 1)) continue;
        const int32_t bin = place[i] >> 16;
        if (sparse) {
          place[i] = shares_bins ? shared.owners[bin] : bin;
          continue;
        }
        const int32_t to = bins[bin] + (place[i] & 0xffff);
        shared.x[to] = xs[i];
        shared.north[to] = norths[i];
        shared.south[to] = souths[i];
        shared.rows[to] = static_cast<uint16_t>((own_query + i * kThreadQueries) * Product::kPitch);
      }
      if (sparse) unsorted |= sorted;
      if (threadIdx.x < kStep) {
        shared.x[n_points + threadIdx.x] = 0;
        shared.north[n_points + threadIdx.x] = shared.south[n_points + threadIdx.x] = 0;
      }
      // A warp's part of the sorted points costs as much as the others'.
      const auto part = [&](int of_warp) {
        return find_part(shared.patches, n_points, n_patches, of_warp);
      };
      const int2 first_part = part(warp), next_part = part(warp + 1);
      __syncthreads();
      float per_row = __fdividef(1, bin_rows);
#if defined(__CUDA_ARCH__)
      asm volatile("" : "+f"(per_row));  // so that it is not worked out at each use
#endif
      if (__any_sync(kAllLanes, unsorted != 0)) {
#pragma unroll
        for (int i = 0; i < kOwnPoints; ++i) {
          const unsigned lanes = __ballot_sync(kAllLanes, unsorted >> i & 1);
          const int2 patch = find_patch(place[i], per_row, bin_rows);
          const float from_column = xs[i] + kMiddle;
          const int32_t cell = static_cast<int32_t>(from_column);
          const CellPoint point{patch.x + cell, patch.y, from_column - cell, 0, true};
          const uint32_t rows = rows_at + (warp * 8 + i * kThreadQueries) * Product::kPitch;
#pragma unroll 1
          for (unsigned left = lanes; left != 0; left &= left - 1) {
            const int from = __ffs(left) - 1;
            const auto of = [&](auto x) { return __shfl_sync(kAllLanes, x, from); };
            add_sorted_point<Product>(
                p, of(point.column), of(point.row), of(point.right), of(norths[i]), of(souths[i]),
                rows + from / kStagePoints * Product::kPitch, level, grad_value, channel, pitch);
          }
        }
      }
      if (__any_sync(kAllLanes, irregular != 0)) {
        add_alone<scalar_t, kSource>(p, irregular, batch, head, channel, stage.level,
                                     levels[stage.level], point, shared.queries + own_query,
                                     softmaxes);
      }
      if (first_bin < n_bins) {
#pragma unroll
        for (int i = 0; i < kThreadBins; i += 4) {
          *reinterpret_cast<int4*>(bins + first_bin + i) = make_int4(0, 0, 0, 0);
        }
      }
      if (n_points == 0 || sparse) continue;

      // Each warp takes its part of the sorted points.
      int32_t index = first_part.x;  // of the patch
      const int32_t begin = first_part.y, end = next_part.y;
      if (begin == end) continue;
      const int g = lane / 4, t = lane % 4;
      const float own_column = g - kMiddle;
      const int32_t width = level.width, height = level.height;
      const int32_t channels_left = p.channels - channel - t * 4;
      float* const of_level = grad_value + int64_t(level.start) * pitch;
      const int64_t row_step = int64_t(width) * pitch;
      Product product;
      int32_t current = -1, column = 0, row = 0;  // of the patch that the sums are of
      int pending = 0;                            // its rows that have sums
      float* to = of_level;                       // the lane's pixel in the northern row
      bool has_column = false;                    // whether it has one
      uint32_t patch = shared.patches[index], next = shared.patches[index + 1];
      for (;; ++index) {
        const uint32_t after = shared.patches[min(index + 2, n_patches)];
        const int32_t start = max(static_cast<int32_t>(patch & 0xffff), begin);
        const bool ended = start >= end;
        int32_t key = -1;
        if (!ended) key = shares_bins ? shared.owners[patch >> 16] : patch >> 16;
        // What the patch before has got is added to memory, unless the next one's row gets more.
#pragma unroll 1
        for (; pending > 0 && current != key; --pending, ++current, ++row) {
          float sum[2][4];
          product.take(sum);
          const bool inside = has_column && is_inside(row, height);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t any = __float_as_uint(sum[i][0]) | __float_as_uint(sum[i][1]) |
                                 __float_as_uint(sum[i][2]) | __float_as_uint(sum[i][3]);
            atomic_add_if(to + i * 16, sum[i], inside && any != 0 && channels_left > i * 16);
          }
          to += row_step;
        }
        if (ended) break;
        if (pending == 0) {
          current = key;
          const int2 first = find_patch(key, per_row, bin_rows);
          column = first.x;
          row = first.y;
          has_column = is_inside(column + g, width);
          to = of_level + int64_t(row * width + column + g) * pitch + t * 4;
        }
        const int32_t stop = min(static_cast<int32_t>(next & 0xffff), end);
        const uint32_t count = stop - start;
        if (count <= kFewPoints) {
#pragma unroll 1
          for (int32_t i = start; i < stop; ++i) {
            const float from_column = shared.x[i] + kMiddle;
            const int32_t cell = static_cast<int32_t>(from_column);
            add_sorted_point<Product>(p, column + cell, row, from_column - cell, shared.north[i],
                                      shared.south[i], rows_at + shared.rows[i], level, grad_value,
                                      channel, pitch);
          }
        } else {
#pragma unroll 1
          for (int32_t i = start & ~3; i < stop; i += kStep) {
            const int32_t at = i + t * 4;
            const float4 x = *reinterpret_cast<const float4*>(shared.x + at);
            const float4 north = *reinterpret_cast<const float4*>(shared.north + at);
            const float4 south = *reinterpret_cast<const float4*>(shared.south + at);
            const float xs[4] = {x.x, x.y, x.z, x.w};
            const float norths[4] = {north.x, north.y, north.z, north.w};
            const float souths[4] = {south.x, south.y, south.z, south.w};
            float of_north[4], of_south[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const bool counts = static_cast<uint32_t>(at + k - start) < count;
              const float share = __saturatef(1 - fabsf((counts ? xs[k] : 1000.f) - own_column));
              of_north[k] = share * norths[k];
              of_south[k] = share * souths[k];
            }
            product.add(of_north, of_south, rows_at, shared.rows + i);
          }
          pending = 2;
        }
        patch = next;
        next = after;
      }
    }

    if (shared.any_not_finite) {
      add_not_finite<scalar_t, kSource>(p, levels, batch, head, channel, shared.queries,
                                        shared.finite, n_queries, softmaxes);
    }
    if (shared.count <= shared.first_query + kQueries) break;
    __syncthreads();
    if (threadIdx.x == 0) shared.first_query += kQueries;
    __syncthreads();
  }
#endif
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

// So many regions that a block holds their queries, and that the multiprocessors end at about the
// same time.
int32_t count_regions(const BackwardParams& p) {
  constexpr double kUsual = 0.95 * kQueries;  // as regions differ
  const int64_t slices = p.batch * p.heads * ceil_div(p.channels, kPatchChannels);
  const int64_t at_once = int64_t(DeviceLimits().multiprocessors) * kPatchBlocks;
  const int64_t least = static_cast<int64_t>(p.queries / kUsual) + 1;
  const int64_t turns = ceil_div(least * slices, at_once);
  const int64_t most = ceil_div<int64_t>(p.queries, kQueries / 4);
  return static_cast<int32_t>(std::clamp(turns * at_once / slices, least, std::max(least, most)));
}

template <typename scalar_t, Source kSource>
int64_t patch_bytes(const Params& p) {
  const int64_t of_level = sizeof(LevelEntry<scalar_t, kSource>) + sizeof(QueryPart);
  return sizeof(PatchMemory) + p.levels * of_level + sizeof(QueryPart);
}

bool can_patch(const BackwardParams& p) {
  constexpr int64_t kStatic = 1024 + 1024;  // a block's static memory, and what the system takes
  const int64_t query_bytes = int64_t(p.heads) * p.points * 2 * sizeof(float);
  const bool fits = is_half(p.value_dtype) && p.method == Method::bilinear &&
                    p.channels % kPieceChannels == 0 && count_rows(p) > kFewRows &&
                    p.spatial_size < (1 << 30) && query_bytes <= INT32_MAX;
  if (!fits) return false;
  const DeviceLimits limits;
  const int64_t bytes = patch_bytes<half_t, Source::fused>(p) + kStatic;  // no source needs more
  return limits.has_matrices && bytes <= limits.block_memory &&
         bytes * kPatchBlocks <= limits.multiprocessor_memory;
}

void launch_patches(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  const int32_t regions = count_regions(params);
  const int64_t blocks =
      int64_t(regions) * params.heads * ceil_div(params.channels, kPatchChannels);
  const auto with = [&](auto zero) {
    using scalar_t = decltype(zero);
    with_source<scalar_t>(params, [&](auto source) {
      const Grid grid{blocks, 1, kPatchThreads, patch_bytes<scalar_t, source.value>(params)};
      launch(patches_kernel<scalar_t, source.value>, params, grid, stream, regions,
             in_scratch<const Softmax<float>>(params, plan.scratch.softmaxes));
    });
  };
  params.value_dtype == DType::f16 ? with(half_t{}) : with(bfloat16_t{});
}

}  // namespace ms_deform_attn::cuda
