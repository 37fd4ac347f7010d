// Multi-scale deformable attention on the GPU, backward.
//
// points_kernel walks over the points as the forward does. Per point, the dot products of
// grad_output with value at the four corners give the gradients of its weight and location. What
// the corners' pixels get, grad_output times weight and share, is added to grad_value in one of
// three ways, each the fastest for some problems (see find_method):
//
// * directly, by points_kernel, corner by corner;
// * by scatter_kernel, where queries are pixels: a block takes a square of them, sorts their points
//   by pixel and adds up what falls on the same one before it adds that to memory;
// * by gather_kernel: a block owns some pixels, looks for the points near them, and writes each
//   pixel once. Sums have a fixed order, there is no need to clear grad_value first, and its dtype
//   is value's. For few queries in a half type, and for all problems if that is asked for.
#include "deformable_detr/cuda/launch.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ----------------------------------------------------------------------------------------- overlap

// points_kernel and the kernel after it are independent, unless fused. On sm_90 the second may
// start while the first still runs, and ends after it.
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

// ----------------------------------------------------------------------------------------- softmax

// A row's softmax: weight = exp(logit - largest) * scale.
template <typename acc>
struct Softmax {
  acc largest, scale;
  __device__ __forceinline__ acc weight(acc logit) const {
    return exponential(logit - largest) * scale;
  }
};

// Fused, points_kernel leaves that of each row for the kernel after it, in scratch.
template <typename scalar_t>
__device__ __forceinline__ Softmax<acc_t<scalar_t>>* softmaxes(const BackwardParams& p) {
  return static_cast<Softmax<acc_t<scalar_t>>*>(p.scratch);
}
int64_t softmax_bytes(const BackwardParams& p) {
  if (!p.reference_points) return 0;
  const int64_t one =
      p.value_dtype == DType::f64 ? sizeof(Softmax<double>) : sizeof(Softmax<float>);
  return p.batch * p.queries * p.heads * one;
}

// Over a row's points, by its team of kTeam lanes. The whole warp takes part.
template <typename scalar_t, int kTeam>
__device__ __forceinline__ Softmax<acc_t<scalar_t>> find_softmax(const Params& p, int64_t row) {
  using acc = acc_t<scalar_t>;
  const auto logit = [&](int32_t point) {
    return load_operand<scalar_t>(p.attention_weights, p.weights_dtype, row * p.points + point);
  };
  const int lane = threadIdx.x % kTeam;
  acc largest = -INFINITY, sum = 0;
  for (int32_t i = lane; i < p.points; i += kTeam) largest = max(largest, logit(i));
#pragma unroll
  for (int offset = 1; offset < kTeam; offset *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffff, largest, offset));
  }
  for (int32_t i = lane; i < p.points; i += kTeam) sum += exponential(logit(i) - largest);
#pragma unroll
  for (int offset = 1; offset < kTeam; offset *= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
  return {largest, 1 / sum};
}

// The weight of a point that was read.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ acc_t<scalar_t> find_weight(const Params& p,
                                                       const PointReader<scalar_t, kSource>& point,
                                                       const Softmax<acc_t<scalar_t>>& softmax) {
  const acc_t<scalar_t> weight = point.weight(p);
  return kIsFused<kSource> ? softmax.weight(weight) : weight;
}

// ------------------------------------------------------------------------------------------ output

template <typename scalar_t>
__device__ __forceinline__ void store_weight(const BackwardParams& p, int64_t point,
                                             acc_t<scalar_t> x) {
  if (p.weights_dtype == DType::f32) {
    static_cast<float*>(p.grad_attention_weights)[point] = static_cast<float>(x);
  } else {
    static_cast<scalar_t*>(p.grad_attention_weights)[point] = from_acc<scalar_t>(x);
  }
}

template <typename scalar_t>
__device__ __forceinline__ void store_location(const BackwardParams& p, int64_t point,
                                               const Location<acc_t<scalar_t>>& x) {
  if (p.locations_dtype == DType::f32) {
    const float xy[2] = {static_cast<float>(x.x), static_cast<float>(x.y)};
    Vec<float, 2>::pack(xy).store(static_cast<float*>(p.grad_sampling_locations) + 2 * point);
  } else {
    const acc_t<scalar_t> xy[2] = {x.x, x.y};
    Vec<scalar_t, 2>::pack(xy).store(static_cast<scalar_t*>(p.grad_sampling_locations) + 2 * point);
  }
}

// ----------------------------------------------------------------------------------- points kernel

