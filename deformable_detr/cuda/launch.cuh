// How work is laid out over the GPU, the same in forward and backward.
//
// A team of lanes (a power of two, inside one warp) serves one row: a (batch, query, head). Each
// lane owns kVec adjacent channels. The geometry of the points is worked out once: each lane takes
// one point of a stage, and leaves it in shared memory, where the whole team reads it.
//
// A block serves a tile: some adjacent queries, and as many heads as make a 128-byte line of value,
// so that a line brought into L1 is used whole.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "deformable_detr/cuda/vec.cuh"
#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 1024;
constexpr int64_t kMaxBlocksYZ = 65535;
// With fewer rows a GPU has lanes to spare: groups of them share a row's points.
constexpr int64_t kFewRows = 16384;

template <typename integer_t>
__host__ __device__ constexpr integer_t ceil_div(integer_t a, integer_t b) {
  return (a + b - 1) / b;
}

// ------------------------------------------------------------------------------------------ layout

// How a block's threads are cut into teams, and its tile into queries and heads. kLanes lanes hold
// a row's channels, 16 bytes each; kSplit such groups share the points of one row.
template <int kLanes, int kSplit, int kBlock = kThreads>
struct Layout {
  static constexpr int kTeam = kLanes * kSplit;
  static constexpr int kTeams = kBlock / kTeam;
  static constexpr int kTileHeads = kLanes < 8 ? 8 / kLanes : 1;
  static constexpr int kTileQueries = kTeams / kTileHeads;

  // Shared memory for a stage: per warp kTeam points of each of its teams. The teams read the same
  // point at the same time, so its entries are adjacent; the gap after them keeps lanes that write
  // the points of one team in different banks.
  static constexpr int kWarpTeams = 32 / kTeam;
  static constexpr int kPitch = kWarpTeams + (kWarpTeams > 4 ? kWarpTeams / 4 : kWarpTeams > 1);
  static constexpr int kSlots = kBlock / 32 * kTeam * kPitch;

  // Where this thread's team keeps its point 0; point i is i * kPitch further.
  static __device__ __forceinline__ int first_slot() {
    return threadIdx.x / 32 * kTeam * kPitch + threadIdx.x % 32 / kTeam;
  }
};

// The row that this thread's team serves.
struct Work {
  int64_t batch, query;
  int64_t row;  // (batch * queries + query) * heads + head
  int32_t head;
  int32_t points;  // to serve: none for a team without a row, in the last tile

  __device__ __forceinline__ bool active() const { return points > 0; }
  // In the order of reference_points.
  __device__ __forceinline__ int64_t query_row(const Params& p) const {
    return active() ? batch * p.queries + query : 0;
  }
};

template <typename Layout>
__device__ __forceinline__ Work find_work(const Params& p, int64_t tile) {
  const int team = threadIdx.x / Layout::kTeam;
  Work work;
  work.query = tile * Layout::kTileQueries + team / Layout::kTileHeads;
  work.batch = p.first_batch + blockIdx.z;
  work.head = blockIdx.y * Layout::kTileHeads + team % Layout::kTileHeads;
  const bool active = work.query < p.queries && work.head < p.heads;
  work.points = active ? p.points : 0;
  work.row = active ? (work.batch * p.queries + work.query) * p.heads + work.head : 0;
  if (!active) work.head = 0;
  return work;
}

// Where the queries are the pixels (an encoder), neighbouring queries sample neighbouring pixels.
// Their levels can be served in strips of kRows rows, column after column, so that a block's tile
// is about square and its samples meet.
__host__ __device__ __forceinline__ bool queries_are_pixels(const Params& p) {
  return p.queries == p.spatial_size;
}

