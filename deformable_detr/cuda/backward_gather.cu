// Strategy::gather: the gradient of value, each pixel summed by one team and written once.
//
// A block owns a slice of a level (backward_slices.cuh) for a (batch, head). It finds the points
// that touch the slice, weighs their corners, sorts them by cell, and then each team adds up the
// points of the four cells around a pixel and stores the sum. So the sums have a fixed order,
// grad_value needs neither clearing nor atomics, and in a half type no float copy. The price is
// that each block looks through all points of its level (or through those of the chunks of queries
// that reach its slice, see backward_reach.cuh). So it is for deterministic gradients, for float64,
// and for few queries on large maps.
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/backward_reach.cuh"
#include "deformable_detr/cuda/backward_slices.cuh"
#include "deformable_detr/cuda/block_scan.cuh"
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {
namespace {

constexpr int kLookAhead = 4;  // groups of 32 points that a warp reads before it tests them

// What a block is doing: its phases, in the order of their declaration.
template <typename scalar_t, Source kSource, int kVec, int kLanes>
struct GatherBlock {
  using acc = acc_t<scalar_t>;
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  using Point = PointReader<scalar_t, kSource>;
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  using Memory = GatherMemory<acc, LevelEntry>;
  static constexpr int kVectorSize = kVec;
  static constexpr int kTeamChannels = kLanes * kVec;
  static constexpr int kTeams = kGatherThreads / kLanes;

  // The slice at hand.
  struct Slice {
    Rectangle pixels;
    RowOfPixel row_of_pixel;
    int32_t level_index;
    const LevelEntry& level;
    int32_t level_points;  // of a row
    int32_t total;         // points of the level, over all queries
    Point first_point;
    Divisor by_points;
  };

  // Where a warp is in its search for points, which are counted query by query, in groups of 32.
  // Without a table of reaches, warp w tests groups w, w + kGatherWarps and so on. With one, it
  // takes chunks w, w + kGatherWarps and so on, and in each that touches the slice it tests all
  // groups.
  struct Search {
    const Reach* reaches;  // of the level's chunks, or null
    int32_t step;          // between groups
    int32_t chunk;         // the next one to test
    int32_t next, end;     // points of the present chunk, or of the level

    __device__ __forceinline__ bool more(const Slicing& slicing) const {
      return next < end || chunk < slicing.reach_chunks;
    }
  };

  const BackwardParams& p;
  const Slicing& slicing;
  const Memory& shared;
  const Softmax<acc>* softmaxes;
  int64_t batch;
  int32_t head, channel;        // of this lane
  scalar_t* grad_value;         // of pixel 0
  const scalar_t* grad_output;  // of query 0

  // Blocks side by side have the same slice, of other heads and channels.
  __device__ __forceinline__ GatherBlock(const BackwardParams& p, const Slicing& slicing,
                                         const Memory& shared, const Softmax<acc>* softmaxes,
                                         int64_t first_batch)
      : p(p), slicing(slicing), shared(shared), softmaxes(softmaxes) {
    const int32_t channel_blocks = ceil_div(p.channels, kTeamChannels);
    const int32_t index = blockIdx.x % (p.heads * channel_blocks);
    batch = first_batch + blockIdx.z;
    head = index / channel_blocks;
    channel = index % channel_blocks * kTeamChannels + threadIdx.x % kLanes * kVec;
    grad_value = opaque(static_cast<scalar_t*>(p.grad_value) +
                        (batch * p.spatial_size * p.heads + head) * p.channels + channel);
    grad_output = opaque(static_cast<const scalar_t*>(p.grad_output) +
                         (batch * p.queries * p.heads + head) * p.channels + channel);
  }

  static __device__ __forceinline__ int32_t slice_blocks(const Params& p) {
    return p.heads * ceil_div(p.channels, kTeamChannels);
  }
  __device__ __forceinline__ bool has_channel() const { return channel < p.channels; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int team() { return threadIdx.x / kLanes; }
  __device__ __forceinline__ int32_t* warp_candidates() const {
    return shared.candidates + warp() * slicing.candidates;
  }

  // ------------------------------------------------------------------------------------- zero

  // Zeroes pixels that belong to no level.
  __device__ __forceinline__ void zero_uncovered() const {
    for (int64_t i = team(); i < p.spatial_size; i += kTeams) {
      const int32_t pixel = static_cast<int32_t>(i);
      bool in_a_level = false;
      for (int32_t l = 0; l < p.levels; ++l) {
        const Level& level = shared.levels[l];
        in_a_level |= level.has_pixel(pixel);
      }
      if (!in_a_level && has_channel()) {
        Vector{}.store(Indexing::at(p, grad_value, Indexing::offset(p, pixel)));
      }
    }
  }

  // ------------------------------------------------------------------------------------- find

  // Moves `point` to the one with this index in the level, and returns its query.
  __device__ __forceinline__ int32_t seek(const Slice& slice, int32_t index, Point& point) const {
    const int32_t query = slice.by_points.divide(index);
    point = slice.first_point;
    point.skip_queries(p, query);
    point.skip(p, index - query * slice.level_points);
    return query;
  }

  __device__ __forceinline__ bool may_touch(const Slice& slice, const MayTouch<acc>& may_touch_x,
                                            const MayTouch<acc>& may_touch_y,
                                            const Point& point) const {
    const Xy<acc> xy = point.xy(p);
    if constexpr (!kIsFused<kSource>) {
      return may_touch_x(xy.x, p.method) & may_touch_y(xy.y, p.method);
    } else {
      const Reference<acc> reference = point.reference(p, slice.level_index);
      const bool box = p.reference_coordinates == 4;
      const acc x = box ? reference.width * slice.level.units.x.rounded : 1;
      const acc y = box ? reference.height * slice.level.units.y.rounded : 1;
      return may_touch_x(reference.x, xy.x * x, p.method) &
             may_touch_y(reference.y, xy.y * y, p.method);
    }
  }

  // On to the next chunk of queries that reaches the slice. Returns false if there may be none in
  // the 32 chunks that were tested, or none at all.
  __device__ __forceinline__ bool next_chunk(const Slice& slice, Search& search) const {
    bool touches = false;
    const int32_t of_lane = search.chunk + lane() * kGatherWarps;
    if (of_lane < slicing.reach_chunks) touches = search.reaches[of_lane].touches(slice.pixels);
    const unsigned touching = __ballot_sync(0xffffffff, touches);
    search.chunk += kGatherWarps * (touching ? __ffs(touching) - 1 : 32);
    if (!touching || search.chunk >= slicing.reach_chunks) return false;
    // Counted in queries first, so that no product exceeds `total`.
    search.next = search.chunk * kReachQueries * slice.level_points;
    const int64_t end_query = int64_t(search.chunk + 1) * kReachQueries;
    search.end = static_cast<int32_t>(min(p.queries, end_query)) * slice.level_points;
    search.chunk += kGatherWarps;
    return true;
  }

  // Notes which of the warp's points may touch the slice, as many as there is room for, and returns
  // how many.
  __device__ __forceinline__ int find(const Slice& slice, Search& search) const {
    int32_t* candidates = warp_candidates();
    const MayTouch<acc> may_touch_x(slice.pixels.column, slice.pixels.width, slice.level.width);
    const MayTouch<acc> may_touch_y(slice.pixels.row, slice.pixels.height, slice.level.height);
    int count = 0;
    for (bool full = false; !full;) {
      if (search.next >= search.end) {
        const bool found = next_chunk(slice, search);
        if (search.chunk >= slicing.reach_chunks && !found) break;
        if (!found) continue;
      }
      const int32_t index = search.next + lane();
      Point point[kLookAhead];
#pragma unroll
      for (int i = 0; i < kLookAhead; ++i) {
        if (index + i * search.step < search.end) {
          seek(slice, index + i * search.step, point[i]);
          point[i].read_xy(p);
        }
      }
#pragma unroll
      for (int i = 0; i < kLookAhead; ++i) {
        const bool touches = index + i * search.step < search.end &&
                             may_touch(slice, may_touch_x, may_touch_y, point[i]);
        const unsigned touching = __ballot_sync(0xffffffff, touches);
        full |= count + __popc(touching) > slicing.candidates;
        if (full) continue;
        if (touches) {
          candidates[count + __popc(touching & ((1u << lane()) - 1))] = index + i * search.step;
        }
        count += __popc(touching);
        search.next += search.step;
      }
    }
    return count;
  }

  // ------------------------------------------------------------------------------------ weigh

  // Replaces the warp's candidates by their cells, weighs their corners, and counts how many lie in
  // each cell. Two counts of 16 bits share a word; neither overflows, see kMaxHeld.
  __device__ __forceinline__ void weigh(const Slice& slice, int count) const {
    int32_t* candidates = warp_candidates();
    uint32_t* cell_counts = reinterpret_cast<uint32_t*>(shared.warp_cells) + warp() * pitch();
    for (int32_t i = lane(); i < words(slice); i += 32) cell_counts[i] = 0;
    __syncwarp();
    for (int32_t i = lane(); i < count; i += 32) {
      Point point;
      const int32_t query = seek(slice, candidates[i], point);
      point.read(p);
      Softmax<acc> softmax;
      if constexpr (kIsFused<kSource>) {
        softmax = softmaxes[(batch * p.queries + query) * p.heads + head];
      }
      const Position<acc> at = find_position(p, point, slice.level_index, slice.level);
      const int32_t cell = slice.pixels.index_of(find_cell(at, slice.level, p.method));
      candidates[i] = cell;
      if (cell == kOutside) continue;
      atomicAdd(cell_counts + cell / 2, cell & 1 ? 1u << 16 : 1u);
      const acc weight = find_weight(p, point, softmax);
      const acc right = at.x.fraction, down = at.y.fraction;
      const int slot = warp() * slicing.candidates + i;
      shared.weights[slot] =
          p.method == Method::nearest
              ? PerCorner<acc>{weight, 0, 0, 0}
              : PerCorner<acc>{weight * ((1 - right) * (1 - down)), weight * (right * (1 - down)),
                               weight * ((1 - right) * down), weight * (right * down)};
      shared.query_offsets[slot] = Indexing::offset(p, query);
    }
  }
  // Words that hold the counts of a warp's cells, and their distance from warp to warp.
  static __device__ __forceinline__ int32_t words(const Slice& slice) {
    return (slice.pixels.cells() + 1) / 2;
  }
  __device__ __forceinline__ int32_t pitch() const { return Memory::cells(slicing) / 2; }

  // ------------------------------------------------------------------------------------- sort

  // A counting sort of the block's points by cell: an exclusive scan over cells, and in each cell
  // over warps, then each warp puts its points in their places. Returns how many points there are.
  __device__ __forceinline__ int32_t sort(const Slice& slice, int count) const {
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared.warp_cells);
    const int32_t pitch = this->pitch(), words = this->words(slice);
    const int32_t per_thread = ceil_div(words, kGatherThreads);
    const int32_t first_word = min(static_cast<int32_t>(threadIdx.x) * per_thread, words);
    const int32_t last_word = min(first_word + per_thread, words);
    const auto sum_warps = [&](int32_t word) {
      uint32_t sum = 0;
#pragma unroll
      for (int w = 0; w < kGatherWarps; ++w) sum += counts[w * pitch + word];
      return sum;
    };
    int32_t of_thread = 0;
    for (int32_t word = first_word; word < last_word; ++word) {
      const uint32_t both = sum_warps(word);
      of_thread += (both & 0xffff) + (both >> 16);
    }
    int32_t total;
    uint32_t start = exclusive_scan<kGatherWarps>(of_thread, total);
    for (int32_t word = first_word; word < last_word; ++word) {
      const uint32_t both = sum_warps(word);
      uint32_t at = start | (start + (both & 0xffff)) << 16;
      reinterpret_cast<uint32_t*>(shared.cell_starts)[word] = at;
      start += (both & 0xffff) + (both >> 16);
#pragma unroll
      for (int w = 0; w < kGatherWarps; ++w) {
        const uint32_t of_warp = counts[w * pitch + word];
        counts[w * pitch + word] = at;
        at += of_warp;
      }
    }
    if (threadIdx.x == 0) shared.cell_starts[2 * words] = static_cast<uint16_t>(total);
    __syncthreads();

    const int32_t* candidates = warp_candidates();
    uint16_t* next = shared.warp_cells + warp() * 2 * pitch;
    for (int32_t i = lane(); i - lane() < count; i += 32) {
      const int32_t cell = i < count ? candidates[i] : kOutside;
      const unsigned peers = __match_any_sync(0xffffffff, cell);
      const int rank = __popc(peers & ((1u << lane()) - 1));
      int32_t at = 0;
      if (cell != kOutside) at = next[cell] + rank;
      __syncwarp();
      if (cell != kOutside) {
        if (rank == 0) next[cell] = static_cast<uint16_t>(at + __popc(peers));
        shared.order[at] = static_cast<uint16_t>(warp() * slicing.candidates + i);
      }
      __syncwarp();
    }
    return total;
  }

  // -------------------------------------------------------------------------------------- add

  // Adds to `sum` what every stride-th point, from `first` on, gives to a pixel of the slice.
  // kAtOnce: rows of grad_output loaded before they are used.
  template <int kAtOnce>
  __device__ __forceinline__ void add(const Slice& slice, int32_t pixel, int first, int stride,
                                      acc (&sum)[kVec]) const {
    const bool bilinear = p.method == Method::bilinear;
    const uint16_t* north = shared.cell_starts + pixel + slice.row_of_pixel(pixel);
    const uint16_t* south = north + slice.pixels.width + 1;
    // The points of the two cells to the north, then those of the two to the south; in each pair,
    // those to the west come first.
    const int32_t north_begin = north[0], north_middle = north[1];
    const int32_t south_middle = south[1], south_begin = bilinear ? south[0] : south_middle;
    const int32_t to_north = bilinear ? north[2] - north_begin : 0;
    const int32_t of_pixel = to_north + south[2] - south_begin;
    for (int32_t i = first; i < of_pixel; i += kAtOnce * stride) {
      Vector loaded[kAtOnce];
      acc weight[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t index = i + k * stride;
        weight[k] = 0;
        if (index < of_pixel) {
          const bool is_north = index < to_north;
          const int32_t at = index + (is_north ? north_begin : south_begin - to_north);
          const bool is_west = at < (is_north ? north_middle : south_middle);
          const int slot = shared.order[at];
          weight[k] = shared.weights[slot].corner[(is_north ? 2 : 0) + (is_west ? 1 : 0)];
          if (has_channel()) {
            loaded[k] = Vector::load(Indexing::at(p, grad_output, shared.query_offsets[slot]));
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        acc x[kVec];
        loaded[k].unpack(x);
#pragma unroll
        for (int c = 0; c < kVec; ++c) sum[c] += weight[k] * x[c];
      }
    }
  }
  // With at least half a point a pixel, four rows at once hide the latency of their loads: one at a
  // time takes 10% longer on hub_b8_q900, and 57% on a deterministic ddetr_encoder_b1 in fp32. With
  // fewer points, most of the four would have none, and take 4% longer on ddetr_decoder_b4 in fp16.
  __device__ __forceinline__ void add(const Slice& slice, int32_t total, int32_t pixel, int first,
                                      int stride, acc (&sum)[kVec]) const {
    if (2 * total >= slice.pixels.pixels()) {
      add<4>(slice, pixel, first, stride, sum);
    } else {
      add<1>(slice, pixel, first, stride, sum);
    }
  }

  // ------------------------------------------------------------------------------------ store

  static __device__ __forceinline__ int32_t index_in_value(const Slice& slice, int32_t pixel) {
    const int32_t row = slice.row_of_pixel(pixel), column = pixel - row * slice.pixels.width;
    return slice.level.start + (slice.pixels.row + row) * slice.level.width + slice.pixels.column +
           column;
  }
  __device__ __forceinline__ void store(int32_t in_value, const acc (&sum)[kVec]) const {
    if (has_channel()) {
      Vector::pack(sum).store(Indexing::at(p, grad_value, Indexing::offset(p, in_value)));
    }
  }

  // What a point gives to one of its corners.
  __device__ __forceinline__ void add_corner(const Point& point, const Corners<acc>& corners, int j,
                                             int64_t row, int32_t query, acc (&sum)[kVec]) const {
    Softmax<acc> softmax;
    if constexpr (kIsFused<kSource>) softmax = softmaxes[row];
    const acc weight = find_weight(p, point, softmax) * corners.corner_weight(j);
    if (!has_channel()) return;
    acc x[kVec];
    Vector::load(Indexing::at(p, grad_output, Indexing::offset(p, query))).unpack(x);
#pragma unroll
    for (int c = 0; c < kVec; ++c) sum[c] += weight * x[c];
  }
  // A pixel's sum in shared memory, of a `replica` of those that several teams share.
  __device__ __forceinline__ acc* kept_sum(int32_t pixel_of_replica) const {
    return shared.sums + pixel_of_replica * kTeamChannels + threadIdx.x % kLanes * kVec;
  }
};

// Sums the levels that overlap others. No model has such levels, but metadata on a GPU cannot be
// refused. The first level that has a pixel sums the points of all levels that have it: each team
// tests each of those points for each of its pixels, without sorting. Not inlined, called at the
// kernel's end and without a pointer to what the kernel keeps in registers; otherwise the kernel is
// 1.04 to 1.7 times slower (H100, 2026-11-28).
template <typename Block>
__device__ __noinline__ void sum_overlapping(const BackwardParams& p, const Slicing& slicing,
                                             const Softmax<typename Block::acc>* softmaxes,
                                             int64_t first_batch) {
  using acc = typename Block::acc;
  extern __shared__ __align__(32) char memory[];
  const typename Block::Memory shared(memory, slicing, Block::kTeams, Block::kTeamChannels,
                                      p.levels);
  const Block block(p, slicing, shared, softmaxes, first_batch);
  const int32_t first_pixel = blockIdx.x / Block::slice_blocks(p) * Block::kTeams + Block::team();
  const int32_t step = gridDim.x / Block::slice_blocks(p) * Block::kTeams;
  for (int64_t i = first_pixel; i < p.spatial_size; i += step) {
    const int32_t pixel = static_cast<int32_t>(i);
    int32_t first = 0;
    while (first < p.levels && !shared.levels[first].has_pixel(pixel)) ++first;
    if (first == p.levels || !shared.slices[first].overlaps) continue;
    acc sum[Block::kVectorSize] = {};
    for (int32_t l = first; l < p.levels; ++l) {
      const auto& level = shared.levels[l];
      for (int32_t query = 0; query < p.queries && level.has_pixel(pixel); ++query) {
        const int64_t query_index = block.batch * p.queries + query;
        const int64_t row = query_index * p.heads + block.head;
        typename Block::Point point;
        point.seek(p, row, query_index, shared.slices[l].first_point);
        for (int32_t k = 0; k < points_of_level(p, l); ++k) {
          point.read(p);
          const Corners<acc> corners = find_corners(p, point, l, level);
          for (int j = 0; j < 4; ++j) {
            if (corners.pixel[j] == pixel) block.add_corner(point, corners, j, row, query, sum);
          }
          point.skip(p, 1);
        }
      }
    }
    block.store(pixel, sum);
  }
}

template <typename scalar_t, Source kSource, int kVec, int kLanes>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    gather_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch,
                  const __grid_constant__ Slicing slicing,
                  const Softmax<acc_t<scalar_t>>* softmaxes, const Reach* reaches) {
  using Block = GatherBlock<scalar_t, kSource, kVec, kLanes>;
  using acc = typename Block::acc;
  using LevelEntry = typename Block::LevelEntry;
  constexpr int kTeams = Block::kTeams;
  extern __shared__ __align__(32) char memory[];
  __shared__ SliceCursor cursor;
  const typename Block::Memory shared(memory, slicing, kTeams, Block::kTeamChannels, p.levels);
  LevelLoader<LevelEntry> level_loader;
  level_loader.load(p);
  level_loader.store(p, shared.levels);
  const bool filled = levels_fill_value(p, shared.levels);
  for (int32_t l = threadIdx.x; l < p.levels; l += kGatherThreads) {
    shared.slices[l] = cut_level(p, slicing, shared.levels, l, !filled);
  }

  const Block block(p, slicing, shared, softmaxes, first_batch);
  const int32_t slice_blocks = Block::slice_blocks(p);
  const int64_t batch = block.batch;
  const int32_t head = block.head;
  const int team = Block::team();

  if (!filled && blockIdx.x < slice_blocks) block.zero_uncovered();

  int64_t slice_index = blockIdx.x / slice_blocks;
  __syncthreads();
  if (threadIdx.x == 0) cursor.seek(p, shared.levels, shared.slices, slice_index);
  __syncthreads();
  while (cursor.level < p.levels) {
    // Copied, as the cursor may move on before all threads are done with this slice.
    const int32_t own = cursor.level;
    const int32_t level_points = points_of_level(p, own);
    typename Block::Slice slice{cursor.pixels,
                                cursor.row_of_pixel,
                                own,
                                shared.levels[own],
                                level_points,
                                static_cast<int32_t>(p.queries * level_points),
                                {},
                                shared.slices[own].by_points};
    slice.first_point.seek(p, batch * p.queries * p.heads + head, batch * p.queries,
                           shared.slices[own].first_point);
    typename Block::Search search;
    search.reaches =
        reaches ? reaches + reach_index(p, slicing.reach_chunks, batch, head, own) : nullptr;
    search.step = reaches ? 32 : kGatherThreads;
    search.chunk = reaches ? Block::warp() : slicing.reach_chunks;
    search.next = reaches ? 0 : Block::warp() * 32;
    search.end = reaches ? 0 : slice.total;

    const int32_t pixels = slice.pixels.pixels();
    // Where pixels are few, `replicas` teams share one. With one each, deterministic backwards take
    // up to 53% longer (seed_b1_q300 fp16), and hub_b8_q900 fp16 10% (H100, 2026-11-28).
    const int replicas = max(1, min(kTeams / pixels, 32));
    bool more, halved, at_once;
    for (bool first_round = true;; first_round = false) {
      const int count = block.find(slice, search);
      more = __syncthreads_or(search.more(slicing));
      halved = first_round && more && pixels > slicing.sum_pixels;
      if (threadIdx.x == 0 && first_round) {
        if (halved) {
          cursor.halve();
        } else if (!cursor.advance()) {
          slice_index += gridDim.x / slice_blocks;
          cursor.seek(p, shared.levels, shared.slices, slice_index);
        }
      }
      if (halved) break;
      block.weigh(slice, count);
      __syncthreads();
      const int32_t total = block.sort(slice, count);
      __syncthreads();

      // Each team adds up its pixels. Where that is all, it stores them at once.
      at_once = first_round && !more && replicas == 1;
      if (at_once) {
        for (int32_t pixel = team; pixel < pixels; pixel += kTeams) {
          acc sum[kVec] = {};
          block.add(slice, total, pixel, 0, 1, sum);
          block.store(Block::index_in_value(slice, pixel), sum);
        }
      } else {
        for (int32_t i = team; i < pixels * replicas; i += kTeams) {
          const int32_t replica = i / pixels, pixel = i - replica * pixels;
          acc sum[kVec] = {};
          block.add(slice, total, pixel, replica, replicas, sum);
          acc* kept = block.kept_sum(i);
#pragma unroll
          for (int c = 0; c < kVec; ++c) kept[c] = first_round ? sum[c] : kept[c] + sum[c];
        }
      }
      __syncthreads();
      if (!more) break;
    }

    if (!halved && !at_once) {
      for (int32_t pixel = team; pixel < pixels; pixel += kTeams) {
        acc sum[kVec] = {};
        for (int replica = 0; replica < replicas; ++replica) {
          const acc* kept = block.kept_sum(replica * pixels + pixel);
#pragma unroll
          for (int c = 0; c < kVec; ++c) sum[c] += kept[c];
        }
        block.store(Block::index_in_value(slice, pixel), sum);
      }
    }
    __syncthreads();
  }
  if (!filled) sum_overlapping<Block>(p, slicing, softmaxes, first_batch);
  wait_for_previous_kernel();
}

// ---------------------------------------------------------------------------------------- launcher

// with_block<scalar_t>(p, [&](auto vec, auto lanes) { ... }): the kernel's vectors and lanes.
template <typename scalar_t, typename Function>
auto with_block(const BackwardParams& p, Function&& function) {
  return with_vectors<scalar_t, 16 / sizeof(scalar_t)>(p, function);
}

// With room for the levels of either source.
template <typename scalar_t>
using PlannedMemory = GatherMemory<acc_t<scalar_t>, FusedLevel<acc_t<scalar_t>>>;

}  // namespace

// ----------------------------------------------------------------------------------------- entries

void plan_gather(const BackwardParams& params, BackwardPlan& plan) {
  // Points are counted in 32 bits, a little beyond the last one.
  constexpr int64_t kMostPoints = INT32_MAX - kLookAhead * kGatherThreads;
  const int64_t points = max_level_points(params);
  if (points > kMostPoints) {
    throw std::runtime_error("the call has " + std::to_string(points) +
                             " points in a level, over all queries of a head, expected at most " +
                             std::to_string(kMostPoints) + " where gradients repeat");
  }
  const int32_t chunks = count_reach_chunks(params);
  if (chunks > 0) {
    const int64_t levels = params.batch * params.heads * params.levels;
    plan.scratch.reaches = plan.scratch.reserve(levels * chunks * sizeof(Reach));
  }
  const DeviceLimits limits;
  // In a fused call gather_kernel needs the softmaxes of points_kernel.
  plan.overlaps_points = plan.runs_points_kernel && limits.overlaps_kernels && !params.fused();
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    with_block<scalar_t>(params, [&](auto vec, auto lanes) {
      plan.slicing = choose_slicing<PlannedMemory<scalar_t>, acc_t<scalar_t>>(
          params, limits, kGatherThreads / lanes.value, lanes.value * vec.value, chunks);
    });
  });
}