// Adds up four numbers over a team. Halves are exchanged instead of copied where possible: lane l
// ends up with the total of number l % 4 (of a team of two: of l and l + 2).
template <int kLanes, typename acc>
__device__ __forceinline__ void reduce_corners(acc (&x)[4], int lane) {
  const bool odd = lane & 1;
  const acc keep0 = odd ? x[1] : x[0], give0 = odd ? x[0] : x[1];
  const acc keep2 = odd ? x[3] : x[2], give2 = odd ? x[2] : x[3];
  x[0] = keep0 + __shfl_xor_sync(0xffffffff, give0, 1);
  x[1] = keep2 + __shfl_xor_sync(0xffffffff, give2, 1);
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

// What the fused backward keeps of a row's points until it has seen all: in shared memory, for each
// number and point one of each team, side by side.
template <typename acc, int kTeams>
struct Kept {
  acc* of_team;
  static constexpr int kNumbers = 5;  // grad_weight; grad of the reference point's x, y, box

  static int64_t bytes(const BackwardParams& p) {
    if (!p.reference_points) return 0;
    return int64_t(p.grad_reference_points ? kNumbers : 1) * p.points * kTeams * sizeof(acc);
  }
  __device__ __forceinline__ acc& at(const Params& p, int number, int32_t point) const {
    return of_team[(number * p.points + point) * kTeams];
  }
};

// kAdd: adds to grad_value, too.
template <typename scalar_t, Source kSource, int kVec, int kLanes, bool kAdd>
__global__ void __launch_bounds__(kThreads, kAdd ? 3 : 4)
    points_kernel(const __grid_constant__ BackwardParams p) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, 1>;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  constexpr bool kFused = kIsFused<kSource>;
  extern __shared__ __align__(16) char memory[];
  __shared__ int4 offsets[Layout::kSlots];                      // of each corner in value
  __shared__ PerCorner<acc> shares[kAdd ? Layout::kSlots : 1];  // times the point's weight
  __shared__ PerCorner<acc> dots[Layout::kSlots];  // of grad_output with value at each corner
  LevelOf<scalar_t, kSource>* levels = reinterpret_cast<LevelOf<scalar_t, kSource>*>(memory);
  const Kept<acc, Layout::kTeams> kept{reinterpret_cast<acc*>(levels + p.levels) +
                                       threadIdx.x / kLanes};

  let_next_kernel_start();
  const int lane = threadIdx.x % kLanes;
  const int32_t all_points = p.points;
  const int first_slot = Layout::first_slot();
  const int own_slot = first_slot + lane * Layout::kPitch;
  const bool strips = queries_are_pixels(p);

  Work work = find_work<Layout>(p, blockIdx.x);
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
  if (strips) {
    follow_strips(p, levels, work);
    start();
  }
  Softmax<acc> softmax;
  acc kept_sum = 0;  // of weight times its gradient, over this lane's points
  if constexpr (kFused) {
    softmax = find_softmax<scalar_t, kLanes>(p, work.row);
    if (!kAdd && lane == 0 && work.active()) softmaxes<scalar_t>(p)[work.row] = softmax;
  }

  const int64_t origin = (work.batch * p.spatial_size * p.heads + work.head) * p.channels;
  PointCursor cursor(p, lane);
  for (int32_t first = 0; first < all_points; first += kLanes) {
    // Each lane works out one point.
    const bool has_point = first + lane < work.points;
    Corners<acc> corners;
    Location<acc> offset = {};  // fused
    Reference<acc> reference = {};
    acc weight = 0;
    if (has_point) {
      weight = find_weight(p, next, softmax);
      corners = place(p, next, cursor.level, levels[cursor.level]);
      if constexpr (kFused) {
        offset = next.location(p);
        reference = next.reference(p, cursor.level);
      }
    }
    next.skip(p, kLanes);
    if (first + kLanes + lane < work.points) next.read(p);
    __syncwarp();
    offsets[own_slot] = Rows::offsets(p, corners.pixel);
    if constexpr (kAdd) {
#pragma unroll
      for (int j = 0; j < 4; ++j) shares[own_slot].corner[j] = weight * corners.share(j);
    }
    dots[own_slot] = {};
    __syncwarp();

    // The team walks over the channels, and for each part of them over the points.
    for (int32_t part = 0; part < p.channels; part += kLanes * kVec) {
      const int32_t channel = part + lane * kVec;
      const bool has_channel = work.active() && channel < p.channels;
      const scalar_t* value = settled(static_cast<const scalar_t*>(p.value) + origin + channel);
      acc* grad_value = settled(static_cast<acc*>(p.grad_value) + origin + channel);
      acc grad[kVec] = {};
      if (has_channel) {
        Row::load(static_cast<const scalar_t*>(p.grad_output) + work.row * p.channels + channel)
            .unpack(grad);
      }
      Row corner[4];  // outside: not loaded, and the dot product not used
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (i % 4 == 0 && first + i >= all_points) break;
        const int4 offset = offsets[first_slot + i * Layout::kPitch];
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
          if constexpr (kAdd) {
            const acc share = shares[first_slot + i * Layout::kPitch].corner[j];
            acc add[kVec];
#pragma unroll
            for (int c = 0; c < kVec; ++c) add[c] = grad[c] * share;
            if (offset_of[j] >= 0 && has_channel) {
              atomic_add<kVec>(Rows::at(p, grad_value, offset_of[j]), add);
            }
          }
        }
        reduce_corners<kLanes>(dot, lane);
#pragma unroll
        for (int j = 0; j < 4; j += kLanes) {
          if (lane + j < 4) {
            dots[first_slot + i * Layout::kPitch].corner[lane + j] += dot[j / kLanes];
          }
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
      const int64_t point = work.row * all_points + first + lane;
      const LevelOf<scalar_t, kSource>& level = levels[cursor.level];
      const acc grad_weight = corners.sample(dot.corner);
      const bool bilinear = p.method == Method::bilinear;
      const acc grad_x = bilinear ? weight * corners.d_location_x(dot.corner, level) : 0;
      const acc grad_y = bilinear ? weight * corners.d_location_y(dot.corner, level) : 0;
      if constexpr (!kFused) {
        store_weight<scalar_t>(p, point, grad_weight);
        store_location<scalar_t>(p, point, {grad_x, grad_y});
      } else {
        kept.at(p, 0, first + lane) = grad_weight;
        kept_sum += weight * grad_weight;
        // grad_x and grad_y are by location; an offset of one moves that by this much.
        const bool box = p.reference_coordinates == 4;
        const acc box_share = box ? level.units.box_share : 0;
        const acc move_x =
            box ? reference.width * box_share : 1 / static_cast<acc>(max(level.width, 1));
        const acc move_y =
            box ? reference.height * box_share : 1 / static_cast<acc>(max(level.height, 1));
        // Nothing for a point outside: it may not be finite.
        const bool inside = corners.first_pixel() != kOutside;
        store_location<scalar_t>(p, point,
                                 {inside ? grad_x * move_x : 0, inside ? grad_y * move_y : 0});
        if (p.grad_reference_points) {
          kept.at(p, 1, first + lane) = grad_x;
          kept.at(p, 2, first + lane) = grad_y;
          kept.at(p, 3, first + lane) = inside ? grad_x * offset.x * box_share : 0;
          kept.at(p, 4, first + lane) = inside ? grad_y * offset.y * box_share : 0;
        }
      }
    }
    cursor.advance(p, kLanes);
  }

  if constexpr (kFused) {
    // grad_logit = weight * (grad_weight - sum of weight * grad_weight).
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      kept_sum += __shfl_xor_sync(0xffffffff, kept_sum, offset);
    }
    __syncwarp();
    for (int32_t i = lane; i < work.points; i += kLanes) {
      const int64_t point = work.row * all_points + i;
      const acc weight =
          softmax.weight(load_operand<scalar_t>(p.attention_weights, p.weights_dtype, point));
      store_weight<scalar_t>(p, point, weight * (kept.at(p, 0, i) - kept_sum));
    }
    if (p.grad_reference_points && work.active()) {
      const int32_t numbers = p.reference_levels * p.reference_coordinates;
      for (int32_t i = lane; i < numbers; i += kLanes) {
        const int32_t level = i / p.reference_coordinates;
        const int number = i - level * p.reference_coordinates + 1;
        int32_t point = 0;
        for (int32_t l = 0; l < level; ++l) point += points_of_level(p, l);
        const int32_t end = p.reference_levels > 1 ? point + points_of_level(p, level) : all_points;
        acc sum = 0;
        for (; point < end; ++point) sum += kept.at(p, number, point);
        static_cast<acc*>(p.grad_reference_points)[work.row * numbers + i] = sum;
      }
    }
  }
}