template <int kRows, typename LevelType>
__device__ __forceinline__ int64_t query_in_strips(const Params& p, const LevelType* levels,
                                                   int64_t query) {
  int32_t first = 0;
  for (int32_t l = 0; l < p.levels; ++l) {
    const Level& level = levels[l];
    const int32_t pixels = level.height * level.width;
    if (pixels > p.queries - first) break;  // bad metadata
    const int32_t index = static_cast<int32_t>(query) - first;
    if (index < pixels) {
      const int32_t strip = index / level.width / kRows;
      const int32_t in_strip = index - strip * kRows * level.width;
      const int32_t rows = min(kRows, level.height - strip * kRows);
      const int32_t column = rows == kRows ? in_strip / kRows : in_strip / rows;
      const int32_t row = strip * kRows + in_strip - column * rows;
      return first + row * level.width + column;
    }
    first += pixels;
  }
  return query;
}

// The same for the row of a team: what find_work gives is its place in the strips.
template <typename LevelType>
__device__ __forceinline__ void follow_strips(const Params& p, const LevelType* levels,
                                              Work& work) {
  if (!work.active()) return;
  const int64_t query = query_in_strips<4>(p, levels, work.query);
  work.row += (query - work.query) * p.heads;
  work.query = query;
}

// ------------------------------------------------------------------------------------------ source

// How points are given: as locations and weights, or fused as reference points, offsets and logits;
// all in value's dtype, or mixed: some of them as float beside a half value.
enum class Source { same, mixed, fused, fused_mixed };

template <Source kSource>
constexpr bool kIsFused = kSource == Source::fused || kSource == Source::fused_mixed;
template <Source kSource>
constexpr bool kIsMixed = kSource == Source::mixed || kSource == Source::fused_mixed;

// ------------------------------------------------------------------------------------------ levels

// What kernels keep of a level in shared memory.
template <typename acc>
struct FusedLevel : Level {
  OffsetUnits<acc> units;
};
template <typename scalar_t, Source kSource>
using LevelOf = std::conditional_t<kIsFused<kSource>, FusedLevel<acc_t<scalar_t>>, Level>;

// Fills the table of levels. A block's threads load() it to registers, may load other things
// meanwhile, and store() it for all.
template <typename LevelType>
struct LevelLoader {
  LevelType level;

  __device__ __forceinline__ void load(const Params& p) {
    if (threadIdx.x < p.levels) level = read(p, threadIdx.x);
  }
  __device__ __forceinline__ void store(const Params& p, LevelType* table) {
    if (threadIdx.x < p.levels) table[threadIdx.x] = level;
    for (int i = threadIdx.x + blockDim.x; i < p.levels; i += blockDim.x) table[i] = read(p, i);
    __syncthreads();
  }
  static __device__ __forceinline__ LevelType read(const Params& p, int32_t i) {
    LevelType level;
    static_cast<Level&>(level) = read_level(p, i);
    if constexpr (!std::is_same_v<LevelType, Level>) {
      if (p.reference_coordinates == 4) {
        level.units = offset_units<decltype(level.units.box_share)>(p, i, level);
      }
    }
    return level;
  }
};

// The level of a lane's point, while the lane steps from stage to stage.
struct PointCursor {
  int32_t level, point;  // point: in the level

  __device__ __forceinline__ PointCursor(const Params& p, int lane) : level(0), point(lane) {
    settle(p);
  }
  __device__ __forceinline__ void advance(const Params& p, int32_t step) {
    point += step;
    settle(p);
  }

 private:
  // Beyond the last point, the level is whatever it is.
  __device__ __forceinline__ void settle(const Params& p) {
    if (p.points_per_level > 0) {
      for (; point >= p.points_per_level; point -= p.points_per_level) ++level;
    } else {
      for (; level < p.levels && point >= p.level_points[level]; ++level) {
        point -= p.level_points[level];
      }
    }
  }
};

// ------------------------------------------------------------------------------------------ points

template <typename acc>
struct Location {
  acc x, y;
};

// A query's reference point for a level; its box where it has one.
template <typename acc>
struct Reference {
  acc x, y, width, height;
};

