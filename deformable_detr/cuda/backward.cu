// Multi-scale deformable attention on the GPU, backward, in two kernels and without atomics, so that
// gradients are the same in every run.
//
// points_kernel walks over the points as the forward does. Per point, the dot products of
// grad_output with value at the four corners give the gradients of its weight and location. It also
// notes in which part of its level each point lies: in the scratch, a byte each.
//
// value_kernel walks over the pixels. A block owns a tile of them, of one level, head and batch. It
// looks through the notes for points that may touch the tile, sorts these by pixel, adds up their
// grad_output times weight and share, and writes every pixel of grad_value once.
#include "deformable_detr/cuda/launch.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ----------------------------------------------------------------------------------------- overlap

// The two kernels do not depend on each other, and on sm_90 the second starts while the first is
// running. It ends after it.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ----------------------------------------------------------------------------------- points kernel

// Adds up four numbers over a team. Halves are exchanged instead of copied where possible: lane l
// ends up with the total of number l % 4 (of a team of two: of l and l + 2; of one: of all).
template <int kLanes, typename acc>
__device__ __forceinline__ void reduce_corners(acc (&x)[4], int lane) {
  if constexpr (kLanes >= 2) {
    const bool odd = lane & 1;
    const acc keep0 = odd ? x[1] : x[0], give0 = odd ? x[0] : x[1];
    const acc keep2 = odd ? x[3] : x[2], give2 = odd ? x[2] : x[3];
    x[0] = keep0 + __shfl_xor_sync(0xffffffff, give0, 1);
    x[1] = keep2 + __shfl_xor_sync(0xffffffff, give2, 1);
  }
  if constexpr (kLanes >= 4) {
    const bool upper = lane & 2;
    const acc keep = upper ? x[1] : x[0], give = upper ? x[0] : x[1];
    x[0] = keep + __shfl_xor_sync(0xffffffff, give, 2);
  }
#pragma unroll
  for (int offset = 4; offset < kLanes; offset *= 2) {
    x[0] += __shfl_xor_sync(0xffffffff, x[0], offset);
  }
}

