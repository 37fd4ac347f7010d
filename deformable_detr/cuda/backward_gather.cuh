// The gradient of value by gathering.
#pragma once

#include "deformable_detr/cuda/backward_points.cuh"
#include "deformable_detr/cuda/backward_reach.cuh"

namespace ms_deform_attn::cuda {

// ---------------------------------------------------------------------------------- gather: kernel

// Shared memory of a block, in this order. A point found is known by its slot.
template <typename acc, typename LevelType>
struct GatherMemory {
  PerCorner<acc>* shares;  // [slot], times the point's weight
  acc* sums;               // [pixel][row], of kept_pixels or one a team
  LevelType* levels;
  Slices* slices;    // [level]
  int32_t* queries;  // [slot], where the row of the point's query is
  int32_t* found;    // [slot], number in the level, then cell
  uint16_t* starts;  // [cell], of a cell's points in `order`; and where the last one's end
  uint16_t* places;  // [warp][cell], where the warp's next point of a cell goes
  uint16_t* order;   // slots, sorted by cell

  static __host__ __device__ int sum_rows(const Slicing& slicing, int teams) {
    return slicing.kept_pixels > teams ? slicing.kept_pixels : teams;
  }
  static int64_t bytes(const Slicing& slicing, int teams, int row, int32_t levels) {
    return int64_t(slicing.slots()) *
               (sizeof(PerCorner<acc>) + 2 * sizeof(int32_t) + sizeof(uint16_t)) +
           int64_t(sum_rows(slicing, teams)) * row * sizeof(acc) +
           levels * (sizeof(LevelType) + sizeof(Slices)) +
           int64_t((1 + kGatherWarps) * slicing.cells() + 2) * sizeof(uint16_t);
  }
  __device__ GatherMemory(char* memory, const Slicing& slicing, int teams, int row, int32_t n) {
    shares = reinterpret_cast<PerCorner<acc>*>(memory);
    sums = reinterpret_cast<acc*>(shares + slicing.slots());
    levels = reinterpret_cast<LevelType*>(sums + sum_rows(slicing, teams) * row);
    slices = reinterpret_cast<Slices*>(levels + n);
    queries = reinterpret_cast<int32_t*>(slices + n);
    found = queries + slicing.slots();
    starts = reinterpret_cast<uint16_t*>(found + slicing.slots());
    places = starts + slicing.cells() + 2;
    order = places + kGatherWarps * slicing.cells();
  }
};

// The sum of x over the block's threads before this one; `all` becomes that over all of them.
// Between two calls the block has to meet.
template <int kWarps>
__device__ __forceinline__ int32_t sum_before(int32_t x, int32_t& all) {
  __shared__ int32_t warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffff, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  all = 0;
  int32_t before = sum - x;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before += all;
    all += warp_sums[w];
  }
  return before;
}