// Element `index` of a tensor stored as scalar_t or, beside a half value, as float.
template <typename scalar_t>
__device__ __forceinline__ acc_t<scalar_t> load_operand(const void* data, DType dtype,
                                                        int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  return to_acc(static_cast<const scalar_t*>(data)[index]);
}

// N numbers as they are stored. They are not converted yet, as that would wait for them.
template <typename scalar_t, int N, bool kMixed>
struct Stored {
  Vec<scalar_t, N> bits;

  static __device__ __forceinline__ int32_t bytes(DType) { return N * sizeof(scalar_t); }
  __device__ __forceinline__ void read(const char* at, DType) {
    bits = Vec<scalar_t, N>::load(reinterpret_cast<const scalar_t*>(at));
  }
  __device__ __forceinline__ void unpack(acc_t<scalar_t> (&x)[N], DType) const { bits.unpack(x); }
};
// scalar_t is a half type; they may be float.
template <typename scalar_t, int N>
struct Stored<scalar_t, N, true> {
  typename Bits<4 * N>::type bits{};

  static __device__ __forceinline__ int32_t bytes(DType dtype) {
    return N * (dtype == DType::f32 ? sizeof(float) : sizeof(scalar_t));
  }
  __device__ __forceinline__ void read(const char* at, DType dtype) {
    if (dtype == DType::f32) {
      bits = Vec<float, N>::load(reinterpret_cast<const float*>(at)).bits;
    } else {
      reinterpret_cast<Vec<scalar_t, N>&>(bits) =
          Vec<scalar_t, N>::load(reinterpret_cast<const scalar_t*>(at));
    }
  }
  __device__ __forceinline__ void unpack(float (&x)[N], DType dtype) const {
    if (dtype == DType::f32) {
      reinterpret_cast<const Vec<float, N>&>(bits).unpack(x);
    } else {
      reinterpret_cast<const Vec<scalar_t, N>&>(bits).unpack(x);
    }
  }
};

// Reads points, each before it is needed.
template <typename scalar_t, Source kSource>
struct PointReader {
  using acc = acc_t<scalar_t>;
  static constexpr bool kMixed = kIsMixed<kSource>;

  // The next point to read is number `point` of the row. query_row: see Work.
  __device__ __forceinline__ void start(const Params& p, int64_t row, int64_t query_row,
                                        int32_t point) {
    const int64_t index = row * p.points + point;
    location_at_ = static_cast<const char*>(p.sampling_locations) + index * location_bytes(p);
    weight_at_ = static_cast<const char*>(p.attention_weights) + index * weight_bytes(p);
    if constexpr (kIsFused<kSource>) {
      references_at_ = static_cast<const char*>(p.reference_points) +
                       query_row * p.reference_levels * reference_bytes(p);
    }
  }
  __device__ __forceinline__ void skip(const Params& p, int32_t points) {
    location_at_ += int64_t(points) * location_bytes(p);
    weight_at_ += int64_t(points) * weight_bytes(p);
  }
  // On to the same point of a query further on.
  __device__ __forceinline__ void skip_queries(const Params& p, int32_t queries) {
    const int64_t points = int64_t(p.heads) * p.points;
    location_at_ += queries * (points * location_bytes(p));
    weight_at_ += queries * (points * weight_bytes(p));
    if constexpr (kIsFused<kSource>) {
      references_at_ += queries * (int64_t(p.reference_levels) * reference_bytes(p));
    }
  }
  __device__ __forceinline__ void read_location(const Params& p) {
    location_.read(location_at_, p.locations_dtype);
  }
  __device__ __forceinline__ void read_weight(const Params& p) {
    weight_.read(weight_at_, p.weights_dtype);
  }
  __device__ __forceinline__ void read(const Params& p) {
    read_location(p);
    read_weight(p);
  }