template <typename scalar_t, bool kMixed, int kVec, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    points_kernel(const __grid_constant__ BackwardParams p) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, 1>;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  extern __shared__ Level levels[];
  __shared__ int4 pixels[Layout::kSlots];          // of each corner, as an offset
  __shared__ PerCorner<acc> dots[Layout::kSlots];  // of grad_output with value at each corner

  Work work = find_work<Layout>(p, blockIdx.x);
  const int lane = threadIdx.x % kLanes;
  const int32_t all_points = p.points;

  // The first points are on their way while the levels arrive.
  let_next_kernel_start();
  LevelLoader level_loader;
  level_loader.load(p);
  PointReader<scalar_t, kMixed> next;
  const auto read_next = [&](int32_t first) {
    next.read(p, first + lane < work.points);
    next.skip(p, kLanes);
  };
  if (!queries_are_pixels(p)) {
    next.start(p, work.row, lane);
    read_next(0);
  }
  level_loader.store(p, levels);
  if (queries_are_pixels(p)) {
    follow_strips<kForwardStrip>(p, levels, work);
    next.start(p, work.row, lane);
    read_next(0);
  }

  const int first_slot = Layout::first_slot();
  const int own_slot = first_slot + lane * Layout::kPitch;
  const int64_t origin = (work.batch * p.spatial_size * p.heads + work.head) * p.channels;
  PointCursor cursor(p, lane);
  int64_t point = work.row * all_points + lane;
  for (int32_t first = 0; first < all_points; first += kLanes) {
    // Each lane works out one point.
    const bool has_point = first + lane < work.points;
    Corners<acc> corners;
    const acc weight = next.weight(p);
    if (has_point) {
      const auto location = next.location(p);
      corners = Corners<acc>(location.x, location.y, levels[cursor.level]);
    }
    read_next(first + kLanes);
    __syncwarp();
    pixels[own_slot] =
        make_int4(Rows::offset(p, corners.pixel[0]), Rows::offset(p, corners.pixel[1]),
                  Rows::offset(p, corners.pixel[2]), Rows::offset(p, corners.pixel[3]));
    dots[own_slot] = {};
    __syncwarp();

    // The team walks over the channels, and for each part of them over the points.
    for (int32_t part = 0; part < p.channels; part += kLanes * kVec) {
      const int32_t channel = part + lane * kVec;
      const bool has_channel = work.active() && channel < p.channels;
      const scalar_t* value = static_cast<const scalar_t*>(p.value) + origin + channel;
      acc grad[kVec] = {};
      if (has_channel) {
        Row::load(static_cast<const scalar_t*>(p.grad_output) + work.row * p.channels + channel)
            .unpack(grad);
      }
      Row corner[4];  // outside: not loaded, and the dot product not used
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (i % 4 == 0 && first + i >= all_points) break;
        const int4 offset = pixels[first_slot + i * Layout::kPitch];
        const int32_t offset_of[4] = {offset.x, offset.y, offset.z, offset.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (offset_of[j] >= 0 && has_channel) {
            corner[j] = Row::load(Rows::at(p, value, offset_of[j]));
          }
        }
        acc dot[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc x[kVec];
          corner[j].unpack(x);
#pragma unroll
          for (int c = 0; c < kVec; ++c) dot[j] += grad[c] * x[c];
        }
        reduce_corners<kLanes>(dot, lane);
#pragma unroll
        for (int j = 0; j < 4; j += kLanes) {
          if (lane + j < 4)
            dots[first_slot + i * Layout::kPitch].corner[lane + j] += dot[j / kLanes];
        }
      }
    }

    // Each lane finishes its point.
    __syncwarp();
    if (has_point) {
      PerCorner<acc> dot = dots[own_slot];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (corners.pixel[j] == kOutside) dot.corner[j] = 0;
      }
      const Level& level = levels[cursor.level];
      store_weight<scalar_t>(p, point, corners.sample(dot.corner));
      store_location<scalar_t>(p, point,
                               {weight * corners.d_location_x(dot.corner, level),
                                weight * corners.d_location_y(dot.corner, level)});
    }
    point += kLanes;
    cursor.advance(p, kLanes);
  }
}

// ------------------------------------------------------------------------------------ value, gathered

// A block owns a slice of the pixels of one level, head and batch. It looks at all points of the
// level, sorts what falls on the slice by pixel, adds it up, and writes every pixel once. The order
// of all sums is fixed.
constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / 32;

// What suits a problem.
struct Slicing {
  int32_t pixels;  // a slice has at most so many
  int32_t points;  // sorted at once
  bool keep_sums;  // in shared memory, as there are more points
};

// Shared memory of a block, in this order.
template <typename acc>
struct GatherMemory {
  acc* sums;          // [pixels, or a team][row]
  acc* shares;        // [4 * points], pixel after pixel
  int32_t* starts;    // [pixels + 1], where a pixel's shares start
  Level* levels;
  uint16_t* queries;  // [4 * points], beside the shares
  uint16_t* places;   // [warp][pixels], where the warp's next share of a pixel goes
  uint16_t* found;    // [warp][its part of the points], those near the slice

  static __host__ __device__ int64_t sum_rows(const Slicing& slicing, int teams) {
    return slicing.keep_sums && slicing.pixels > teams ? slicing.pixels : teams;
  }
  static __host__ __device__ int64_t bytes(const Slicing& slicing, int lanes, int row,
                                           int32_t levels) {
    return (sum_rows(slicing, kGatherThreads / lanes) * row + 4 * slicing.points) * sizeof(acc) +
           (slicing.pixels + 4) / 4 * 4 * sizeof(int32_t) + levels * sizeof(Level) +
           (4 * slicing.points + kGatherWarps * (slicing.pixels + found_pitch(slicing))) *
               sizeof(uint16_t);
  }
  static __host__ __device__ int found_pitch(const Slicing& slicing) {
    return (slicing.points + kGatherThreads - 1) / kGatherThreads * 32;
  }
  __device__ GatherMemory(char* memory, const Slicing& slicing, int lanes, int row, int32_t n) {
    sums = reinterpret_cast<acc*>(memory);
    shares = sums + sum_rows(slicing, kGatherThreads / lanes) * row;
    levels = reinterpret_cast<Level*>(shares + 4 * slicing.points);
    starts = reinterpret_cast<int32_t*>(levels + n);
    queries = reinterpret_cast<uint16_t*>(starts + (slicing.pixels + 4) / 4 * 4);
    places = queries + 4 * slicing.points;
    found = places + kGatherWarps * slicing.pixels;
  }
};