// ------------------------------------------------------------------------------------ value,
// gathered

// The most points a level has, of all queries of a (batch, head).
int64_t max_level_points(const Params& p) {
  int64_t points = p.points_per_level;
  for (int32_t l = 0; l < p.levels && p.points_per_level == 0; ++l) {
    points = std::max<int64_t>(points, p.level_points[l]);
  }
  return points * p.queries;
}

// Which pixels some adjacent queries reach in a level: from first to last; none if last < first.
struct Reach {
  int32_t first, last;
};

constexpr int kReachQueries = 128;
constexpr int kReachThreads = 256;
constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kMaxFound = 512;  // points a warp finds at a time, where that is all there are

int32_t reach_chunks(const Params& p) {
  return static_cast<int32_t>(ceil_div<int64_t>(p.queries, kReachQueries));
}
int64_t reach_bytes(const Params& p) {
  return p.batch * p.heads * p.levels * reach_chunks(p) * sizeof(Reach);
}
// Where there are more points than a block holds at once.
bool has_reaches(const Params& p) { return max_level_points(p) > kMaxFound * kGatherWarps; }

// [batch, heads, levels, chunks], in scratch behind the softmaxes.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ Reach* reach_table(const BackwardParams& p) {
  char* scratch = static_cast<char*>(p.scratch);
  if (kIsFused<kSource>) {
    scratch += p.batch * p.queries * p.heads * sizeof(Softmax<acc_t<scalar_t>>);
  }
  return reinterpret_cast<Reach*>(scratch);
}

// Each warp serves kReachQueries queries of a (batch, head, level).
template <typename scalar_t, Source kSource>
__global__ void __launch_bounds__(kReachThreads)
    reach_kernel(const __grid_constant__ BackwardParams p) {
  const int32_t chunks = static_cast<int32_t>(ceil_div<int64_t>(p.queries, kReachQueries));
  const int lane = threadIdx.x % 32;
  int64_t warp = int64_t(blockIdx.x) * (kReachThreads / 32) + threadIdx.x / 32;
  const int32_t level_index = static_cast<int32_t>(warp % p.levels);
  warp /= p.levels;
  const int32_t head = static_cast<int32_t>(warp % p.heads);
  const int64_t chunk = warp / p.heads, batch = p.first_batch + blockIdx.z;
  if (chunk >= chunks) return;

  const auto level = LevelLoader<LevelOf<scalar_t, kSource>>::read(p, level_index);
  int32_t first_point = 0;
  for (int32_t l = 0; l < level_index; ++l) first_point += points_of_level(p, l);
  const int32_t level_points = points_of_level(p, level_index);
  const int64_t first_query = chunk * kReachQueries;
  const int32_t queries =
      static_cast<int32_t>(min(int64_t(kReachQueries), p.queries - first_query));
  int32_t first = INT32_MAX, last = -1;
  for (int32_t i = lane; i < queries * level_points; i += 32) {
    const int32_t query = i / level_points;
    const int64_t query_row = batch * p.queries + first_query + query;
    PointReader<scalar_t, kSource> point;
    point.start(p, query_row * p.heads + head, query_row, first_point + i - query * level_points);
    point.read_location(p);
    const Corners<acc_t<scalar_t>> corners = place(p, point, level_index, level);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (corners.pixel[j] == kOutside) continue;
      first = min(first, corners.pixel[j]);
      last = max(last, corners.pixel[j]);
    }
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    first = min(first, __shfl_xor_sync(0xffffffff, first, offset));
    last = max(last, __shfl_xor_sync(0xffffffff, last, offset));
  }
  if (lane == 0) {
    const int64_t row = (batch * p.heads + head) * p.levels + level_index;
    reach_table<scalar_t, kSource>(p)[row * chunks + chunk] = {first, last};
  }
}

constexpr int kFewSlicePixels = 32;

// What suits a problem.
struct Slicing {
  int32_t pixels;        // that a block owns, at most; even
  int32_t fewest;        // slices of a level, where that makes them kFewSlicePixels or more
  int32_t found;         // points near them that a warp looks for at a time, a multiple of 32
  bool keep_sums;        // in shared memory, as there may be more points than that
  int32_t reach_chunks;  // of each level, or 0: reach_kernel did not run