  // The location, or fused the offset.
  __device__ __forceinline__ Location<acc> location(const Params& p) const {
    acc xy[2];
    location_.unpack(xy, p.locations_dtype);
    return {xy[0], xy[1]};
  }
  // The weight, or fused the logit.
  __device__ __forceinline__ acc weight(const Params& p) const {
    acc x[1];
    weight_.unpack(x, p.weights_dtype);
    return x[0];
  }
  // Of the point's query. Read only now: all heads and points of a query share it.
  __device__ __forceinline__ Reference<acc> reference(const Params& p, int32_t level) const {
    const char* at = references_at_ + (p.reference_levels > 1 ? level * reference_bytes(p) : 0);
    const bool has_box = p.reference_coordinates == 4;
    Pair point, box;
    point.read(at, p.reference_dtype);
    if (has_box) box.read(at + Pair::bytes(p.reference_dtype), p.reference_dtype);
    acc xy[2], extent[2] = {};
    point.unpack(xy, p.reference_dtype);
    if (has_box) box.unpack(extent, p.reference_dtype);
    return {xy[0], xy[1], extent[0], extent[1]};
  }

 private:
  using Pair = Stored<scalar_t, 2, kMixed>;
  using One = Stored<scalar_t, 1, kMixed>;
  const char *location_at_, *weight_at_, *references_at_;
  Pair location_;
  One weight_;

  static __device__ __forceinline__ int32_t location_bytes(const Params& p) {
    return Pair::bytes(p.locations_dtype);
  }
  static __device__ __forceinline__ int32_t weight_bytes(const Params& p) {
    return One::bytes(p.weights_dtype);
  }
  static __device__ __forceinline__ int32_t reference_bytes(const Params& p) {
    return p.reference_coordinates / 2 * Pair::bytes(p.reference_dtype);
  }
};

// The coordinates of a point that was read, in this level.
template <typename acc>
struct Place {
  Coordinate<acc> x, y;
};

template <typename scalar_t, Source kSource>
__device__ __forceinline__ Place<acc_t<scalar_t>> locate(
    const Params& p, const PointReader<scalar_t, kSource>& point, int32_t level_index,
    const LevelOf<scalar_t, kSource>& level) {
  using acc = acc_t<scalar_t>;
  const Location<acc> location = point.location(p);
  if constexpr (!kIsFused<kSource>) {
    return {Coordinate<acc>(location.x, level.width), Coordinate<acc>(location.y, level.height)};
  } else {
    const Reference<acc> reference = point.reference(p, level_index);
    Exact<acc> move_x{location.x, 0}, move_y{location.y, 0};
    if (p.reference_coordinates == 4) {
      move_x = multiply(location.x, multiply(reference.width, level.units.x));
      move_y = multiply(location.y, multiply(reference.height, level.units.y));
    }
    return {Coordinate<acc>(moved_pixel(reference.x, level.width, move_x)),
            Coordinate<acc>(moved_pixel(reference.y, level.height, move_y))};
  }
}

// Its corners there.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ Corners<acc_t<scalar_t>> place(
    const Params& p, const PointReader<scalar_t, kSource>& point, int32_t level_index,
    const LevelOf<scalar_t, kSource>& level) {
  const auto at = locate(p, point, level_index, level);
  return Corners<acc_t<scalar_t>>(at.x, at.y, level, p.method);
}

// exp(x) of x <= 0, to a few units of the last place of 1.
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// A number for each corner of a point.
template <typename acc>
struct alignas(4 * sizeof(acc)) PerCorner {
  acc corner[4];
};

// ---------------------------------------------------------------------------------------- pixels