// Exclusive sums of x over the block's threads; `all` becomes the sum of all.
__device__ __forceinline__ int32_t sum_before(int32_t x, int32_t& all) {
  __shared__ int32_t warp_sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int32_t sum = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffff, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  all = 0;
  int32_t before = sum - x;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) before += all;
    all += warp_sums[w];
  }
  return before;
}

template <typename scalar_t, bool kMixed, int kVec, int kLanes>
__global__ void __launch_bounds__(kGatherThreads, 4)
    gather_kernel(const __grid_constant__ BackwardParams p, const Slicing slicing) {
  using acc = acc_t<scalar_t>;
  using Row = Vec<scalar_t, kVec>;
  constexpr int kRow = kLanes * kVec;  // channels
  constexpr int kTeams = kGatherThreads / kLanes;
  extern __shared__ __align__(16) char memory[];
  const GatherMemory<acc> shared(memory, slicing, kLanes, kRow, p.levels);
  for (int i = threadIdx.x; i < p.levels; i += kGatherThreads) shared.levels[i] = read_level(p, i);
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = threadIdx.x / kLanes;
  const int32_t parts = ceil_div(p.channels, kRow);
  const int32_t head = blockIdx.y / parts;
  const int32_t channel = blockIdx.y % parts * kRow + threadIdx.x % kLanes * kVec;
  const bool has_channel = channel < p.channels;
  const int64_t batch = p.first_batch + blockIdx.z;
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  scalar_t* grad_value = static_cast<scalar_t*>(p.grad_value) +
                         batch * p.spatial_size * pixel_stride + head * p.channels + channel;
  const scalar_t* grad_output =
      static_cast<const scalar_t*>(p.grad_output) +
      (batch * p.queries * p.heads + head) * p.channels + channel;

  // The block's slice: pixels [begin, end) of value.
  int32_t slice = blockIdx.x, own = 0, covered = 0;
  for (; own < p.levels; ++own) {
    const int32_t pixels = shared.levels[own].height * shared.levels[own].width;
    if (shared.levels[own].start == covered) covered += pixels;
    if (slice < ceil_div(pixels, slicing.pixels)) break;
    slice -= ceil_div(pixels, slicing.pixels);
  }
  if (own == p.levels) {
    // One block clears what no level covers; there is nothing in good metadata.
    if (slice > 0 || covered == p.spatial_size) return wait_for_previous_kernel();
    for (int32_t pixel = team; pixel < p.spatial_size; pixel += kTeams) {
      bool in_a_level = false;
      for (int32_t l = 0; l < p.levels; ++l) {
        const Level level = shared.levels[l];
        in_a_level |= static_cast<uint32_t>(pixel - level.start) <
                      static_cast<uint32_t>(level.height * level.width);
      }
      if (!in_a_level && has_channel) Row{}.store(grad_value + pixel * pixel_stride);
    }
    return wait_for_previous_kernel();
  }
  const int32_t begin = shared.levels[own].start + slice * slicing.pixels;
  const int32_t end = min(begin + slicing.pixels, shared.levels[own].start + shared.levels[own].height * shared.levels[own].width);
  const int32_t pixels = end - begin;

  // Each team adds up some pixels. Where pixels are few, `copies` teams share one.
  const int copies = max(1, min(kTeams / pixels, 32));
  const bool direct = copies == 1 && !slicing.keep_sums;
  if (!direct) {
    for (int i = threadIdx.x; i < copies * pixels * kRow; i += kGatherThreads) shared.sums[i] = 0;
  }
  uint16_t* places = shared.places + warp * slicing.pixels;
  uint16_t* found = shared.found + warp * GatherMemory<acc>::found_pitch(slicing);

  // In good metadata, only the slice's own level has pixels in it.
  for (int32_t l = 0, first_point = 0; l < p.levels; first_point += points_of_level(p, l), ++l) {
    const Level level = shared.levels[l];
    if (level.start >= end || level.start + level.height * level.width <= begin) continue;
    const int32_t level_points = points_of_level(p, l);
    const int64_t total = p.queries * level_points;
    int64_t chunk = 0;
    do {
      const int32_t chunk_points = static_cast<int32_t>(min(int64_t(slicing.points), total - chunk));
      const int64_t first_query = chunk == 0 ? 0 : chunk / level_points;
      const uint32_t skipped = static_cast<uint32_t>(chunk - first_query * level_points);
      // Point i of the chunk: its query (less the first) and its number in the row.
      const auto find = [&](uint32_t i, uint32_t& query, int32_t& number) {
        query = (i + skipped) / static_cast<uint32_t>(level_points);
        number = first_point + static_cast<int32_t>(i + skipped - query * level_points);
      };

      // Each warp notes which of its points may touch the slice, by their rows.
      const int32_t low_row = (begin - level.start) / level.width - 1;
      const int32_t high_row = (end - 1 - level.start) / level.width;
      int near = 0;
      for (int32_t i = warp * 32; i < chunk_points; i += kGatherThreads) {
        bool touches = false;
        if (i + lane < chunk_points) {
          uint32_t query;
          int32_t number;
          find(i + lane, query, number);
          PointReader<scalar_t, kMixed> point;
          point.start(p, (batch * p.queries + first_query + query) * p.heads + head, number);
          point.read_location(p);
          const Coordinate<acc> y(point.location(p).y, level.height);
          touches = y.floor >= low_row && y.floor <= high_row;
        }
        const unsigned touching = __ballot_sync(0xffffffff, touches);
        if (touches) found[near + __popc(touching & ((1u << lane) - 1))] = i + lane;
        near += __popc(touching);
      }
      __syncwarp();

      // body(query, weight, corners) for these points, in a fixed order.
      const auto for_points = [&](auto&& body) {
        for (int32_t i = 0; i < near; i += 32) {
          Corners<acc> corners;
          uint32_t query = 0;
          acc weight = 0;
          if (i + lane < near) {
            int32_t number;
            find(found[i + lane], query, number);
            PointReader<scalar_t, kMixed> point;
            point.start(p, (batch * p.queries + first_query + query) * p.heads + head, number);
            point.read(p, true);
            const auto location = point.location(p);
            weight = point.weight(p);
            corners = Corners<acc>(location.x, location.y, level);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            corners.pixel[j] -= begin;
            if (corners.pixel[j] < 0 || corners.pixel[j] >= pixels) corners.pixel[j] = kOutside;
          }
          body(static_cast<uint16_t>(query), weight, corners);
        }
      };

      for (int i = lane; i < pixels; i += 32) places[i] = 0;
      __syncwarp();
      for_points([&](uint16_t, acc, const Corners<acc>& corners) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (corners.pixel[j] == kOutside) continue;
          // Two 16-bit counters share a word; neither overflows.
          atomicAdd(reinterpret_cast<int32_t*>(places) + corners.pixel[j] / 2,
                    corners.pixel[j] & 1 ? 1 << 16 : 1);
        }
      });
      __syncthreads();

      // Where each warp's shares of each pixel go: pixel after pixel, warp after warp.
      const int32_t per_thread = ceil_div(pixels, kGatherThreads);
      const int32_t first_pixel = min(static_cast<int32_t>(threadIdx.x) * per_thread, pixels);
      const int32_t last_pixel = min(first_pixel + per_thread, pixels);
      int32_t count = 0;
      for (int32_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
#pragma unroll
        for (int w = 0; w < kGatherWarps; ++w) count += shared.places[w * slicing.pixels + pixel];
      }
      int32_t all;
      int32_t place = sum_before(count, all);
      for (int32_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
        shared.starts[pixel] = place;
#pragma unroll
        for (int w = 0; w < kGatherWarps; ++w) {
          const int32_t n = shared.places[w * slicing.pixels + pixel];
          shared.places[w * slicing.pixels + pixel] = place;
          place += n;
        }
      }
      if (threadIdx.x == 0) shared.starts[pixels] = all;
      const bool dense = all >= 2 * pixels;
      __syncthreads();

      for_points([&](uint16_t query, acc weight, const Corners<acc>& corners) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int32_t pixel = corners.pixel[j];
          const unsigned peers = __match_any_sync(0xffffffff, pixel);
          const int rank = __popc(peers & ((1u << lane) - 1));
          int32_t at = 0;
          if (pixel != kOutside) at = places[pixel] + rank;
          __syncwarp();
          if (pixel != kOutside) {
            if (rank == 0) places[pixel] = at + __popc(peers);
            shared.shares[at] = weight * corners.share(j);
            shared.queries[at] = query;
          }
          __syncwarp();
        }
      });
      __syncthreads();

      // Each team adds up its pixels.
      const auto add = [&](int32_t at, int32_t last, int32_t step, acc(&sum)[kVec]) {
        const auto add_rows = [&](auto at_once) {
          constexpr int kAtOnce = at_once.value;  // rows loaded before they are used
          for (; at < last; at += kAtOnce * step) {
            Row rows[kAtOnce];
            acc shares[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              const int32_t at_k = at + k * step;
              shares[k] = at_k < last ? shared.shares[at_k] : acc(0);
              if (at_k < last && has_channel) {
                rows[k] = Row::load(grad_output + (first_query + shared.queries[at_k]) * pixel_stride);
              }
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              acc x[kVec];
              rows[k].unpack(x);
#pragma unroll
              for (int c = 0; c < kVec; ++c) sum[c] += shares[k] * x[c];
            }
          }
        };
        if (dense) {
          add_rows(std::integral_constant<int, 4>{});
        } else {
          add_rows(std::integral_constant<int, 1>{});
        }
      };
      if (direct) {
        for (int32_t pixel = team; pixel < pixels; pixel += kTeams) {
          acc sum[kVec] = {};
          add(shared.starts[pixel], shared.starts[pixel + 1], 1, sum);
          if (has_channel) Row::pack(sum).store(grad_value + (begin + pixel) * pixel_stride);
        }
      } else {
        for (int32_t i = team; i < pixels * copies; i += kTeams) {
          const int32_t copy = i / pixels, pixel = i - copy * pixels;
          acc sum[kVec] = {};
          add(shared.starts[pixel] + copy, shared.starts[pixel + 1], copies, sum);
          acc* kept = shared.sums + i * kRow + threadIdx.x % kLanes * kVec;
#pragma unroll
          for (int c = 0; c < kVec; ++c) kept[c] += sum[c];
        }
      }
      __syncthreads();
      chunk += chunk_points;
    } while (chunk < total);
  }

  if (!direct) {
  for (int32_t pixel = team; pixel < pixels; pixel += kTeams) {
    acc sum[kVec] = {};
    for (int copy = 0; copy < copies; ++copy) {
      const acc* kept =
          shared.sums + (copy * pixels + pixel) * kRow + threadIdx.x % kLanes * kVec;
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[c] += kept[c];
    }
    if (has_channel) Row::pack(sum).store(grad_value + (begin + pixel) * pixel_stride);
  }
  }
  wait_for_previous_kernel();
}