void launch_reach(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  dispatch(params.value_dtype,
           [&](auto zero) { launch_reach_kernel<decltype(zero)>(params, plan, stream); });
}

void launch_gather(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    with_block<scalar_t>(params, [&](auto vec, auto lanes) {
      constexpr int kTeams = kGatherThreads / lanes.value;
      constexpr int kTeamChannels = lanes.value * vec.value;
      const int64_t slice_blocks = int64_t(params.heads) * ceil_div(params.channels, kTeamChannels);
      const int64_t slices =
          std::min(estimate_slices(params, plan.slicing), INT32_MAX / slice_blocks);
      const int64_t bytes =
          PlannedMemory<scalar_t>::bytes(plan.slicing, kTeams, kTeamChannels, params.levels);
      with_source<scalar_t>(params, [&](auto source) {
        const Grid grid{slices * slice_blocks, 1, kGatherThreads, bytes, plan.overlaps_points};
        launch(gather_kernel<scalar_t, source.value, vec.value, lanes.value>, params, grid, stream,
               plan.slicing,
               in_scratch<const Softmax<acc_t<scalar_t>>>(params, plan.scratch.softmaxes),
               in_scratch<const Reach>(params, plan.scratch.reaches));
      });
    });
  });
}

}  // namespace ms_deform_attn::cuda