// A pointer that the compiler knows nothing of: it would undo an addition, to do it at each use.
template <typename T>
__device__ __forceinline__ T* settled(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Finds rows of a tensor like value. Vectors are counted in 32 bits, so that an address is
// one multiply-add; fits() tells whether that is enough. Single elements are counted in 64 bits.
template <typename scalar_t, int kVec>
struct Rows {
  static bool fits(const Params& p) {
    const int64_t rows = std::max(p.spatial_size, p.queries) * p.heads;
    return kVec == 1 || rows * p.channels / kVec <= INT32_MAX;
  }
  // Of a pixel, or a query in a tensor like output. Negative for a pixel outside.
  static __device__ __forceinline__ int32_t offset(const Params& p, int32_t pixel) {
    return kVec == 1 ? pixel : pixel * (p.heads * p.channels / kVec);
  }
  static __device__ __forceinline__ int4 offsets(const Params& p, const int32_t (&pixel)[4]) {
    return make_int4(offset(p, pixel[0]), offset(p, pixel[1]), offset(p, pixel[2]),
                     offset(p, pixel[3]));
  }
  template <typename element_t>
  static __device__ __forceinline__ element_t* at(const Params& p, element_t* origin,
                                                  int32_t offset) {
    if constexpr (kVec == 1) {
      return origin + int64_t(offset) * (p.heads * p.channels);
    } else {
      return origin + int64_t(offset) * kVec;
    }
  }
};

// ------------------------------------------------------------------------------------------ launch

// Launches a kernel over groups of tiles (x), groups of heads (y) and batches (z; as many launches
// as it takes). Returns null, or the error.
template <typename ParamsType, typename... Arguments>
const char* launch(void (*kernel)(ParamsType, Arguments...), ParamsType p, int64_t blocks_x,
                   int64_t blocks_y, int threads, int64_t shared_memory, bool overlap_previous,
                   void* stream, Arguments... arguments) {
  if (p.levels > kMaxLevels) return "spatial_shapes has too many levels, expected at most 1024";
  if (blocks_x > INT32_MAX) return "sampling_locations has too many queries, expected below 2^31";
  if (blocks_y > kMaxBlocksYZ) return "value has too many heads, expected at most 65535";
  for (; p.first_batch < p.batch; p.first_batch += kMaxBlocksYZ) {
    const int64_t batches = std::min(p.batch - p.first_batch, kMaxBlocksYZ);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y),
                          static_cast<unsigned>(batches));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_memory;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = overlap_previous ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p, arguments...);
    if (error != cudaSuccess) {
      cudaGetLastError();  // so that it is not found by whoever asks next
      return cudaGetErrorString(error);
    }
  }
  return nullptr;
}

// The tiles of a layout: how many blocks, where each serves `tiles` of them.
template <typename Layout>
int64_t tile_blocks(const Params& p, int tiles) {
  return ceil_div<int64_t>(ceil_div<int64_t>(p.queries, Layout::kTileQueries), tiles);
}
template <typename Layout>
int64_t head_blocks(const Params& p) {
  return ceil_div(p.heads, Layout::kTileHeads);
}

// with_source<scalar_t>(p, [&](auto source) { ... source.value ... }): how the points are given.
template <typename scalar_t, typename Function>
auto with_source(const Params& p, Function&& function) {
  const auto with = [&](auto same, auto mixed) {
    if constexpr (!std::is_same_v<scalar_t, acc_t<scalar_t>>) {
      const DType dtype = p.value_dtype;
      if (p.locations_dtype != dtype || p.weights_dtype != dtype ||
          (p.reference_points && p.reference_dtype != dtype)) {
        return function(mixed);
      }
    }
    return function(same);
  };
  if (p.reference_points) {
    return with(std::integral_constant<Source, Source::fused>{},
                std::integral_constant<Source, Source::fused_mixed>{});
  }
  return with(std::integral_constant<Source, Source::same>{},
              std::integral_constant<Source, Source::mixed>{});
}

// with_lanes<2, 32>(n, [&](auto lanes) { ... lanes.value ... }): the power of two from 2 to 32 at
// or above n (or 32), as a constant.
template <int kMin, int kMax, typename Function>
auto with_lanes(int64_t n, Function&& function) {
  if constexpr (kMin < kMax) {
    if (n > kMin) return with_lanes<kMin * 2, kMax>(n, std::forward<Function>(function));
  }
  return function(std::integral_constant<int, kMin>{});
}

}  // namespace ms_deform_attn::cuda