// ----------------------------------------------------------------------------------- value, scattered

// A block takes a tile of queries of one head, some points at a time. It sorts these by pixel, so
// that what falls on the same four pixels is added up in registers before it is added to memory.
constexpr int kScatterThreads = 256;
constexpr int kScatterQueries = 128;
constexpr int kScatterStrip = 8;
constexpr int kPointsPerThread = 4;
constexpr int kScatterPoints = kScatterThreads * kPointsPerThread;
constexpr int kBins = 1024;  // by the number of the north-western pixel

template <typename acc>
struct alignas(16) ScatterPoint {
  acc share[4];      // of each corner, times the weight
  int32_t nw;        // the north-western pixel, which may be outside
  int32_t width;     // of the level, negative if all four corners are inside
};

template <typename scalar_t, bool kMixed, int kVec, int kLanes>
__global__ void __launch_bounds__(kScatterThreads)
    scatter_kernel(const __grid_constant__ BackwardParams p) {
  using acc = acc_t<scalar_t>;
  using Row = Vec<scalar_t, kVec>;
  constexpr int kRow = kLanes * kVec;
  constexpr int kTeams = kScatterThreads / kLanes;
  extern __shared__ Level levels[];
  __shared__ acc shares[kScatterPoints][4];
  __shared__ int4 pixels[kScatterPoints];
  __shared__ uint16_t order[kScatterPoints];
  __shared__ int32_t bins[kBins];
  __shared__ int32_t warp_totals[kScatterThreads / 32];
  __shared__ int32_t queries[kScatterQueries];

  LevelLoader level_loader;
  level_loader.load(p);
  level_loader.store(p, levels);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int team = threadIdx.x / kLanes;
  const int32_t parts = ceil_div(p.channels, kRow);
  const int32_t head = blockIdx.y / parts;
  const int32_t channel = blockIdx.y % parts * kRow + threadIdx.x % kLanes * kVec;
  const bool has_channel = channel < p.channels;
  const int64_t batch = p.first_batch + blockIdx.z;
  const int64_t first_query = int64_t(blockIdx.x) * kScatterQueries;
  const int32_t n_queries =
      static_cast<int32_t>(min(int64_t(kScatterQueries), p.queries - first_query));
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  acc* grad_value = static_cast<acc*>(p.grad_value) + batch * p.spatial_size * pixel_stride +
                    head * p.channels + channel;
  const scalar_t* grad_output =
      static_cast<const scalar_t*>(p.grad_output) +
      (batch * p.queries * p.heads + head) * p.channels + channel;

  if (threadIdx.x < n_queries) {
    Work work{batch, first_query + threadIdx.x, 0, head, 1};
    if (queries_are_pixels(p)) follow_strips<kScatterStrip>(p, levels, work);
    queries[threadIdx.x] = static_cast<int32_t>(work.query);
  }
  __syncthreads();

  // A stage: all queries' next points_per_stage points.
  constexpr int kStagePoints = kScatterPoints / kScatterQueries;
  const int own_query = threadIdx.x / (kScatterThreads / kScatterQueries);
  for (int32_t first = 0; first < p.points; first += kStagePoints) {
    for (int i = threadIdx.x; i < kBins; i += kScatterThreads) bins[i] = 0;
    __syncthreads();

    // Each thread works out some adjacent points of a query.
    int32_t ranks[kPointsPerThread], own_bins[kPointsPerThread];
    const int32_t first_point = first + threadIdx.x % (kScatterThreads / kScatterQueries) * kPointsPerThread;
    PointReader<scalar_t, kMixed> point;
    const bool has_query = own_query < n_queries;
    if (has_query) {
      point.start(p, (batch * p.queries + queries[own_query]) * p.heads + head, first_point);
    }
    PointCursor cursor(p, first_point);
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
      const int slot = threadIdx.x * kPointsPerThread + i;
      own_bins[i] = -1;
      if (has_query && first_point + i < p.points) {
        point.read(p, true);
        point.skip(p, 1);
        const auto location = point.location(p);
        const acc weight = point.weight(p);
        const Corners<acc> corners(location.x, location.y, levels[cursor.level]);
        pixels[slot] = make_int4(corners.pixel[0], corners.pixel[1], corners.pixel[2], corners.pixel[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) shares[slot][j] = weight * corners.share(j);
        const int32_t pixel = corners.first_pixel();
        if (pixel != kOutside) {
          own_bins[i] = pixel % kBins;
          ranks[i] = atomicAdd(bins + own_bins[i], 1);
        }
      }
      cursor.advance(p, 1);
    }
    __syncthreads();

    // Exclusive sums over the bins.
    constexpr int kBinsPerThread = kBins / kScatterThreads;
    int32_t total = 0, before[kBinsPerThread];
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      before[i] = total;
      total += bins[threadIdx.x * kBinsPerThread + i];
    }
    int32_t sum = total;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffff, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    int32_t all = 0;
#pragma unroll
    for (int w = 0; w < kScatterThreads / 32; ++w) {
      if (w == warp) sum += all;
      all += warp_totals[w];
    }
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      bins[threadIdx.x * kBinsPerThread + i] = sum - total + before[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
      if (own_bins[i] >= 0) {
        order[bins[own_bins[i]] + ranks[i]] = threadIdx.x * kPointsPerThread + i;
      }
    }
    __syncthreads();

    // Each team adds up its share of the sorted points.
    const int share_size = (all + kTeams - 1) / kTeams;
    const int begin = min(team * share_size, all), end = min(begin + share_size, all);
    int4 current = make_int4(kOutside, kOutside, kOutside, kOutside);
    acc sums[4][kVec] = {};
    const auto flush = [&](int j, int32_t pixel) {
      if (pixel != kOutside && has_channel) {
        atomic_add<kVec>(grad_value + pixel * pixel_stride, sums[j]);
      }
    };
    for (int i = begin; i < end; ++i) {
      const int slot = order[i];
      const int4 pixel = pixels[slot];
      Row row;
      const int32_t query = queries[slot / kStagePoints];
      if (has_channel) row = Row::load(grad_output + query * pixel_stride);
      acc share[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) share[j] = shares[slot][j];
      if (pixel.x != current.x || pixel.y != current.y || pixel.z != current.z ||
          pixel.w != current.w) {
        // The eastern pixels may be the next point's western ones.
        const bool next_column = pixel.x == current.y && pixel.z == current.w;
        flush(0, current.x);
        flush(2, current.z);
        if (!next_column) {
          flush(1, current.y);
          flush(3, current.w);
        }
#pragma unroll
        for (int c = 0; c < kVec; ++c) {
          sums[0][c] = next_column ? sums[1][c] : acc(0);
          sums[2][c] = next_column ? sums[3][c] : acc(0);
          sums[1][c] = 0;
          sums[3][c] = 0;
        }
        current = pixel;
      }
      acc x[kVec];
      row.unpack(x);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < kVec; ++c) sums[j][c] += share[j] * x[c];
      }
    }
    flush(0, current.x);
    flush(1, current.y);
    flush(2, current.z);
    flush(3, current.w);
    __syncthreads();
  }
  wait_for_previous_kernel();
}

