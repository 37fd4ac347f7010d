// What a block of gather_kernel does with a slice, a function for each phase: it finds the points
// that may touch the slice, weighs their corners, sorts them by cell, adds up each pixel's and
// stores the sums. backward_gather.cu calls the phases in turn, and says why there is a gather.
#pragma once

#include "deformable_detr/cuda/backward_reach.cuh"
#include "deformable_detr/cuda/backward_slices.cuh"
#include "deformable_detr/cuda/block_scan.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {

constexpr int kLookAhead = 4;  // groups of 32 points that a warp reads before it tests them

template <typename scalar_t, Source kSource, int kVec, int kLanes>
struct GatherBlock {
  using acc = acc_t<scalar_t>;
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  using Point = PointReader<scalar_t, kSource>;
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  using Sum = acc[kVec];  // of a lane's channels
  static constexpr bool kFused = kIsFused<kSource>;
  static constexpr int kTeamChannels = kLanes * kVec;
  static constexpr int kTeams = kGatherThreads / kLanes;
  using Memory = GatherMemory<acc, LevelEntry, kTeams, kTeamChannels>;

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
                                         const Memory& shared, const void* softmaxes,
                                         int64_t first_batch)
      : p(p),
        slicing(slicing),
        shared(shared),
        softmaxes(static_cast<const Softmax<acc>*>(softmaxes)) {
    batch = first_batch + blockIdx.z;
    head = blockIdx.x % p.heads;
    channel = blockIdx.x / p.heads * kTeamChannels + threadIdx.x % kLanes * kVec;
    grad_value = opaque(static_cast<scalar_t*>(p.grad_value) +
                        (batch * p.spatial_size * p.heads + head) * p.channels + channel);
    grad_output = opaque(static_cast<const scalar_t*>(p.grad_output) +
                         (batch * p.queries * p.heads + head) * p.channels + channel);
  }

  // Of a batch, on each slice.
  static int64_t slice_blocks(const Params& p) {
    return p.heads * ceil_div(p.channels, kTeamChannels);
  }
  __device__ __forceinline__ bool has_channel() const { return channel < p.channels; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int team() { return threadIdx.x / kLanes; }
  __device__ __forceinline__ int32_t* warp_candidates() const {
    return shared.candidates + warp() * slicing.candidates;
  }

  __device__ __forceinline__ Slice slice_at(const SliceCursor& cursor) const {
    const LevelSlices& slices = shared.slices[cursor.level];
    const int32_t level_points = points_of_level(p, cursor.level);
    Slice slice{cursor.pixels,
                cursor.row_of_pixel,
                cursor.level,
                shared.levels[cursor.level],
                level_points,
                static_cast<int32_t>(p.queries * level_points),
                {},
                slices.by_points};
    slice.first_point.seek(p, batch * p.queries * p.heads + head, batch * p.queries,
                           slices.first_point);
    return slice;
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
      if (!in_a_level) store(pixel, Sum{});
    }
  }

  // ------------------------------------------------------------------------------------- find

  __device__ __forceinline__ Search start_search(const Slice& slice, const Reach* reaches) const {
    if (!reaches) return {nullptr, kGatherThreads, slicing.reach_chunks, warp() * 32, slice.total};
    reaches += reach_index(p, slicing.reach_chunks, batch, head, slice.level_index);
    return {reaches, 32, warp(), 0, 0};
  }

  // Moves `point` to the one with this index in the level, and returns its query.
  __device__ __forceinline__ int32_t seek(const Slice& slice, int32_t index, Point& point) const {
    const int32_t query = slice.by_points.divide(index);
    point = slice.first_point;
    point.skip_queries(p, query);
    point.skip(p, index - query * slice.level_points);
    return query;
  }

  // reference: of a fused call.
  __device__ __forceinline__ bool may_touch(const Slice& slice, const MayTouch<acc>& may_touch_x,
                                            const MayTouch<acc>& may_touch_y, const Point& point,
                                            const Reference<acc>& reference) const {
    const Xy<acc> xy = point.xy(p);
    if constexpr (!kFused) {
      return may_touch_x(xy.x, p.method) & may_touch_y(xy.y, p.method);
    } else {
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
      // Reference points are read ahead, too: in float it saves up to 10% of the time (H100).
      Point point[kLookAhead];
      Reference<acc> reference[kLookAhead];
#pragma unroll
      for (int i = 0; i < kLookAhead; ++i) {
        if (index + i * search.step < search.end) {
          seek(slice, index + i * search.step, point[i]);
          point[i].read_xy(p);
          if constexpr (kFused) reference[i] = point[i].reference(p, slice.level_index);
        }
      }
#pragma unroll
      for (int i = 0; i < kLookAhead; ++i) {
        const bool touches = index + i * search.step < search.end &&
                             may_touch(slice, may_touch_x, may_touch_y, point[i], reference[i]);
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
    if (threadIdx.x < kCountBins) shared.count_bins[threadIdx.x] = 0;
    __syncwarp();
    for (int32_t i = lane(); i < count; i += 32) {
      Point point;
      const int32_t query = seek(slice, candidates[i], point);
      point.read(p);
      Softmax<acc> softmax;
      if constexpr (kFused) {
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
  // over warps, then each warp puts its points in their places.
  __device__ __forceinline__ void sort(const Slice& slice, int count) const {
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
  }

  // The points that touch a pixel of the slice: those of the two cells to the north, then those of
  // the two to the south; in each pair, those to the west come first.
  struct PixelPoints {
    int32_t north_begin, north_middle, south_begin, south_middle;  // in shared.order
    int32_t to_north, count;

    __device__ __forceinline__ PixelPoints(const GatherBlock& block, const Slice& slice,
                                           int32_t pixel) {
      const bool bilinear = block.p.method == Method::bilinear;
      const uint16_t* north = block.shared.cell_starts + pixel + slice.row_of_pixel(pixel);
      const uint16_t* south = north + slice.pixels.width + 1;
      north_begin = north[0];
      north_middle = north[1];
      south_middle = south[1];
      south_begin = bilinear ? south[0] : south_middle;
      to_north = bilinear ? north[2] - north_begin : 0;
      count = to_north + south[2] - south_begin;
    }
  };

  // ------------------------------------------------------------------------------------ order

  // The teams of a warp wait for the one whose pixel has the most points. So the block takes its
  // pixels in the order of how many they have, the most first. Returns how many have any. Where
  // points are few this takes 4 to 7% less time: rtdetr_decoder_b16 fp16 126 to 119 us (H100).
  __device__ __forceinline__ int32_t order_pixels(const Slice& slice) const {
    constexpr int kPixels = kMaxSlicePixels / kGatherThreads;  // of a thread
    int bin[kPixels], rank[kPixels];
    const auto each_pixel = [&](auto function) {
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        function(k, static_cast<int32_t>(threadIdx.x + k * kGatherThreads));
      }
    };
    const int32_t pixels = slice.pixels.pixels();
    each_pixel([&](int k, int32_t pixel) {
      bin[k] = 0;
      if (pixel >= pixels) return;
      bin[k] = max(0, kCountBins - 1 - PixelPoints(*this, slice, pixel).count);
      rank[k] = atomicAdd(shared.count_bins + bin[k], 1);
    });
    __syncthreads();
    const int32_t in_bin = shared.count_bins[lane()];
    const int32_t start = inclusive_warp_scan(in_bin) - in_bin;
    each_pixel([&](int k, int32_t pixel) {
      const int32_t first = __shfl_sync(0xffffffff, start, bin[k]);
      if (pixel < pixels) pixel_order()[first + rank[k]] = static_cast<uint16_t>(pixel);
    });
    return __shfl_sync(0xffffffff, start, kCountBins - 1);
  }
  // Where warp_cells was, which is no longer needed once the points are sorted.
  __device__ __forceinline__ uint16_t* pixel_order() const { return shared.warp_cells; }

  // -------------------------------------------------------------------------------------- add

  // Adds to `sum` what every stride-th point, from `first` on, gives to a pixel of the slice. Four
  // rows of grad_output at once hide the latency of their loads: one at a time takes 10% longer on
  // hub_b8_q900, and 57% on a deterministic ddetr_encoder_b1 in fp32.
  __device__ __forceinline__ void add(const Slice& slice, int32_t pixel, int first, int stride,
                                      Sum& sum) const {
    constexpr int kAtOnce = 4;
    const PixelPoints points(*this, slice, pixel);
    for (int32_t i = first; i < points.count; i += kAtOnce * stride) {
      Vector loaded[kAtOnce];
      acc weight[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t index = i + k * stride;
        weight[k] = 0;
        if (index >= points.count) continue;
        const bool is_north = index < points.to_north;
        const int32_t at =
            index + (is_north ? points.north_begin : points.south_begin - points.to_north);
        const bool is_west = at < (is_north ? points.north_middle : points.south_middle);
        const int slot = shared.order[at];
        weight[k] = shared.weights[slot].corner[(is_north ? 2 : 0) + (is_west ? 1 : 0)];
        if (has_channel()) {
          loaded[k] = Vector::load(Indexing::at(p, grad_output, shared.query_offsets[slot]));
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        loaded[k].add_to(sum, weight[k]);
      }
    }
  }

  // ------------------------------------------------------------------------------------ store

  static __device__ __forceinline__ int32_t index_in_value(const Slice& slice, int32_t pixel) {
    const int32_t row = slice.row_of_pixel(pixel), column = pixel - row * slice.pixels.width;
    return slice.level.start + (slice.pixels.row + row) * slice.level.width + slice.pixels.column +
           column;
  }
  __device__ __forceinline__ void store(int32_t in_value, const Sum& sum) const {
    if (has_channel()) {
      Vector::pack(sum).store(Indexing::at(p, grad_value, Indexing::offset(p, in_value)));
    }
  }

  // Adds what a query's point of this weight gives to a pixel.
  __device__ __forceinline__ void add_row(int32_t query, acc weight, Sum& sum) const {
    if (has_channel()) {
      Vector::load(Indexing::at(p, grad_output, Indexing::offset(p, query))).add_to(sum, weight);
    }
  }
  // A pixel's sum in shared memory, of a `replica` of those that several teams share.
  __device__ __forceinline__ acc* kept_sum(int32_t pixel_of_replica) const {
    return shared.sums + pixel_of_replica * kTeamChannels + threadIdx.x % kLanes * kVec;
  }
};

}  // namespace ms_deform_attn::cuda