  // Of a slice of this level.
  __device__ __forceinline__ int32_t pixels_of(const Level& level) const {
    const int32_t share = (ceil_div(level.height * level.width, fewest) + 1) / 2 * 2;
    return min(pixels, max(share, kFewSlicePixels));
  }
  __device__ __forceinline__ int32_t slices_of(const Level& level) const {
    return ceil_div(level.height * level.width, pixels_of(level));
  }
  // At most, unless levels overlap; and one for the pixels of no slice.
  int64_t slices(const Params& p) const {
    return p.spatial_size / pixels + int64_t(p.levels) * fewest + 1;
  }
};

// Shared memory of a block, in this order.
template <typename acc, typename LevelType>
struct GatherMemory {
  acc* sums;    // [pixels, or a team][row]
  acc* shares;  // [pair], pixel after pixel: of a point's corner, times its weight
  LevelType* levels;
  int32_t* queries;  // [pair], where the row of the point's query is
  int32_t* starts;   // [pixels + 1], of a pixel's pairs
  int32_t* found;    // [warp][found], points
  uint16_t* places;  // [warp][pixels], where the warp's next pair of a pixel goes

  static __host__ __device__ int sum_rows(const Slicing& slicing, int teams) {
    return slicing.keep_sums && slicing.pixels > teams ? slicing.pixels : teams;
  }
  static __host__ __device__ int pairs(const Slicing& slicing) {
    return 4 * kGatherWarps * slicing.found;
  }
  static int64_t bytes(const Slicing& slicing, int teams, int row, int32_t levels) {
    return (int64_t(sum_rows(slicing, teams)) * row + pairs(slicing)) * sizeof(acc) +
           levels * sizeof(LevelType) +
           (int64_t(pairs(slicing)) + slicing.pixels + 4 + kGatherWarps * slicing.found) *
               sizeof(int32_t) +
           int64_t(kGatherWarps) * slicing.pixels * sizeof(uint16_t);
  }
  __device__ GatherMemory(char* memory, const Slicing& slicing, int teams, int row, int32_t n) {
    sums = reinterpret_cast<acc*>(memory);
    shares = sums + sum_rows(slicing, teams) * row;
    levels = reinterpret_cast<LevelType*>(shares + pairs(slicing));
    queries = reinterpret_cast<int32_t*>(levels + n);
    starts = queries + pairs(slicing);
    found = starts + slicing.pixels + 4;
    places = reinterpret_cast<uint16_t*>(found + kGatherWarps * slicing.found);
  }
};

