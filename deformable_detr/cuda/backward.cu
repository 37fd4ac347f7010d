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
// * by gather_kernel: a block owns a rectangle of pixels, looks for the points near it, sorts them,
//   and writes each pixel once. Sums have a fixed order, there is no need to clear grad_value
//   first, and its dtype is value's. For few queries, and for all problems if that is asked for.
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
__host__ __device__ inline int64_t softmax_bytes(const BackwardParams& p) {
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

// kAdd: adds to grad_value, too. kSplit: groups of lanes that share a row's points.
template <typename scalar_t, Source kSource, int kVec, int kLanes, int kSplit, bool kAdd>
__global__ void __launch_bounds__(kThreads, kAdd ? 3 : 4)
    points_kernel(const __grid_constant__ BackwardParams p) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, kSplit>;
  constexpr int kTeam = Layout::kTeam;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  constexpr bool kFused = kIsFused<kSource>;
  extern __shared__ __align__(32) char memory[];
  __shared__ int4 offsets[Layout::kSlots];                      // of each corner in value
  __shared__ PerCorner<acc> shares[kAdd ? Layout::kSlots : 1];  // times the point's weight
  __shared__ PerCorner<acc> dots[Layout::kSlots];  // of grad_output with value at each corner
  LevelOf<scalar_t, kSource>* levels = reinterpret_cast<LevelOf<scalar_t, kSource>*>(memory);
  const Kept<acc, Layout::kTeams> kept{reinterpret_cast<acc*>(levels + p.levels) +
                                       threadIdx.x / kTeam};

  let_next_kernel_start();
  const int lane = threadIdx.x % kTeam, group = lane / kLanes;
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
    softmax = find_softmax<scalar_t, kTeam>(p, work.row);
    if (!kAdd && lane == 0 && work.active()) softmaxes<scalar_t>(p)[work.row] = softmax;
  }

  const int64_t origin = (work.batch * p.spatial_size * p.heads + work.head) * p.channels;
  PointCursor cursor(p, lane);
  for (int32_t first = 0; first < all_points; first += kTeam) {
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
    next.skip(p, kTeam);
    if (first + kTeam + lane < work.points) next.read(p);
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
      const int32_t channel = part + lane % kLanes * kVec;
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
        if (i * kSplit % 4 == 0 && first + i * kSplit >= all_points) break;
        const int slot = first_slot + (i * kSplit + group) * Layout::kPitch;
        const int4 offset = offsets[slot];
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
            const acc share = shares[slot].corner[j];
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
          if (lane % kLanes + j < 4) {
            dots[slot].corner[lane % kLanes + j] += dot[j / kLanes];
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
    cursor.advance(p, kTeam);
  }

  if constexpr (kFused) {
    // grad_logit = weight * (grad_weight - sum of weight * grad_weight).
#pragma unroll
    for (int offset = 1; offset < kTeam; offset *= 2) {
      kept_sum += __shfl_xor_sync(0xffffffff, kept_sum, offset);
    }
    __syncwarp();
    for (int32_t i = lane; i < work.points; i += kTeam) {
      const int64_t point = work.row * all_points + i;
      const acc weight =
          softmax.weight(load_operand<scalar_t>(p.attention_weights, p.weights_dtype, point));
      store_weight<scalar_t>(p, point, weight * (kept.at(p, 0, i) - kept_sum));
    }
    if (p.grad_reference_points && work.active()) {
      const int32_t numbers = p.reference_levels * p.reference_coordinates;
      for (int32_t i = lane; i < numbers; i += kTeam) {
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

// ----------------------------------------------------------------------------------- gather: cells

// A point lies in the cell of its north-western corner, the first of which are at -1: of all points
// that touch a pixel, each lies in one of four cells. Sampled by nearest, a point lies in that of
// its pixel, and touches no other; where it is not finite, row or column are -1, which no pixel is.
struct Cell {
  int32_t row, column;
};
constexpr int32_t kNoCell = -2;

template <typename acc>
__device__ __forceinline__ Cell find_cell(const Place<acc>& at, const Level& level, Method method) {
  if (method == Method::nearest) {
    return {at.y.nearest(level.height), at.x.nearest(level.width)};
  }
  const bool touches = at.x.touches(level.width) & at.y.touches(level.height);
  return {touches ? static_cast<int32_t>(at.y.floor) : kNoCell,
          touches ? static_cast<int32_t>(at.x.floor) : kNoCell};
}

// Some pixels of a level, and their cells: a row to the north and a column to the west more.
struct Rectangle {
  int32_t row, column, height, width;

  __device__ __forceinline__ int32_t pixels() const { return height * width; }
  __device__ __forceinline__ int32_t cells() const { return (height + 1) * (width + 1); }
  // The number of a cell, row by row, or kOutside.
  __device__ __forceinline__ int32_t number(const Cell& cell) const {
    const int32_t south = cell.row - row + 1, east = cell.column - column + 1;
    const bool inside = is_inside(south, height + 1) & is_inside(east, width + 1);
    return inside ? south * (width + 1) + east : kOutside;
  }
  // Cuts the longer side in two.
  __device__ __forceinline__ Rectangle half(bool second) const {
    Rectangle part = *this;
    if (height > width) {
      const int32_t first = ceil_div(height, 2);
      part.row += second ? first : 0;
      part.height = second ? height - first : first;
    } else {
      const int32_t first = ceil_div(width, 2);
      part.column += second ? first : 0;
      part.width = second ? width - first : first;
    }
    return part;
  }
};

// Whether a point may lie in a cell of a rectangle: seldom yes where it does not, never no where
// it does. An axis at a time, in pixels.
template <typename acc>
struct MayTouch {
  acc size, middle, extent;

  __device__ __forceinline__ MayTouch(int32_t first, int32_t pixels, int32_t of)
      : size(static_cast<acc>(of)),
        middle(static_cast<acc>(first) + acc(0.5) * static_cast<acc>(pixels)),
        extent(acc(0.5) * static_cast<acc>(pixels) + acc(0.51) + rounding(first + pixels)) {}
  __device__ __forceinline__ bool operator()(acc location, Method method) const {
    return is_near(fma(location, size, -middle), 0, method);
  }
  // A reference point moved by some pixels.
  __device__ __forceinline__ bool operator()(acc reference, acc move, Method method) const {
    const acc from = fma(reference, size, -middle);
    return is_near(from + move, rounding(fabs(from) + fabs(move)), method);
  }

 private:
  __device__ __forceinline__ bool is_near(acc distance, acc error, Method method) const {
    // Nearest moves points into the map.
    if (method == Method::nearest) distance = min(max(distance, -middle), size - middle);
    return fabs(distance) < extent + error;
  }
  static __device__ __forceinline__ acc rounding(acc pixels) { return acc(1e-6) * pixels; }
};

// ---------------------------------------------------------------------------------- gather: slices

// The most points a level has, of all queries of a (batch, head).
int64_t max_level_points(const Params& p) {
  int64_t points = p.points_per_level;
  for (int32_t l = 0; l < p.levels && p.points_per_level == 0; ++l) {
    points = std::max<int64_t>(points, p.level_points[l]);
  }
  return points * p.queries;
}

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kLookAhead = 4;   // groups of 32 points that a warp looks at together
constexpr int kMaxFound = 512;  // points a warp finds at a time, at most
constexpr int kMaxSide = 64;    // of a slice
constexpr int kFewSlicePixels = 32;

// Divides numbers below 2^31.
struct Divisor {
  uint32_t factor, shift;

  Divisor() = default;
  __device__ __forceinline__ explicit Divisor(int32_t by) {
    // factor = 2^(31 + shift) / by, rounded up: divided in two steps, as in 64 bits it takes long.
    shift = by > 1 ? 32 - __clz(by - 1) : 0;
    const uint32_t high = (1u << 31) / by, left = (1u << 31) % by;
    const uint64_t rest = uint64_t(left) << shift;
    const auto rounded_up = [&](auto x) { return static_cast<uint32_t>((x + by - 1) / by); };
    factor = (high << shift) +
             (rest < (1u << 31) ? rounded_up(static_cast<uint32_t>(rest)) : rounded_up(rest));
  }
  __device__ __forceinline__ int32_t divide(int32_t x) const {
    return static_cast<int32_t>(__umulhi(2 * static_cast<uint32_t>(x), factor) >> shift);
  }
};

// The slices of a level: rectangles, about square, row by row.
struct Slices {
  int32_t number, across;  // how many, and how many side by side
  int32_t height, width;   // of the first
  int32_t first_point;     // of the level
  Divisor by_points;

  __device__ __forceinline__ Rectangle at(const Level& level, int32_t index) const {
    const int32_t down = index / across;
    const int32_t row = down * height, column = (index - down * across) * width;
    return {row, column, min(height, level.height - row), min(width, level.width - column)};
  }
};

// What suits a problem.
struct Slicing {
  int32_t pixels;        // of a slice, at most
  int32_t fewest;        // slices of a level, where that makes them kFewSlicePixels or more
  int32_t found;         // points near its pixels that a warp looks for at a time
  int32_t kept_pixels;   // whose sums fit into shared memory
  int32_t reach_chunks;  // of each level, or 0: reach_kernel did not run

  __device__ __forceinline__ Slices cut(const Params& p, int32_t index, const Level& level) const {
    Slices slices{};
    for (int32_t l = 0; l < index; ++l) slices.first_point += points_of_level(p, l);
    slices.by_points = Divisor(max(points_of_level(p, index), 1));
    const int32_t all = level.height * level.width;
    if (all == 0) return slices;
    // Unsigned, as sides may be near 2^31.
    const auto shares = [](uint32_t size, uint32_t most) {
      return static_cast<int32_t>(ceil_div(size, most));
    };
    const auto share = [&](int32_t size, int32_t most) { return shares(size, shares(size, most)); };
    const int32_t most = min(pixels, max(shares(all, fewest), kFewSlicePixels));
    const int32_t side = min(static_cast<int32_t>(sqrtf(static_cast<float>(most))), kMaxSide);
    slices.width = share(level.width, side);
    slices.height = share(level.height, min(most / slices.width, kMaxSide));
    slices.across = shares(level.width, slices.width);
    slices.number = shares(level.height, slices.height) * slices.across;
    return slices;
  }
  // Points a block finds at a time, at most.
  __host__ __device__ __forceinline__ int slots() const { return kGatherWarps * found; }
  // Room for the cells of a slice: even, as two counters share a word.
  __host__ __device__ __forceinline__ int cells() const {
    return (pixels + 2 * kMaxSide + 3) / 2 * 2;
  }
  // About as many slices as all levels have.
  int64_t slices(const Params& p) const {
    return p.spatial_size / pixels * 5 / 4 + int64_t(p.levels) * fewest + 2;
  }
};

// In which row of a rectangle a pixel is: exact for sides up to kMaxSide and up to 2^16 / kMaxSide
// pixels.
struct RowOf {
  uint32_t factor;  // 2^16 / width, rounded up

  __device__ __forceinline__ int32_t operator()(int32_t pixel) const {
    return static_cast<int32_t>(pixel * factor >> 16);
  }
};

// What a block is at: a part of a slice. Slices are halved while there are too many points near.
struct Part {
  int32_t level;  // p.levels: no more slices
  Rectangle slice, pixels;
  int32_t depth, number;  // of 2^depth parts
  RowOf row_of;           // in `pixels`

  // The last levels, which are the coarse ones in most models, come first: their pixels have the
  // most points.
  template <typename LevelType>
  __device__ __forceinline__ void start(const Params& p, const LevelType* levels,
                                        const Slices* slices, int64_t index) {
    for (level = p.levels - 1; level >= 0 && index >= slices[level].number; --level) {
      index -= slices[level].number;
    }
    if (level < 0) {
      level = p.levels;
      return;
    }
    slice = slices[level].at(levels[level], static_cast<int32_t>(index));
    depth = number = 0;
    cut();
  }
  __device__ __forceinline__ void halve() {
    ++depth;
    number *= 2;
    cut();
  }
  // False after the last part.
  __device__ __forceinline__ bool next() {
    for (++number; depth > 0 && number % 2 == 0; --depth) number /= 2;
    if (depth > 0) cut();
    return depth > 0;
  }

 private:
  __device__ __forceinline__ void cut() {
    pixels = slice;
    for (int32_t d = depth - 1; d >= 0; --d) pixels = pixels.half(number >> d & 1);
    row_of.factor = ((1u << 16) + pixels.width - 1) / pixels.width;
  }
};

// ----------------------------------------------------------------------------------- gather: reach

// Which cells some adjacent queries reach in a level, from first to last; none if last < first.
struct alignas(16) Reach {
  Cell first, last;

  __device__ __forceinline__ bool touches(const Rectangle& x) const {
    return last.row >= x.row - 1 && first.row < x.row + x.height && last.column >= x.column - 1 &&
           first.column < x.column + x.width;
  }
};

constexpr int kReachQueries = 128;
constexpr int kReachThreads = 256;

// Where there are more points than a block holds at once.
bool has_reaches(const Params& p) { return max_level_points(p) > kMaxFound * kGatherWarps; }

// The table of reaches: [batch, heads, levels, chunks], in scratch behind the softmaxes.
__host__ __device__ inline int32_t reach_chunks(const Params& p) {
  return static_cast<int32_t>(ceil_div<int64_t>(p.queries, kReachQueries));
}
__host__ __device__ inline int64_t reach_offset(const BackwardParams& p) {
  return ceil_div<int64_t>(softmax_bytes(p), alignof(Reach)) * alignof(Reach);
}
int64_t reach_bytes(const Params& p) {
  return p.batch * p.heads * p.levels * reach_chunks(p) * sizeof(Reach);
}
__device__ __forceinline__ Reach* reaches_of(const BackwardParams& p, int64_t batch, int32_t head,
                                             int32_t level) {
  Reach* table = reinterpret_cast<Reach*>(static_cast<char*>(p.scratch) + reach_offset(p));
  return table + ((batch * p.heads + head) * p.levels + level) * reach_chunks(p);
}

// Each warp serves kReachQueries queries of a (batch, head, level).
template <typename scalar_t, Source kSource>
__global__ void __launch_bounds__(kReachThreads)
    reach_kernel(const __grid_constant__ BackwardParams p) {
  const int lane = threadIdx.x % 32;
  int64_t warp = int64_t(blockIdx.x) * (kReachThreads / 32) + threadIdx.x / 32;
  const int32_t level_index = static_cast<int32_t>(warp % p.levels);
  warp /= p.levels;
  const int32_t head = static_cast<int32_t>(warp % p.heads);
  const int64_t chunk = warp / p.heads, batch = p.first_batch + blockIdx.z;
  if (chunk >= reach_chunks(p)) return;

  const auto level = LevelLoader<LevelOf<scalar_t, kSource>>::read(p, level_index);
  int32_t first_point = 0;
  for (int32_t l = 0; l < level_index; ++l) first_point += points_of_level(p, l);
  const int32_t level_points = points_of_level(p, level_index);
  const int64_t first_query = chunk * kReachQueries;
  const int32_t queries =
      static_cast<int32_t>(min(int64_t(kReachQueries), p.queries - first_query));
  Reach reach{{INT32_MAX, INT32_MAX}, {kNoCell, kNoCell}};
  for (int32_t i = lane; i < queries * level_points; i += 32) {
    const int32_t query = i / level_points;
    const int64_t query_row = batch * p.queries + first_query + query;
    PointReader<scalar_t, kSource> point;
    point.start(p, query_row * p.heads + head, query_row, first_point + i - query * level_points);
    point.read_location(p);
    const Cell cell = find_cell(locate(p, point, level_index, level), level, p.method);
    if (cell.row == kNoCell) continue;
    reach.first = {min(reach.first.row, cell.row), min(reach.first.column, cell.column)};
    reach.last = {max(reach.last.row, cell.row), max(reach.last.column, cell.column)};
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const auto other = [&](int32_t x) { return __shfl_xor_sync(0xffffffff, x, offset); };
    reach.first.row = min(reach.first.row, other(reach.first.row));
    reach.first.column = min(reach.first.column, other(reach.first.column));
    reach.last.row = max(reach.last.row, other(reach.last.row));
    reach.last.column = max(reach.last.column, other(reach.last.column));
  }
  if (lane == 0) reaches_of(p, batch, head, level_index)[chunk] = reach;
}

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

// ---------------------------------------------------------------------------------------- scatter

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
  extern __shared__ __align__(32) char memory[];
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
  // To add to grad_value it has to be cleared first, and in a half type a float copy of it, too.
  // Where points are few and pixels are many, that costs more than looking for points.
  const int64_t elements = p.batch * p.spatial_size * p.heads * p.channels;
  const int64_t points = max_level_points(p);
  const bool gather =
      is_half(p.value_dtype)
          ? points <= 4096 && elements >= (points <= 2048 ? 1 << 22 : 1 << 23)
          : points >= 1024 && points <= 4096 && elements >= (points <= 2048 ? 1 << 24 : 1 << 23);
  return gather ? AddMethod::gather : AddMethod::direct;
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

template <typename scalar_t, int kVec, int kLanes, int kSplit, bool kAdd>
const char* launch_points(const BackwardParams& p, void* stream) {
  using Layout = cuda::Layout<kLanes, kSplit>;
  return with_source<scalar_t>(p, [&](auto source) {
    const int64_t bytes = p.levels * sizeof(LevelOf<scalar_t, source.value>) +
                          Kept<acc_t<scalar_t>, Layout::kTeams>::bytes(p);
    const auto kernel = points_kernel<scalar_t, source.value, kVec, kLanes, kSplit, kAdd>;
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

// function(vector, lanes): how a row is held, or a part of it: in vectors of up to kMax channels.
template <typename scalar_t, int kMax, typename Function>
const char* with_row(const Params& p, Function&& function) {
  // Rows of double are long enough as they are.
  if constexpr (sizeof(scalar_t) < sizeof(double)) {
    if (p.channels % kMax == 0 && Rows<scalar_t, kMax>::fits(p)) {
      return with_lanes<2, 8>(p.channels / kMax, [&](auto lanes) {
        return function(std::integral_constant<int, kMax>{}, lanes);
      });
    }
  }
  return function(std::integral_constant<int, 1>{}, std::integral_constant<int, 32>{});
}

constexpr int kSharing = 16;   // lanes that share a row's points, where rows are few
constexpr int kFewPoints = 8;  // of a row, too few to share

template <typename scalar_t, int kMax, bool kAdd>
const char* launch_points(const BackwardParams& p, void* stream) {
  const char* error = with_row<scalar_t, kMax>(p, [&](auto vec, auto lanes) {
    constexpr int kVec = vec.value, kLanes = lanes.value;
    // In the kernels for the 32 channels that most models have, so that the library stays small.
    if constexpr (kVec * kLanes == 32 && kVec > 1) {
      if (p.batch * p.queries * p.heads <= kFewRows && p.points > kFewPoints) {
        return launch_points<scalar_t, kVec, kLanes, kSharing / kLanes, kAdd>(p, stream);
      }
    }
    return launch_points<scalar_t, kVec, kLanes, 1, kAdd>(p, stream);
  });
  // Fused, a block keeps its rows' points: then fewer rows a block.
  return error == kTooManyPoints ? launch_points<scalar_t, 1, 32, 1, kAdd>(p, stream) : error;
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

BackwardNeeds backward_needs(const BackwardParams& params) {
  const AddMethod method = find_method(params);
  if (method == AddMethod::direct) return {true, 0};
  const bool gather = method == AddMethod::gather;
  return {!gather, gather && has_reaches(params) ? reach_offset(params) + reach_bytes(params)
                                                 : softmax_bytes(params)};
}

const char* backward(const BackwardParams& params, void* stream) {
  const AddMethod method = find_method(params);
  constexpr int64_t kMostPoints = INT32_MAX - kLookAhead * kGatherThreads;
  if (params.points > kMostPoints ||
      (method == AddMethod::gather && max_level_points(params) > kMostPoints)) {
    return "sampling_locations has too many points in a level, expected below 2^31";
  }
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
    if (method == AddMethod::gather) {
      error = with_row<scalar_t, kVec>(params, [&](auto vec, auto lanes) {
        return launch_gather<scalar_t, vec.value, lanes.value>(params, stream);
      });
    } else if constexpr (!std::is_same_v<scalar_t, double>) {
      error = with_row<scalar_t, kSumVec>(params, [&](auto vec, auto lanes) {
        return launch_scatter<scalar_t, vec.value, lanes.value>(params, stream);
      });
    }
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