// --------------------------------------------------------------------------------------- launchers

template <typename scalar_t, int kVec, int kLanes>
const char* launch_points(const BackwardParams& p, void* stream) {
  return with_mixed<scalar_t>(p, [&](auto mixed) {
    return launch<Layout<kLanes, 1>>(points_kernel<scalar_t, mixed.value, kVec, kLanes>, p, stream, 1);
  });
}

template <typename Kernel, typename... Arguments>
const char* launch_batches(Kernel kernel, BackwardParams part, int64_t blocks_x, int64_t rows,
                           int threads, int64_t shared_memory, bool overlap_previous, void* stream,
                           const Arguments&... arguments) {
  if (rows > 65535) return "value has too many heads, expected at most 65535";
  if (blocks_x > INT32_MAX) return "sampling_locations has too many queries, expected below 2^31";
  for (; part.first_batch < part.batch; part.first_batch += 65535) {
    const dim3 blocks(static_cast<unsigned>(blocks_x), static_cast<unsigned>(rows),
                      static_cast<unsigned>(std::min<int64_t>(part.batch - part.first_batch, 65535)));
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_memory;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = overlap_previous ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, part, arguments...);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

constexpr int kSlicePixels = 2048;
constexpr int kSlicePixelsKept = 384;
constexpr bool kOverlapScatter = false;
constexpr int kGatherBytes = 112 * 1024;

template <typename scalar_t, int kVec, int kLanes>
const char* launch_gather(const BackwardParams& p, void* stream) {
  using Memory = GatherMemory<acc_t<scalar_t>>;
  constexpr int kRow = kLanes * kVec;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  int64_t level_points = p.points_per_level;
  for (int32_t l = 0; l < p.levels && p.points_per_level == 0; ++l) {
    level_points = std::max<int64_t>(level_points, p.level_points[l]);
  }
  level_points *= p.queries;
  int multiprocessors = 0;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t to_fill = p.spatial_size * p.batch * p.heads * ceil_div(p.channels, kRow) / (2 * multiprocessors);
  const int32_t slice_pixels = static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(to_fill, 128), kSlicePixels)) / 2 * 2;
  Slicing slicing{slice_pixels, static_cast<int32_t>(std::min<int64_t>(level_points, 16383)), false};
  if (Memory::bytes(slicing, kLanes, kRow, p.levels) > std::min(limit, kGatherBytes)) {
    slicing.pixels = std::min(slicing.pixels, 1024);
  }
  if (slicing.points < level_points || Memory::bytes(slicing, kLanes, kRow, p.levels) > std::min(limit, kGatherBytes)) {
    slicing = {kSlicePixelsKept * 32 / kRow / 2 * 2, 1024, true};
    slicing.pixels = std::max(slicing.pixels, 32);
  }
  const int64_t bytes = Memory::bytes(slicing, kLanes, kRow, p.levels);
  void (*kernel)(BackwardParams, Slicing) = with_mixed<scalar_t>(
      p, [](auto mixed) { return &gather_kernel<scalar_t, mixed.value, kVec, kLanes>; });
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return launch_batches(kernel, p, p.spatial_size / slicing.pixels + p.levels + 1,
                        int64_t(p.heads) * ceil_div(p.channels, kRow), kGatherThreads, bytes,
                        true, stream, slicing);
}