// The sum of x over the block's threads before this one; `all` becomes that over all of them.
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
  __syncthreads();
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
__global__ void __launch_bounds__(kGatherThreads, 4)
    gather_kernel(const __grid_constant__ BackwardParams p, const Slicing slicing) {
  using acc = acc_t<scalar_t>;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  constexpr int kRow = kLanes * kVec;  // channels
  constexpr int kTeams = kGatherThreads / kLanes;
  extern __shared__ __align__(16) char memory[];
  const GatherMemory<acc, LevelOf<scalar_t, kSource>> shared(memory, slicing, kTeams, kRow,
                                                             p.levels);
  if (kIsFused<kSource>) wait_for_previous_kernel();
  LevelLoader<LevelOf<scalar_t, kSource>> level_loader;
  level_loader.load(p);
  level_loader.store(p, shared.levels);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = threadIdx.x / kLanes;
  const int32_t parts = ceil_div(p.channels, kRow);
  const int32_t rows = p.heads * parts;
  const int32_t head = blockIdx.x % rows / parts;
  const int32_t channel = blockIdx.x % rows % parts * kRow + threadIdx.x % kLanes * kVec;
  const bool has_channel = channel < p.channels;
  const int64_t batch = p.first_batch + blockIdx.z;
  scalar_t* grad_value = settled(static_cast<scalar_t*>(p.grad_value) +
                                 (batch * p.spatial_size * p.heads + head) * p.channels + channel);
  const scalar_t* grad_output =
      settled(static_cast<const scalar_t*>(p.grad_output) +
              (batch * p.queries * p.heads + head) * p.channels + channel);

  // The first block clears what is in no slice: nothing, if the levels lie side by side.
  const int32_t all_slices = gridDim.x / rows - 1;
  if (blockIdx.x < rows) {
    // body(level, number of its pixels that are in slices). Levels that overlap may lack slices.
    const auto for_levels = [&](auto&& body) {
      int32_t left = all_slices;
      for (int32_t l = 0; l < p.levels; ++l) {
        const auto& level = shared.levels[l];
        const int32_t slices = min(left, slicing.slices_of(level));
        body(level, min(level.height * level.width, slices * slicing.pixels_of(level)));
        left -= slices;
      }
    };
    int32_t covered = 0;
    for_levels([&](const Level& level, int32_t pixels) {
      if (level.start == covered) covered += pixels;
    });
    if (covered != p.spatial_size) {
      for (int32_t pixel = team; pixel < p.spatial_size; pixel += kTeams) {
        bool in_a_slice = false;
        for_levels([&](const Level& level, int32_t pixels) {
          in_a_slice |= is_inside(pixel - level.start, pixels);
        });
        if (!in_a_slice && has_channel) {
          Row{}.store(Rows::at(p, grad_value, Rows::offset(p, pixel)));
        }
      }
    }
    return wait_for_previous_kernel();
  }
  // The others have a slice each: pixels [begin, end) of value. The last levels, which are the
  // coarse ones in most models, come first: their pixels have the most points.
  int32_t slice = all_slices - blockIdx.x / rows, own = 0;
  for (; own < p.levels; ++own) {
    const int32_t slices = slicing.slices_of(shared.levels[own]);
    if (slice < slices) break;
    slice -= slices;
  }
  if (own == p.levels) return wait_for_previous_kernel();
  const LevelOf<scalar_t, kSource>& level = shared.levels[own];
  const int32_t slice_pixels = slicing.pixels_of(level);
  const int32_t begin = level.start + slice * slice_pixels;
  const int32_t end = min(begin + slice_pixels, level.start + level.height * level.width);
  const int32_t pixels = end - begin;

  // Each team adds up some pixels. Where pixels are few, `copies` teams share one.
  const int copies = max(1, min(kTeams / pixels, 32));
  if (copies > 1 || slicing.keep_sums) {
    for (int i = threadIdx.x; i < copies * pixels * kRow; i += kGatherThreads) shared.sums[i] = 0;
  }
  uint16_t* places = shared.places + warp * slicing.pixels;
  int32_t* found = shared.found + warp * slicing.found;

  int32_t first_point = 0;
  for (int32_t l = 0; l < own; ++l) first_point += points_of_level(p, l);
  const int32_t level_points = points_of_level(p, own);
  const int32_t total = static_cast<int32_t>(p.queries * level_points);
  const auto start = [&](int32_t point, PointReader<scalar_t, kSource>& reader) {
    const int32_t query = point / level_points;
    const int64_t row = (batch * p.queries + query) * p.heads + head;
    reader.start(p, row, batch * p.queries + query, first_point + point - query * level_points);
    return query;
  };

  // The warps take chunks of the level's points in turn: 32 points, or where it is known which
  // pixels they reach, as many as that is known of.
  const Reach* reaches =
      slicing.reach_chunks > 0
          ? reach_table<scalar_t, kSource>(p) +
                ((batch * p.heads + head) * p.levels + own) * slicing.reach_chunks
          : nullptr;
  const int32_t chunk_points = reaches ? kReachQueries * level_points : 32;
  const int32_t chunks = ceil_div(total, chunk_points);
  int32_t chunk = warp, in_chunk = 0;  // where this warp goes on

  bool direct = false, more;
  do {
    // Each warp notes which of its points touch the slice.
    int near = 0;
    while (chunk < chunks && near + 32 <= slicing.found) {
      if (reaches && in_chunk == 0) {
        const int32_t of_lane = chunk + lane * kGatherWarps;
        bool reach = false;
        if (of_lane < chunks) {
          const Reach r = reaches[of_lane];
          reach = r.first < end && r.last >= begin;
        }
        const unsigned reaching = __ballot_sync(0xffffffff, reach);
        chunk += kGatherWarps * (reaching ? __ffs(reaching) - 1 : 32);
        if (!reaching) continue;
      }
      const int32_t number = chunk * chunk_points + in_chunk + lane;
      bool touches = false;
      if (number < total) {
        PointReader<scalar_t, kSource> point;
        start(number, point);
        point.read_location(p);
        const Corners<acc> corners = place(p, point, own, level);
#pragma unroll
        for (int j = 0; j < 4; ++j) touches |= is_inside(corners.pixel[j] - begin, pixels);
      }
      const unsigned touching = __ballot_sync(0xffffffff, touches);
      if (touches) found[near + __popc(touching & ((1u << lane) - 1))] = number;
      near += __popc(touching);
      in_chunk += 32;
      if (in_chunk == chunk_points) {
        in_chunk = 0;
        chunk += kGatherWarps;
      }
    }
    more = __syncthreads_or(chunk < chunks);
    direct = copies == 1 && !slicing.keep_sums;

    // body(query, weight, corners) for these points, in a fixed order.
    const auto for_points = [&](auto&& body) {
      for (int32_t i = 0; i < near; i += 32) {
        Corners<acc> corners;
        int32_t query = 0;
        acc weight = 0;
        if (i + lane < near) {
          PointReader<scalar_t, kSource> point;
          query = start(found[i + lane], point);
          point.read(p);
          Softmax<acc> softmax;
          if constexpr (kIsFused<kSource>) {
            softmax = softmaxes<scalar_t>(p)[(batch * p.queries + query) * p.heads + head];
          }
          weight = find_weight(p, point, softmax);
          corners = place(p, point, own, level);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          corners.pixel[j] -= begin;
          if (!is_inside(corners.pixel[j], pixels)) corners.pixel[j] = kOutside;
        }
        body(query, weight, corners);
      }
    };

    for (int i = lane; i < pixels; i += 32) places[i] = 0;
    __syncwarp();
    for_points([&](int32_t, acc, const Corners<acc>& corners) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (corners.pixel[j] == kOutside) continue;
        // Two 16-bit counters share a word; neither overflows.
        atomicAdd(reinterpret_cast<int32_t*>(places) + corners.pixel[j] / 2,
                  corners.pixel[j] & 1 ? 1 << 16 : 1);
      }
    });
    __syncthreads();

    // Where each warp's pairs of each pixel go: pixel after pixel, warp after warp.
    const int32_t per_thread = ceil_div(pixels, kGatherThreads);
    const int32_t first_pixel = min(static_cast<int32_t>(threadIdx.x) * per_thread, pixels);
    const int32_t last_pixel = min(first_pixel + per_thread, pixels);
    int32_t count = 0;
    for (int32_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
#pragma unroll
      for (int w = 0; w < kGatherWarps; ++w) count += shared.places[w * slicing.pixels + pixel];
    }
    int32_t all;
    int32_t place_next = sum_before<kGatherWarps>(count, all);
    for (int32_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
      shared.starts[pixel] = place_next;
#pragma unroll
      for (int w = 0; w < kGatherWarps; ++w) {
        const int32_t n = shared.places[w * slicing.pixels + pixel];
        shared.places[w * slicing.pixels + pixel] = static_cast<uint16_t>(place_next);
        place_next += n;
      }
    }
    if (threadIdx.x == 0) shared.starts[pixels] = all;
    const bool dense = all >= 2 * pixels;
    __syncthreads();

    for_points([&](int32_t query, acc weight, const Corners<acc>& corners) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t pixel = corners.pixel[j];
        const unsigned peers = __match_any_sync(0xffffffff, pixel);
        const int rank = __popc(peers & ((1u << lane) - 1));
        int32_t at = 0;
        if (pixel != kOutside) at = places[pixel] + rank;
        __syncwarp();
        if (pixel != kOutside) {
          if (rank == 0) places[pixel] = static_cast<uint16_t>(at + __popc(peers));
          shared.shares[at] = weight * corners.share(j);
          shared.queries[at] = Rows::offset(p, query);
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
          acc share[kAtOnce];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            const int32_t at_k = at + k * step;
            share[k] = at_k < last ? shared.shares[at_k] : acc(0);
            if (at_k < last && has_channel) {
              rows[k] = Row::load(Rows::at(p, grad_output, shared.queries[at_k]));
            }
          }
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            acc x[kVec];
            rows[k].unpack(x);
#pragma unroll
            for (int c = 0; c < kVec; ++c) sum[c] += share[k] * x[c];
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
        if (has_channel)
          Row::pack(sum).store(Rows::at(p, grad_value, Rows::offset(p, begin + pixel)));
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
  } while (more);

  if (!direct) {
    for (int32_t pixel = team; pixel < pixels; pixel += kTeams) {
      acc sum[kVec] = {};
      for (int copy = 0; copy < copies; ++copy) {
        const acc* kept =
            shared.sums + (copy * pixels + pixel) * kRow + threadIdx.x % kLanes * kVec;
#pragma unroll
        for (int c = 0; c < kVec; ++c) sum[c] += kept[c];
      }
      if (has_channel)
        Row::pack(sum).store(Rows::at(p, grad_value, Rows::offset(p, begin + pixel)));
    }
  }
  wait_for_previous_kernel();
}

