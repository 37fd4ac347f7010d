// How work is laid out over the GPU, the same in forward and backward.
//
// A team of lanes (a power of two, inside one warp) serves one (batch, query, head). Each lane owns
// kVec adjacent channels. The geometry of the points is worked out once: each lane takes one point
// of a stage, and leaves it in shared memory, where the whole team reads it.
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

template <typename integer_t>
__host__ __device__ constexpr integer_t ceil_div(integer_t a, integer_t b) {
  return (a + b - 1) / b;
}

// ---------------------------------------------------------------------------------------- operands

// A location or weight is stored as scalar_t or, beside a half value, as float.
template <typename acc>
struct Location {
  acc x, y;
};

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

// ------------------------------------------------------------------------------------------ layout

// How a block's threads are cut into teams, and its tile into queries and heads. kLanes lanes hold
// a row, 16 bytes each; kSplit such groups share the points of one row.
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

// What this thread's team serves.
struct Work {
  int64_t batch, query;
  int64_t row;  // (batch * queries + query) * heads + head
  int32_t head;
  int32_t points;  // to serve: none for a team without a row, in the last tile

  __device__ __forceinline__ bool active() const { return points > 0; }
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

// Where the queries are the pixels (an encoder), neighbouring queries sample neighbouring pixels:
// the queries of a level are served in strips of kStrip rows, column after column, so that the tile
// of a block is about square and its samples meet in L1.
constexpr int kForwardStrip = 4;

__device__ __forceinline__ bool queries_are_pixels(const Params& p) {
  return p.queries == p.spatial_size;
}

template <int kStrip>
__device__ __forceinline__ void follow_strips(const Params& p, const Level* levels, Work& work) {
  if (!work.active()) return;
  int32_t first = 0;
  for (int32_t l = 0; l < p.levels; ++l) {
    const Level level = levels[l];
    const int32_t pixels = level.height * level.width;
    if (pixels > p.queries - first) return;  // bad metadata
    const int32_t index = static_cast<int32_t>(work.query) - first;
    if (index < pixels) {
      const int32_t strip = index / (level.width * kStrip);
      const int32_t in_strip = index - strip * level.width * kStrip;
      const int32_t rows = min(kStrip, level.height - strip * kStrip);
      const int32_t column = rows == kStrip ? in_strip / kStrip : in_strip / rows;
      const int32_t row = strip * kStrip + in_strip - column * rows;
      const int32_t query = first + row * level.width + column;
      work.row += (query - work.query) * p.heads;
      work.query = query;
      return;
    }
    first += pixels;
  }
}

// The table of levels, in shared memory. The block's threads load() it to registers, may load other
// things meanwhile, and store() it for all.
struct LevelLoader {
  Level level;
  __device__ __forceinline__ void load(const Params& p) {
    if (threadIdx.x < p.levels) level = read_level(p, threadIdx.x);
  }
  __device__ __forceinline__ void store(const Params& p, Level* table) {
    if (threadIdx.x < p.levels) table[threadIdx.x] = level;
    for (int i = threadIdx.x + blockDim.x; i < p.levels; i += blockDim.x) table[i] = read_level(p, i);
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

// Reads a row's points, one a lane and stage, each before it is needed. kMixed: locations or weights
// may be float beside a half value.
template <typename scalar_t, bool kMixed>
struct PointReader {
  using acc = acc_t<scalar_t>;
  static constexpr bool kHalf = !std::is_same_v<scalar_t, acc>;

  // The next point to read is number `point` of the row.
  __device__ __forceinline__ void start(const Params& p, int64_t row, int32_t point) {
    const int64_t index = row * p.points + point;
    location_at_ = static_cast<const char*>(p.sampling_locations) + index * location_bytes(p);
    weight_at_ = static_cast<const char*>(p.attention_weights) + index * weight_bytes(p);
  }
  __device__ __forceinline__ void read_location(const Params& p) {
    // Not converted here, as that would wait for it.
    if (float_locations(p)) {
      if constexpr (kMixed) float_location_ = Vec<float, 2>::load(at<float>(location_at_));
    } else {
      location_ = Vec<scalar_t, 2>::load(at<scalar_t>(location_at_));
    }
  }
  __device__ __forceinline__ void read(const Params& p, bool active) {
    if (!active) return;
    read_location(p);
    if (float_weights(p)) {
      if constexpr (kMixed) float_weight_ = Vec<float, 1>::load(at<float>(weight_at_));
    } else {
      weight_ = Vec<scalar_t, 1>::load(at<scalar_t>(weight_at_));
    }
  }
  __device__ __forceinline__ void skip(const Params& p, int32_t points) {
    location_at_ += points * location_bytes(p);
    weight_at_ += points * weight_bytes(p);
  }

  // What was read.
  __device__ __forceinline__ Location<acc> location(const Params& p) const {
    acc xy[2];
    location_.unpack(xy);
    if constexpr (kMixed) {
      if (float_locations(p)) float_location_.unpack(xy);
    }
    return {xy[0], xy[1]};
  }
  __device__ __forceinline__ acc weight(const Params& p) const {
    acc x[1];
    weight_.unpack(x);
    if constexpr (kMixed) {
      if (float_weights(p)) float_weight_.unpack(x);
    }
    return x[0];
  }

 private:
  const char *location_at_, *weight_at_;
  Vec<scalar_t, 2> location_;
  Vec<scalar_t, 1> weight_;
  Vec<float, kMixed ? 2 : 1> float_location_;
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

// A number for each corner of a point.
template <typename acc>
struct alignas(4 * sizeof(acc)) PerCorner {
  acc corner[4];
};

// Finds rows of a tensor like value by pixel. Vectors are counted in 32 bits, so that an address is
// one multiply-add; fits() tells whether that is enough. Single elements are counted in 64 bits.
template <typename scalar_t, int kVec>
struct Rows {
  static __host__ __device__ bool fits(const Params& p) {
    return kVec == 1 || p.spatial_size * p.heads * p.channels / kVec <= INT32_MAX;
  }
  static __device__ __forceinline__ int32_t offset(const Params& p, int32_t pixel) {
    return kVec == 1 ? pixel : pixel * (p.heads * p.channels / kVec);
  }
  static __device__ __forceinline__ const scalar_t* at(const Params& p, const scalar_t* origin,
                                                       int32_t offset) {
    if constexpr (kVec == 1) {
      return origin + int64_t(offset) * (p.heads * p.channels);
    } else {
      struct alignas(sizeof(scalar_t) * kVec) Vector {
        scalar_t x[kVec];
      };
      return reinterpret_cast<const scalar_t*>(reinterpret_cast<const Vector*>(origin) + offset);
    }
  }
};

// ------------------------------------------------------------------------------------------ launch

// Launches a kernel over all tiles (x), groups of heads (y) and batches (z; as many launches as it
// takes). Returns null, or the error.
template <typename Layout, typename ParamsType, typename... Arguments>
const char* launch(void (*kernel)(ParamsType, Arguments...), const ParamsType& p, void* stream,
                   int tiles_per_block, Arguments... arguments) {
  if (p.levels > kMaxLevels) return "spatial_shapes has too many levels, expected at most 1024";
  constexpr int64_t kMaxBlocksYZ = 65535;
  const int64_t tiles = ceil_div<int64_t>(ceil_div<int64_t>(p.queries, Layout::kTileQueries), tiles_per_block);
  const int64_t head_groups = ceil_div(p.heads, Layout::kTileHeads);
  if (tiles > INT32_MAX) return "sampling_locations has too many queries, expected below 2^31";
  if (head_groups > kMaxBlocksYZ) return "value has too many heads, expected at most 65535";
  for (ParamsType part = p; part.first_batch < p.batch; part.first_batch += kMaxBlocksYZ) {
    const int64_t batches = std::min(p.batch - part.first_batch, kMaxBlocksYZ);
    const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(head_groups),
                      static_cast<unsigned>(batches));
    kernel<<<blocks, kThreads, p.levels * sizeof(Level), static_cast<cudaStream_t>(stream)>>>(part, arguments...);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

// with_mixed<scalar_t>(p, [&](auto mixed) { ... mixed.value ... }): whether locations or weights are
// float beside a half value.
template <typename scalar_t, typename Function>
auto with_mixed(const Params& p, Function&& function) {
  if constexpr (!std::is_same_v<scalar_t, acc_t<scalar_t>>) {
    if (p.locations_dtype != p.value_dtype || p.weights_dtype != p.value_dtype) {
      return function(std::true_type{});
    }
  }
  return function(std::false_type{});
}

// with_lanes<2>(n, [&](auto lanes) { ... lanes.value ... }): the power of two from 2 to 32 at or
// above n, as a constant.
template <int kMin, typename Function>
auto with_lanes(int64_t n, Function&& function) {
  if constexpr (kMin < 32) {
    if (n > kMin) return with_lanes<kMin * 2>(n, std::forward<Function>(function));
  }
  return function(std::integral_constant<int, kMin>{});
}

}  // namespace ms_deform_attn::cuda
