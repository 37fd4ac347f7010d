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

template <typename integer_t>
__host__ __device__ constexpr integer_t ceil_div(integer_t a, integer_t b) {
  return (a + b - 1) / b;
}

// ------------------------------------------------------------------------------------------ layout

// How a block's threads are cut into teams, and its tile into queries and heads. kLanes lanes hold
// a row's channels, 16 bytes each; kSplit such groups share the points of one row.
template <int kLanes, int kSplit>
struct Layout {
  static constexpr int kTeam = kLanes * kSplit;
  static constexpr int kTeams = kThreads / kTeam;
  static constexpr int kTileHeads = kLanes < 8 ? 8 / kLanes : 1;
  static constexpr int kTileQueries = kTeams / kTileHeads;

  // Shared memory for a stage: per warp kTeam points of each of its teams. The teams read the same
  // point at the same time, so its entries are adjacent; the gap after them keeps lanes that write
  // the points of one team in different banks.
  static constexpr int kWarpTeams = 32 / kTeam;
  static constexpr int kPitch = kWarpTeams + (kWarpTeams > 4 ? kWarpTeams / 4 : kWarpTeams > 1);
  static constexpr int kSlots = kThreads / 32 * kTeam * kPitch;

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

template <int kRows>
__device__ __forceinline__ int64_t query_in_strips(const Params& p, const Level* levels,
                                                   int64_t query) {
  int32_t first = 0;
  for (int32_t l = 0; l < p.levels; ++l) {
    const Level level = levels[l];
    const int32_t pixels = level.height * level.width;
    if (pixels > p.queries - first) break;  // bad metadata
    const int32_t index = static_cast<int32_t>(query) - first;
    if (index < pixels) {
      const int32_t strip = index / (level.width * kRows);
      const int32_t in_strip = index - strip * level.width * kRows;
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
__device__ __forceinline__ void follow_strips(const Params& p, const Level* levels, Work& work) {
  if (!work.active()) return;
  const int64_t query = query_in_strips<4>(p, levels, work.query);
  work.row += (query - work.query) * p.heads;
  work.query = query;
}

// ------------------------------------------------------------------------------------------ levels

// Fills the table of levels, in shared memory. A block's threads load() it to registers, may load
// other things meanwhile, and store() it for all.
struct LevelLoader {
  Level level;

  __device__ __forceinline__ void load(const Params& p) {
    if (threadIdx.x < p.levels) level = read_level(p, threadIdx.x);
  }
  __device__ __forceinline__ void store(const Params& p, Level* table) {
    if (threadIdx.x < p.levels) table[threadIdx.x] = level;
    for (int i = threadIdx.x + blockDim.x; i < p.levels; i += blockDim.x) {
      table[i] = read_level(p, i);
    }
    __syncthreads();
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

// How points are given: in value's dtype; with locations or weights of float beside a half value;
// or as offsets and logits, of either dtype.
enum class Source { same, mixed, fused };

template <typename acc>
struct Location {
  acc x, y;
};

// A row's softmax: weight = exp(logit - largest) * scale.
template <typename acc>
struct Softmax {
  acc largest, scale;
};

// Element `index` of a tensor stored as scalar_t or, beside a half value, as float.
template <typename scalar_t>
__device__ __forceinline__ acc_t<scalar_t> load_operand(const void* data, DType dtype,
                                                        int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  return to_acc(static_cast<const scalar_t*>(data)[index]);
}

// Reads points as they are stored, each before it is needed.
template <typename scalar_t, Source kSource>
struct PointReader {
  using acc = acc_t<scalar_t>;
  static constexpr bool kMixed = kSource != Source::same && !std::is_same_v<scalar_t, acc>;

  // The next point to read is number `point` of the row.
  __device__ __forceinline__ void start(const Params& p, int64_t row, int32_t point) {
    const int64_t index = row * p.points + point;
    location_at_ = static_cast<const char*>(p.sampling_locations) + index * location_bytes(p);
    weight_at_ = static_cast<const char*>(p.attention_weights) + index * weight_bytes(p);
  }
  __device__ __forceinline__ void skip(const Params& p, int32_t points) {
    location_at_ += points * location_bytes(p);
    weight_at_ += points * weight_bytes(p);
  }
  // What is read is not converted yet, as that would wait for it.
  __device__ __forceinline__ void read_location(const Params& p) {
    if (float_locations(p)) {
      if constexpr (kMixed) float_location_ = Vec<float, 2>::load(at<float>(location_at_));
    } else {
      location_ = Vec<scalar_t, 2>::load(at<scalar_t>(location_at_));
    }
  }
  __device__ __forceinline__ void read_weight(const Params& p) {
    if (float_weights(p)) {
      if constexpr (kMixed) float_weight_ = Vec<float, 1>::load(at<float>(weight_at_));
    } else {
      weight_ = Vec<scalar_t, 1>::load(at<scalar_t>(weight_at_));
    }
  }
  __device__ __forceinline__ void read(const Params& p) {
    read_location(p);
    read_weight(p);
  }

  // The location, or fused the offset.
  __device__ __forceinline__ Location<acc> location(const Params& p) const {
    acc xy[2];
    location_.unpack(xy);
    if constexpr (kMixed) {
      if (float_locations(p)) float_location_.unpack(xy);
    }
    return {xy[0], xy[1]};
  }
  // The weight, or fused the logit.
  __device__ __forceinline__ acc stored_weight(const Params& p) const {
    acc x[1];
    weight_.unpack(x);
    if constexpr (kMixed) {
      if (float_weights(p)) float_weight_.unpack(x);
    }
    return x[0];
  }
  __device__ __forceinline__ acc weight(const Params& p, const Softmax<acc>& softmax) const {
    if constexpr (kSource != Source::fused) return stored_weight(p);
    return std::exp(stored_weight(p) - softmax.largest) * softmax.scale;
  }

 private:
  const char *location_at_, *weight_at_;
  Vec<scalar_t, 2> location_;
  Vec<scalar_t, 1> weight_;
  Vec<float, 2> float_location_;
  Vec<float, 1> float_weight_;

  template <typename T>
  static __device__ __forceinline__ const T* at(const char* x) {
    return reinterpret_cast<const T*>(x);
  }
  static __device__ __forceinline__ bool float_locations(const Params& p) {
    return kMixed && p.locations_dtype == DType::f32;
  }
  static __device__ __forceinline__ bool float_weights(const Params& p) {
    return kMixed && p.weights_dtype == DType::f32;
  }
  static __device__ __forceinline__ int32_t location_bytes(const Params& p) {
    return 2 * (float_locations(p) ? sizeof(float) : sizeof(scalar_t));
  }
  static __device__ __forceinline__ int32_t weight_bytes(const Params& p) {
    return float_weights(p) ? sizeof(float) : sizeof(scalar_t);
  }
};

// A query's reference point for a level; its box where it has one.
template <typename acc>
struct Reference {
  acc x, y, width, height;
};

template <typename scalar_t>
__device__ __forceinline__ Reference<acc_t<scalar_t>> read_reference(const Params& p,
                                                                     int64_t query_row,
                                                                     int32_t level) {
  const int64_t index = (query_row * p.reference_levels + (p.reference_levels > 1 ? level : 0)) *
                        p.reference_coordinates;
  const auto number = [&](int i) {
    return load_operand<scalar_t>(p.reference_points, p.reference_dtype, index + i);
  };
  const bool box = p.reference_coordinates == 4;
  return {number(0), number(1), box ? number(2) : 0, box ? number(3) : 0};
}

// The corners of a point that was read.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ Corners<acc_t<scalar_t>> place(const Params& p,
                                                          const Location<acc_t<scalar_t>>& location,
                                                          int64_t query_row, int32_t level_index,
                                                          const Level& level) {
  using acc = acc_t<scalar_t>;
  if constexpr (kSource != Source::fused) {
    return Corners<acc>(location.x, location.y, level, p.method);
  } else {
    const Reference<acc> reference = read_reference<scalar_t>(p, query_row, level_index);
    const Extents<acc> extents =
        offset_extents<acc>(p, level_index, level, reference.width, reference.height);
    return Corners<acc>(
        Coordinate<acc>(offset_pixel(reference.x, level.width, location.x, extents.x)),
        Coordinate<acc>(offset_pixel(reference.y, level.height, location.y, extents.y)), level,
        p.method);
  }
}

// The softmax over a row's points, by its team of kTeam lanes. The whole warp takes part.
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
  for (int32_t i = lane; i < p.points; i += kTeam) sum += std::exp(logit(i) - largest);
#pragma unroll
  for (int offset = 1; offset < kTeam; offset *= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
  return {largest, 1 / sum};
}

// A number for each corner of a point.
template <typename acc>
struct alignas(4 * sizeof(acc)) PerCorner {
  acc corner[4];
};

// ---------------------------------------------------------------------------------------- pixels

// Finds rows of a tensor like value by pixel. Vectors are counted in 32 bits, so that an address is
// one multiply-add; fits() tells whether that is enough. Single elements are counted in 64 bits.
template <typename scalar_t, int kVec>
struct Rows {
  static bool fits(const Params& p) {
    return kVec == 1 || p.spatial_size * p.heads * p.channels / kVec <= INT32_MAX;
  }
  // Negative for a pixel outside.
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
  if (p.reference_points) {
    return function(std::integral_constant<Source, Source::fused>{});
  }
  if constexpr (!std::is_same_v<scalar_t, acc_t<scalar_t>>) {
    if (p.locations_dtype != p.value_dtype || p.weights_dtype != p.value_dtype) {
      return function(std::integral_constant<Source, Source::mixed>{});
    }
  }
  return function(std::integral_constant<Source, Source::same>{});
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