// ----------------------------------------------------------------------------------- value,
// scattered

constexpr int kScatterThreads = 256;
constexpr int kScatterQueries = 128;
constexpr int kScatterStrip = 8;  // rows of queries
constexpr int kPointsPerThread = 4;
constexpr int kScatterPoints = kScatterThreads * kPointsPerThread;  // sorted at a time
constexpr int kStagePoints = kScatterPoints / kScatterQueries;      // of each query
constexpr int kBins = 1024;                                         // by the number of the pixel

template <typename scalar_t, Source kSource, int kVec, int kLanes>
__global__ void __launch_bounds__(kScatterThreads, 4)
    scatter_kernel(const __grid_constant__ BackwardParams p) {
  using acc = acc_t<scalar_t>;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  constexpr int kRow = kLanes * kVec;
  constexpr int kTeams = kScatterThreads / kLanes;
  constexpr int kBinsPerThread = kBins / kScatterThreads;
  extern __shared__ __align__(16) char memory[];
  LevelOf<scalar_t, kSource>* levels = reinterpret_cast<LevelOf<scalar_t, kSource>*>(memory);
  __shared__ PerCorner<acc> shares[kScatterPoints];  // of each corner, times the weight
  __shared__ int4 pixels[kScatterPoints];
  __shared__ uint16_t order[kScatterPoints];  // of the points
  __shared__ int32_t bins[kBins];             // how many points, then where they start
  __shared__ int32_t queries[kScatterQueries];

  LevelLoader<LevelOf<scalar_t, kSource>> level_loader;
  level_loader.load(p);
  level_loader.store(p, levels);
  const int team = threadIdx.x / kLanes;
  const int32_t parts = ceil_div(p.channels, kRow);
  const int32_t blocks = static_cast<int32_t>(ceil_div<int64_t>(p.queries, kScatterQueries));
  const int32_t row = blockIdx.x / blocks;
  const int32_t head = row / parts;
  const int32_t channel = row % parts * kRow + threadIdx.x % kLanes * kVec;
  const bool has_channel = channel < p.channels;
  const int64_t batch = p.first_batch + blockIdx.z;
  const int64_t first_query = int64_t(blockIdx.x % blocks) * kScatterQueries;
  const int32_t n_queries =
      static_cast<int32_t>(min(int64_t(kScatterQueries), p.queries - first_query));
  acc* grad_value = settled(static_cast<acc*>(p.grad_value) +
                            (batch * p.spatial_size * p.heads + head) * p.channels + channel);
  const scalar_t* grad_output =
      settled(static_cast<const scalar_t*>(p.grad_output) +
              (batch * p.queries * p.heads + head) * p.channels + channel);

  if (threadIdx.x < n_queries) {
    queries[threadIdx.x] =
        static_cast<int32_t>(query_in_strips<kScatterStrip>(p, levels, first_query + threadIdx.x));
  }
  __syncthreads();

  // This thread's points in each stage: some adjacent ones of a query.
  constexpr int kThreadsPerQuery = kStagePoints / kPointsPerThread;
  const int own_query = threadIdx.x / kThreadsPerQuery;
  const int own_first = threadIdx.x % kThreadsPerQuery * kPointsPerThread;
  const bool has_query = own_query < n_queries;
  const int64_t query_row = has_query ? batch * p.queries + queries[own_query] : 0;
  Softmax<acc> softmax;
  if constexpr (kIsFused<kSource>) softmax = softmaxes<scalar_t>(p)[query_row * p.heads + head];

  PointCursor cursor(p, own_first);
  for (int32_t first = 0; first < p.points; first += kStagePoints) {
    for (int i = threadIdx.x; i < kBins; i += kScatterThreads) bins[i] = 0;
    __syncthreads();

    int32_t own_bin[kPointsPerThread], rank[kPointsPerThread];
    PointReader<scalar_t, kSource> point;
    point.start(p, query_row * p.heads + head, query_row, first + own_first);
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
      const int slot = threadIdx.x * kPointsPerThread + i;
      own_bin[i] = -1;
      if (has_query && first + own_first + i < p.points) {
        point.read(p);
        const acc weight = find_weight(p, point, softmax);
        const Corners<acc> corners = place(p, point, cursor.level, levels[cursor.level]);
        pixels[slot] =
            make_int4(corners.pixel[0], corners.pixel[1], corners.pixel[2], corners.pixel[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) shares[slot].corner[j] = weight * corners.share(j);
        const int32_t pixel = corners.first_pixel();
        if (pixel != kOutside) {
          own_bin[i] = pixel % kBins;
          rank[i] = atomicAdd(bins + own_bin[i], 1);
        }
      }
      point.skip(p, 1);
      cursor.advance(p, 1);
    }
    cursor.advance(p, kStagePoints - kPointsPerThread);
    __syncthreads();

    // Points sorted by bin.
    int32_t in_bins[kBinsPerThread], count = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      in_bins[i] = bins[threadIdx.x * kBinsPerThread + i];
      count += in_bins[i];
    }
    int32_t all;
    int32_t start = sum_before<kScatterThreads / 32>(count, all);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      bins[threadIdx.x * kBinsPerThread + i] = start;
      start += in_bins[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
      if (own_bin[i] >= 0) {
        order[bins[own_bin[i]] + rank[i]] =
            static_cast<uint16_t>(threadIdx.x * kPointsPerThread + i);
      }
    }
    __syncthreads();

    // Each team adds up its share of the sorted points: in registers, until the pixels change.
    const int share_size = (all + kTeams - 1) / kTeams;
    const int begin = min(team * share_size, all), end = min(begin + share_size, all);
    int4 current = make_int4(kOutside, kOutside, kOutside, kOutside);
    acc sums[4][kVec] = {};
    const auto flush = [&](int corner, int32_t pixel) {
      if (pixel != kOutside && has_channel) {
        atomic_add<kVec>(Rows::at(p, grad_value, Rows::offset(p, pixel)), sums[corner]);
      }
    };
    for (int i = begin; i < end; ++i) {
      const int slot = order[i];
      const int4 pixel = pixels[slot];
      const PerCorner<acc> share = shares[slot];
      Row row;
      if (has_channel) {
        const int32_t query = queries[slot / kStagePoints];
        row = Row::load(Rows::at(p, grad_output, Rows::offset(p, query)));
      }
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
        for (int c = 0; c < kVec; ++c) sums[j][c] += share.corner[j] * x[c];
      }
    }
    flush(0, current.x);
    flush(1, current.y);
    flush(2, current.z);
    flush(3, current.w);
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------ method