template <typename scalar_t, int kVec, int kLanes>
const char* launch_scatter(const BackwardParams& p, void* stream) {
  void (*kernel)(BackwardParams) = with_mixed<scalar_t>(
      p, [](auto mixed) { return &scatter_kernel<scalar_t, mixed.value, kVec, kLanes>; });
  return launch_batches(kernel, p, ceil_div<int64_t>(p.queries, kScatterQueries),
                        int64_t(p.heads) * ceil_div(p.channels, kLanes * kVec), kScatterThreads,
                        p.levels * sizeof(Level), kOverlapScatter, stream);
}

template <typename scalar_t, int kVec, int kLanes>
const char* launch_value(const BackwardParams& p, void* stream) {
  return p.scratch ? launch_gather<scalar_t, kVec, kLanes>(p, stream)
                   : launch_scatter<scalar_t, kVec, kLanes>(p, stream);
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

int64_t backward_scratch_bytes(const Params& params) {
  return 16;
}

const char* backward(const BackwardParams& params, void* stream) {
  const char* error = nullptr;
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    if (params.channels % kVec != 0 || !Rows<scalar_t, kVec>::fits(params)) {
      error = launch_points<scalar_t, 1, 32>(params, stream);
    } else {
      error = with_lanes<2>(params.channels / kVec, [&](auto lanes) {
        return launch_points<scalar_t, kVec, lanes.value>(params, stream);
      });
    }
    if (error) return;
    // A lane's sums fill 16 bytes.
    constexpr int kSumVec = 16 / sizeof(acc_t<scalar_t>);
    if (params.channels % kSumVec != 0) {
      error = launch_value<scalar_t, 1, 32>(params, stream);
    } else {
      error = with_lanes<2>(params.channels / kSumVec, [&](auto lanes) {
        return launch_value<scalar_t, kSumVec, lanes.value>(params, stream);
      });
    }
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