template <typename scalar_t, Source kSource, int kVec, int kLanes>
__global__ void __launch_bounds__(kGatherThreads, 3)
    gather_kernel(const __grid_constant__ BackwardParams p, const Slicing slicing) {
  using acc = acc_t<scalar_t>;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  using Point = PointReader<scalar_t, kSource>;
  constexpr int kRow = kLanes * kVec;  // channels
  constexpr int kTeams = kGatherThreads / kLanes;
  extern __shared__ __align__(32) char memory[];
  __shared__ Part part;
  const GatherMemory<acc, LevelOf<scalar_t, kSource>> shared(memory, slicing, kTeams, kRow,
                                                             p.levels);
  LevelLoader<LevelOf<scalar_t, kSource>> level_loader;
  level_loader.load(p);
  level_loader.store(p, shared.levels);
  for (int32_t l = threadIdx.x; l < p.levels; l += kGatherThreads) {
    shared.slices[l] = slicing.cut(p, l, shared.levels[l]);
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = threadIdx.x / kLanes;
  const int32_t channel_parts = ceil_div(p.channels, kRow);
  const int32_t rows = p.heads * channel_parts;
  const int32_t head = blockIdx.x % rows / channel_parts;
  const int32_t channel = blockIdx.x % rows % channel_parts * kRow + threadIdx.x % kLanes * kVec;
  const bool has_channel = channel < p.channels;
  const int64_t batch = p.first_batch + blockIdx.z;
  scalar_t* grad_value = settled(static_cast<scalar_t*>(p.grad_value) +
                                 (batch * p.spatial_size * p.heads + head) * p.channels + channel);
  const scalar_t* grad_output =
      settled(static_cast<const scalar_t*>(p.grad_output) +
              (batch * p.queries * p.heads + head) * p.channels + channel);

  // The first block of a row clears the pixels of no level: none, if the levels lie side by side.
  if (blockIdx.x < rows) {
    int32_t covered = 0;
    for (int32_t l = 0; l < p.levels; ++l) {
      const Level& level = shared.levels[l];
      if (level.start == covered) covered += level.height * level.width;
    }
    for (int64_t i = team; covered != p.spatial_size && i < p.spatial_size; i += kTeams) {
      const int32_t pixel = static_cast<int32_t>(i);
      bool in_a_level = false;
      for (int32_t l = 0; l < p.levels; ++l) {
        const Level& level = shared.levels[l];
        in_a_level |= is_inside(pixel - level.start, level.height * level.width);
      }
      if (!in_a_level && has_channel) {
        Row{}.store(Rows::at(p, grad_value, Rows::offset(p, pixel)));
      }
    }
  }

  uint16_t* places = shared.places + warp * slicing.cells();
  int32_t* found = shared.found + warp * slicing.found;
  int64_t slice_index = blockIdx.x / rows;
  __syncthreads();
  if (threadIdx.x == 0) part.start(p, shared.levels, shared.slices, slice_index);
  __syncthreads();
  while (part.level < p.levels) {
    // Copied, as the next part may come before all threads are done with this one.
    const int32_t own = part.level;
    const Rectangle own_pixels = part.pixels;
    const RowOf row_of = part.row_of;
    const LevelOf<scalar_t, kSource>& level = shared.levels[own];
    const int32_t pixels = own_pixels.pixels(), cells = own_pixels.cells();
    const int32_t level_points = points_of_level(p, own);
    const int32_t total = static_cast<int32_t>(p.queries * level_points);
    Point first_point;
    first_point.start(p, batch * p.queries * p.heads + head, batch * p.queries,
                      shared.slices[own].first_point);
    const Divisor by_points = shared.slices[own].by_points;
    const auto find_point = [&](int32_t number, Point& point) {
      const int32_t query = by_points.divide(number);
      point = first_point;
      point.skip_queries(p, query);
      point.skip(p, number - query * level_points);
      return query;
    };

    // Each warp looks at groups of 32 points: every kGatherWarps-th one, or where it is known what
    // kReachQueries queries reach, all of those.
    const Reach* reaches = slicing.reach_chunks > 0 ? reaches_of(p, batch, head, own) : nullptr;
    const int32_t step = reaches ? 32 : kGatherThreads;
    int32_t chunk = reaches ? warp : slicing.reach_chunks;  // of queries, the next one
    int32_t next = reaches ? 0 : warp * 32, end = reaches ? 0 : total;
    const MayTouch<acc> may_touch_x(own_pixels.column, own_pixels.width, level.width);
    const MayTouch<acc> may_touch_y(own_pixels.row, own_pixels.height, level.height);
    const auto may_touch = [&](const Point& point) {
      const Location<acc> location = point.location(p);
      if constexpr (!kIsFused<kSource>) {
        return may_touch_x(location.x, p.method) & may_touch_y(location.y, p.method);
      } else {
        const Reference<acc> reference = point.reference(p, own);
        const bool box = p.reference_coordinates == 4;
        const acc x = box ? reference.width * level.units.x.rounded : 1;
        const acc y = box ? reference.height * level.units.y.rounded : 1;
        return may_touch_x(reference.x, location.x * x, p.method) &
               may_touch_y(reference.y, location.y * y, p.method);
      }
    };

    const auto store = [&](int32_t pixel, const acc(&sum)[kVec]) {
      const int32_t row = row_of(pixel), column = pixel - row * own_pixels.width;
      const int32_t in_value =
          level.start + (own_pixels.row + row) * level.width + own_pixels.column + column;
      if (has_channel) Row::pack(sum).store(Rows::at(p, grad_value, Rows::offset(p, in_value)));
    };

    // Where pixels are few, `copies` teams share one.
    const int copies = max(1, min(kTeams / pixels, 32));
    bool more, too_many, direct;
    for (bool first_round = true;; first_round = false) {
      // Each warp notes which of its points may be near, as many as there is room for.
      int near = 0;
      for (bool full = false; !full;) {
        if (next >= end) {
          bool reach = false;
          const int32_t of_lane = chunk + lane * kGatherWarps;
          if (of_lane < slicing.reach_chunks) reach = reaches[of_lane].touches(own_pixels);
          const unsigned reaching = __ballot_sync(0xffffffff, reach);
          chunk += kGatherWarps * (reaching ? __ffs(reaching) - 1 : 32);
          if (chunk >= slicing.reach_chunks) break;
          if (!reaching) continue;
          // Counted in queries first, so that no product exceeds `total`.
          next = chunk * kReachQueries * level_points;
          const int64_t end_query = int64_t(chunk + 1) * kReachQueries;
          end = static_cast<int32_t>(min(p.queries, end_query)) * level_points;
          chunk += kGatherWarps;
        }
        const int32_t number = next + lane;
        Point point[kLookAhead];
#pragma unroll
        for (int i = 0; i < kLookAhead; ++i) {
          if (number + i * step < end) {
            find_point(number + i * step, point[i]);
            point[i].read_location(p);
          }
        }
#pragma unroll
        for (int i = 0; i < kLookAhead; ++i) {
          const bool touches = number + i * step < end && may_touch(point[i]);
          const unsigned touching = __ballot_sync(0xffffffff, touches);
          full |= near + __popc(touching) > slicing.found;
          if (full) continue;
          if (touches) found[near + __popc(touching & ((1u << lane) - 1))] = number + i * step;
          near += __popc(touching);
          next += step;
        }
      }
      more = __syncthreads_or(next < end || chunk < slicing.reach_chunks);
      too_many = first_round && more && pixels > slicing.kept_pixels;
      if (threadIdx.x == 0 && first_round) {
        if (too_many) {
          part.halve();
        } else if (!part.next()) {
          slice_index += gridDim.x / rows;
          part.start(p, shared.levels, shared.slices, slice_index);
        }
      }
      if (too_many) break;
      direct = first_round && !more && copies == 1;

      // What they give to their corners, and how many lie in each cell.
      // Two 16-bit counters share a word; neither overflows.
      const int32_t words = (cells + 1) / 2, pitch = slicing.cells() / 2;
      uint32_t* counts = reinterpret_cast<uint32_t*>(shared.places);
      for (int32_t i = lane; i < words; i += 32) counts[warp * pitch + i] = 0;
      __syncwarp();
      for (int32_t i = lane; i < near; i += 32) {
        Point point;
        const int32_t query = find_point(found[i], point);
        point.read(p);
        Softmax<acc> softmax;
        if constexpr (kIsFused<kSource>) {
          softmax = softmaxes<scalar_t>(p)[(batch * p.queries + query) * p.heads + head];
        }
        const Place<acc> at = locate(p, point, own, level);
        const int32_t cell = own_pixels.number(find_cell(at, level, p.method));
        found[i] = cell;
        if (cell == kOutside) continue;
        atomicAdd(counts + warp * pitch + cell / 2, cell & 1 ? 1u << 16 : 1u);
        const acc weight = find_weight(p, point, softmax);
        const acc right = at.x.fraction, down = at.y.fraction;
        const int slot = warp * slicing.found + i;
        shared.shares[slot] =
            p.method == Method::nearest
                ? PerCorner<acc>{weight, 0, 0, 0}
                : PerCorner<acc>{weight * ((1 - right) * (1 - down)), weight * (right * (1 - down)),
                                 weight * ((1 - right) * down), weight * (right * down)};
        shared.queries[slot] = Rows::offset(p, query);
      }
      __syncthreads();

      // Where each warp's points of each cell go: cell after cell, warp after warp. Two at a time.
      const int32_t per_thread = ceil_div(words, kGatherThreads);
      const int32_t first_word = min(static_cast<int32_t>(threadIdx.x) * per_thread, words);
      const int32_t last_word = min(first_word + per_thread, words);
      const auto count_word = [&](int32_t word) {
        uint32_t count = 0;
#pragma unroll
        for (int w = 0; w < kGatherWarps; ++w) count += counts[w * pitch + word];
        return count;
      };
      int32_t count = 0;
      for (int32_t word = first_word; word < last_word; ++word) {
        const uint32_t both = count_word(word);
        count += (both & 0xffff) + (both >> 16);
      }
      int32_t all;
      uint32_t start = sum_before<kGatherWarps>(count, all);
      for (int32_t word = first_word; word < last_word; ++word) {
        const uint32_t both = count_word(word);
        uint32_t at = start | (start + (both & 0xffff)) << 16;
        reinterpret_cast<uint32_t*>(shared.starts)[word] = at;
        start += (both & 0xffff) + (both >> 16);
#pragma unroll
        for (int w = 0; w < kGatherWarps; ++w) {
          const uint32_t n = counts[w * pitch + word];
          counts[w * pitch + word] = at;
          at += n;
        }
      }
      if (threadIdx.x == 0) shared.starts[2 * words] = static_cast<uint16_t>(all);
      __syncthreads();
      for (int32_t i = lane; i - lane < near; i += 32) {
        const int32_t cell = i < near ? found[i] : kOutside;
        const unsigned peers = __match_any_sync(0xffffffff, cell);
        const int rank = __popc(peers & ((1u << lane) - 1));
        int32_t at = 0;
        if (cell != kOutside) at = places[cell] + rank;
        __syncwarp();
        if (cell != kOutside) {
          if (rank == 0) places[cell] = static_cast<uint16_t>(at + __popc(peers));
          shared.order[at] = static_cast<uint16_t>(warp * slicing.found + i);
        }
        __syncwarp();
      }
      __syncthreads();

      // Each team adds up its pixels.
      const bool bilinear = p.method == Method::bilinear;
      const auto add = [&](int32_t pixel, int first, int stride, acc(&sum)[kVec]) {
        const uint16_t* north = shared.starts + pixel + row_of(pixel);
        const uint16_t* south = north + own_pixels.width + 1;
        // The points of the two cells to the north, then those of the two to the south; to the
        // east from the middle on.
        const int32_t north_begin = north[0], north_middle = north[1];
        const int32_t south_middle = south[1], south_begin = bilinear ? south[0] : south_middle;
        const int32_t to_north = bilinear ? north[2] - north_begin : 0;
        const int32_t of_pixel = to_north + south[2] - south_begin;
        const auto add_rows = [&](auto at_once) {
          constexpr int kAtOnce = at_once.value;  // rows loaded before they are used
          for (int32_t i = first; i < of_pixel; i += kAtOnce * stride) {
            Row loaded[kAtOnce];
            acc share[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              const int32_t number = i + k * stride;
              share[k] = 0;
              if (number < of_pixel) {
                const bool is_north = number < to_north;
                const int32_t at = number + (is_north ? north_begin : south_begin - to_north);
                const bool is_west = at < (is_north ? north_middle : south_middle);
                const int slot = shared.order[at];
                share[k] = shared.shares[slot].corner[(is_north ? 2 : 0) + (is_west ? 1 : 0)];
                if (has_channel) {
                  loaded[k] = Row::load(Rows::at(p, grad_output, shared.queries[slot]));
                }
              }
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              acc x[kVec];
              loaded[k].unpack(x);
#pragma unroll
              for (int c = 0; c < kVec; ++c) sum[c] += share[k] * x[c];
            }
          }
        };
        // With two points a pixel, on the average; with fewer most of four loads would be none.
        if (2 * all >= pixels) {
          add_rows(std::integral_constant<int, 4>{});
        } else {
          add_rows(std::integral_constant<int, 1>{});
        }
      };
      if (direct) {
        for (int32_t pixel = team; pixel < pixels; pixel += kTeams) {
          acc sum[kVec] = {};
          add(pixel, 0, 1, sum);
          store(pixel, sum);
        }
      } else {
        for (int32_t i = team; i < pixels * copies; i += kTeams) {
          const int32_t copy = i / pixels, pixel = i - copy * pixels;
          acc sum[kVec] = {};
          add(pixel, copy, copies, sum);
          acc* kept = shared.sums + i * kRow + threadIdx.x % kLanes * kVec;
#pragma unroll
          for (int c = 0; c < kVec; ++c) kept[c] = first_round ? sum[c] : kept[c] + sum[c];
        }
      }
      __syncthreads();
      if (!more) break;
    }

    if (!too_many && !direct) {
      for (int32_t pixel = team; pixel < pixels; pixel += kTeams) {
        acc sum[kVec] = {};
        for (int copy = 0; copy < copies; ++copy) {
          const acc* kept =
              shared.sums + (copy * pixels + pixel) * kRow + threadIdx.x % kLanes * kVec;
#pragma unroll
          for (int c = 0; c < kVec; ++c) sum[c] += kept[c];
        }
        store(pixel, sum);
      }
    }
    __syncthreads();
  }
  wait_for_previous_kernel();
}

constexpr int kMaxSlicePixels = 1024, kMinSlicePixels = 128;
constexpr int kKeptPixels = 64;
constexpr int kMinFound = 128;      // points a warp finds at a time, if there are as many
constexpr int kGatherBlocks = 3;    // a multiprocessor, if their shared memory allows
constexpr int kStaticBytes = 2048;  // what a block has besides, at most
// Where there are reaches:
constexpr int kFewestSlices = 16;     // of a level
constexpr int kSumBytes = 32 * 1024;  // that are kept
static_assert(kMaxSlicePixels * kMaxSide <= 1 << 16, "for RowOf");
static_assert(kMaxFound * kGatherWarps < 1 << 16, "for 16-bit slots");

template <typename scalar_t, int kVec, int kLanes>
const char* launch_gather(const BackwardParams& p, void* stream) {
  // With room for the levels of either source.
  using Memory = GatherMemory<acc_t<scalar_t>, FusedLevel<acc_t<scalar_t>>>;
  constexpr int kRow = kLanes * kVec, kTeams = kGatherThreads / kLanes;
  int device = 0, multiprocessors = 0, of_block = 0, of_multiprocessor = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& [attribute, number] :
       {std::pair{cudaDevAttrMultiProcessorCount, &multiprocessors},
        std::pair{cudaDevAttrMaxSharedMemoryPerBlockOptin, &of_block},
        std::pair{cudaDevAttrMaxSharedMemoryPerMultiprocessor, &of_multiprocessor},
        std::pair{cudaDevAttrComputeCapabilityMajor, &major}}) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(number, attribute, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t points = max_level_points(p);
  // Pixels to fill the GPU twice, and all points at a time if they fit.
  const int64_t rows = int64_t(p.heads) * ceil_div(p.channels, kRow);
  const int64_t to_fill = p.spatial_size * p.batch * rows / (2 * multiprocessors);
  Slicing slicing{
      static_cast<int32_t>(std::clamp<int64_t>(to_fill, kMinSlicePixels, kMaxSlicePixels)), 1,
      static_cast<int32_t>(
          std::clamp<int64_t>(ceil_div<int64_t>(points, kGatherThreads) * 32, 32, kMaxFound)),
      kKeptPixels, 0};
  if (has_reaches(p)) {
    const int32_t kept = kSumBytes / (kRow * static_cast<int>(sizeof(acc_t<scalar_t>)));
    slicing = {std::min(kept, kMaxSlicePixels), kFewestSlices, kMaxFound,
               std::min(kept, kMaxSlicePixels), reach_chunks(p)};
  }
  const auto bytes = [&] { return Memory::bytes(slicing, kTeams, kRow, p.levels); };
  const auto shrink = [&](int64_t most, int found, int pixels) {
    while (slicing.found > found && bytes() > most) slicing.found -= 32;
    while (slicing.pixels > pixels && bytes() > most) {
      slicing.pixels /= 2;
      slicing.kept_pixels = std::min(slicing.kept_pixels, slicing.pixels);
    }
  };
  // For kGatherBlocks, as far as blocks do not become too small; then for one.
  const int of_each = std::max(of_multiprocessor / kGatherBlocks, 48 * 1024);
  shrink(std::min(of_block, of_each) - kStaticBytes, kMinFound, kFewSlicePixels);
  shrink(of_block - kStaticBytes, 32, 2);
  // As many slices of a level that the points near each fit, if they are spread out. Halving a
  // slice instead takes another look at all points.
  if (!has_reaches(p) && points > slicing.slots()) {
    slicing.fewest = static_cast<int32_t>(ceil_div<int64_t>(4 * points, 3 * slicing.slots()));
  }
  const int64_t blocks = std::min<int64_t>(slicing.slices(p), INT32_MAX / rows) * rows;
  const bool overlap = major >= 9;
  return with_source<scalar_t>(p, [&](auto source) {
    const auto kernel = gather_kernel<scalar_t, source.value, kVec, kLanes>;
    const char* message = allow_shared_memory(
        kernel, bytes(), "the backward needs more shared memory than this GPU has");
    if (message) return message;
    return launch(kernel, p, blocks, 1, kGatherThreads, bytes(), !kIsFused<source.value> && overlap,
                  stream, slicing);
  });
}

}  // namespace ms_deform_attn::cuda