enum class AddMethod { direct, scatter, gather };

AddMethod find_method(const BackwardParams& p) {
  if (p.deterministic) return AddMethod::gather;
  if (queries_are_pixels(p) && p.value_dtype != DType::f64) return AddMethod::scatter;
  // A half type needs a float copy of grad_value to add to. With few points and many pixels, that
  // costs more than anything else.
  const int64_t elements = p.batch * p.spatial_size * p.heads * p.channels;
  if (is_half(p.value_dtype) && max_level_points(p) <= 2048 && elements >= (1 << 22))
    return AddMethod::gather;
  return AddMethod::direct;
}

// --------------------------------------------------------------------------------------- launchers

// Dynamic shared memory beyond what a kernel may have without asking.
template <typename Kernel>
const char* allow_shared_memory(Kernel kernel, int64_t bytes, const char* too_much) {
  if (bytes <= 16 * 1024) return nullptr;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    if (bytes + static_cast<int64_t>(attributes.sharedSizeBytes) > limit) return too_much;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

constexpr char kTooManyPoints[] =
    "attention_logits has too many points for the shared memory of this GPU";

template <typename scalar_t, int kVec, int kLanes, bool kAdd>
const char* launch_points(const BackwardParams& p, void* stream) {
  using Layout = cuda::Layout<kLanes, 1>;
  return with_source<scalar_t>(p, [&](auto source) {
    const int64_t bytes = p.levels * sizeof(LevelOf<scalar_t, source.value>) +
                          Kept<acc_t<scalar_t>, Layout::kTeams>::bytes(p);
    const auto kernel = points_kernel<scalar_t, source.value, kVec, kLanes, kAdd>;
    const char* error = allow_shared_memory(kernel, bytes, kTooManyPoints);
    if (error) return error;
    return launch(kernel, p, tile_blocks<Layout>(p, 1), head_blocks<Layout>(p), kThreads, bytes,
                  false, stream);
  });
}

template <typename scalar_t, int kVec, int kLanes>
const char* launch_scatter(const BackwardParams& p, void* stream) {
  return with_source<scalar_t>(p, [&](auto source) {
    const int64_t rows = int64_t(p.heads) * ceil_div(p.channels, kLanes * kVec);
    return launch(scatter_kernel<scalar_t, source.value, kVec, kLanes>, p,
                  ceil_div<int64_t>(p.queries, kScatterQueries) * rows, 1, kScatterThreads,
                  p.levels * sizeof(LevelOf<scalar_t, source.value>), false, stream);
  });
}

template <typename scalar_t>
const char* launch_reach(const BackwardParams& p, void* stream) {
  return with_source<scalar_t>(p, [&](auto source) {
    const int64_t warps = int64_t(reach_chunks(p)) * p.heads * p.levels;
    return launch(reach_kernel<scalar_t, source.value>, p,
                  ceil_div<int64_t>(warps, kReachThreads / 32), 1, kReachThreads, 0, false, stream);
  });
}

constexpr int kMaxSlicePixels = 1024, kMinSlicePixels = 128;
constexpr int kFewestSlices = 16;     // of a level, then
constexpr int kFound = 128;           // points a warp finds at a time then
constexpr int kSumBytes = 32 * 1024;  // that are kept then
constexpr int kGatherBytes = 96 * 1024;
constexpr int kStaticBytes = 1024;  // what the kernel has besides, at most

template <typename scalar_t, int kVec, int kLanes>
const char* launch_gather(const BackwardParams& p, void* stream) {
  // With room for the levels of either source.
  using Memory = GatherMemory<acc_t<scalar_t>, FusedLevel<acc_t<scalar_t>>>;
  constexpr int kRow = kLanes * kVec, kTeams = kGatherThreads / kLanes;
  int device = 0, multiprocessors = 0, limit = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& [attribute, number] :
       {std::pair{cudaDevAttrMultiProcessorCount, &multiprocessors},
        std::pair{cudaDevAttrMaxSharedMemoryPerBlockOptin, &limit},
        std::pair{cudaDevAttrComputeCapabilityMajor, &major}}) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(number, attribute, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t most_bytes = std::min(limit - kStaticBytes, kGatherBytes);
  const int64_t points = max_level_points(p);
  if (points > INT32_MAX - kGatherThreads) {
    return "sampling_locations has too many points in a level, expected below 2^31";
  }

  // All points at a time if they fit, and pixels to fill the GPU twice; else what does fit.
  const int64_t rows = int64_t(p.heads) * ceil_div(p.channels, kRow);
  const int64_t to_fill = p.spatial_size * p.batch * rows / (2 * multiprocessors);
  Slicing slicing{static_cast<int32_t>(std::min<int64_t>(
                      std::max<int64_t>(to_fill / 2 * 2, kMinSlicePixels), kMaxSlicePixels)),
                  1, static_cast<int32_t>(ceil_div<int64_t>(points, kGatherThreads) * 32), false,
                  0};
  if (has_reaches(p) || Memory::bytes(slicing, kTeams, kRow, p.levels) > most_bytes) {
    const int32_t pixels = kSumBytes / (kRow * static_cast<int>(sizeof(acc_t<scalar_t>)));
    slicing = {std::min(pixels, kMaxSlicePixels), kFewestSlices, kFound, true,
               has_reaches(p) ? reach_chunks(p) : 0};
    while (slicing.pixels > 2 && Memory::bytes(slicing, kTeams, kRow, p.levels) > most_bytes) {
      slicing.pixels = slicing.pixels / 4 * 2;
    }
  }
  const int64_t bytes = Memory::bytes(slicing, kTeams, kRow, p.levels);
  const int64_t blocks = slicing.slices(p) * rows;
  if (blocks > INT32_MAX) {
    return "value has too many pixels and heads for the deterministic backward";
  }
  const bool overlap = major >= 9;
  return with_source<scalar_t>(p, [&](auto source) {
    const auto kernel = gather_kernel<scalar_t, source.value, kVec, kLanes>;
    const char* message = allow_shared_memory(
        kernel, bytes, "the backward needs more shared memory than this GPU has");
    if (message) return message;
    return launch(kernel, p, blocks, 1, kGatherThreads, bytes, !kIsFused<source.value> && overlap,
                  stream, slicing);
  });
}

// function(vector, lanes): how a row is held, or a part of it: in vectors of up to kMax channels.
template <typename scalar_t, int kMax, typename Function>
const char* with_row(const Params& p, Function&& function) {
  using One = std::integral_constant<int, 1>;
  if (p.channels % kMax != 0 || !Rows<scalar_t, kMax>::fits(p)) {
    return function(One{}, std::integral_constant<int, 32>{});
  }
  return with_lanes<2, 8>(p.channels / kMax, [&](auto lanes) {
    return function(std::integral_constant<int, kMax>{}, lanes);
  });
}

template <typename scalar_t, int kMax, bool kAdd>
const char* launch_points(const BackwardParams& p, void* stream) {
  const char* error = with_row<scalar_t, kMax>(p, [&](auto vec, auto lanes) {
    return launch_points<scalar_t, vec.value, lanes.value, kAdd>(p, stream);
  });
  // Fused, a block keeps its rows' points: then fewer rows a block.
  return error == kTooManyPoints ? launch_points<scalar_t, 1, 32, kAdd>(p, stream) : error;
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

BackwardNeeds backward_needs(const BackwardParams& params) {
  const AddMethod method = find_method(params);
  if (method == AddMethod::direct) return {true, 0};
  const bool gather = method == AddMethod::gather;
  return {!gather,
          softmax_bytes(params) + (gather && has_reaches(params) ? reach_bytes(params) : 0)};
}

const char* backward(const BackwardParams& params, void* stream) {
  const AddMethod method = find_method(params);
  const char* error = nullptr;
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    // A lane's channels fill 16 bytes of sums, so that what a team adds is contiguous.
    constexpr int kSumVec = 16 / sizeof(acc_t<scalar_t>);
    if (method == AddMethod::direct) {
      error = launch_points<scalar_t, kSumVec, true>(params, stream);
      return;
    }
    if (method == AddMethod::gather && has_reaches(params)) {
      error = launch_reach<scalar_t>(params, stream);
      if (error) return;
    }
    error = launch_points<scalar_t, kVec, false>(params, stream);
    if (error) return;
    error = with_row<scalar_t, kSumVec>(params, [&](auto vec, auto lanes) {
      if constexpr (!std::is_same_v<scalar_t, double>) {
        if (method == AddMethod::scatter) {
          return launch_scatter<scalar_t, vec.value, lanes.value>(params, stream);
        }
      }
      return launch_gather<scalar_t, vec.value, lanes.value>(params, stream);
    });
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
