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
template <typename scalar_t>
__device__ __forceinline__ acc_t<scalar_t> load_weight(const Params& p, int64_t point) {
  if (p.weights_dtype == DType::f32) return static_cast<const float*>(p.attention_weights)[point];
  return to_acc(static_cast<const scalar_t*>(p.attention_weights)[point]);
}

template <typename acc>
struct Location {
  acc x, y;
};

template <typename scalar_t>
__device__ __forceinline__ Location<acc_t<scalar_t>> load_location(const Params& p, int64_t point) {
  if (p.locations_dtype == DType::f32) {
    float xy[2];
    Vec<float, 2>::load(static_cast<const float*>(p.sampling_locations) + 2 * point).unpack(xy);
    return {xy[0], xy[1]};
  }
  acc_t<scalar_t> xy[2];
  Vec<scalar_t, 2>::load(static_cast<const scalar_t*>(p.sampling_locations) + 2 * point).unpack(xy);
  return {xy[0], xy[1]};
}

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
  int64_t batch, row;  // row: (batch * queries + query) * heads + head
  int32_t head;
  bool active;  // false for a team without a row, in the last tile
};

template <typename Layout>
__device__ __forceinline__ Work find_work(const Params& p) {
  const int team = threadIdx.x / Layout::kTeam;
  const int64_t query = int64_t(blockIdx.x) * Layout::kTileQueries + team / Layout::kTileHeads;
  Work work;
  work.batch = p.first_batch + blockIdx.z;
  work.head = blockIdx.y * Layout::kTileHeads + team % Layout::kTileHeads;
  work.active = query < p.queries && work.head < p.heads;
  work.row = work.active ? (work.batch * p.queries + query) * p.heads + work.head : 0;
  if (!work.active) work.head = 0;
  return work;
}

// Fills `table` (an entry per level, in shared memory) by the whole block.
__device__ __forceinline__ void load_levels(const Params& p, Level* table) {
  for (int i = threadIdx.x; i < p.levels; i += kThreads) table[i] = read_level(p, i);
  __syncthreads();
}

// The level of a lane's point, while the lane steps from stage to stage.
struct PointCursor {
  int32_t level, point;

  __device__ __forceinline__ PointCursor(const Params& p, int lane)
      : level(lane / p.points_per_level), point(lane % p.points_per_level) {}
  __device__ __forceinline__ void advance(const Params& p, int32_t step) {
    for (point += step; point >= p.points_per_level; point -= p.points_per_level) ++level;
  }
};

// A number for each corner of a point.
template <typename acc>
struct alignas(4 * sizeof(acc)) PerCorner {
  acc corner[4];
};

// A corner's row in a tensor like value, from `origin`, its row in pixel 0. Spelled out because the
// compiler would not see that one 32-by-32-bit multiplication is enough.
template <typename element_t>
__device__ __forceinline__ element_t* corner_row(element_t* origin, int32_t pixel,
                                                 int32_t pixel_bytes) {
  element_t* row;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(row) : "r"(pixel), "r"(pixel_bytes), "l"(origin));
  return row;
}

// ------------------------------------------------------------------------------------------ launch

// Launches a kernel over all tiles (x), groups of heads (y) and batches (z; as many launches as it
// takes). Returns null, or the error.
template <typename Layout, typename ParamsType>
const char* launch(void (*kernel)(ParamsType), const ParamsType& p, void* stream) {
  if (p.levels > kMaxLevels) return "spatial_shapes has too many levels, expected at most 1024";
  constexpr int64_t kMaxBlocksYZ = 65535;
  const int64_t tiles = ceil_div<int64_t>(p.queries, Layout::kTileQueries);
  const int64_t head_groups = ceil_div(p.heads, Layout::kTileHeads);
  if (tiles > INT32_MAX) return "sampling_locations has too many queries, expected below 2^31";
  if (head_groups > kMaxBlocksYZ) return "value has too many heads, expected at most 65535";
  for (ParamsType part = p; part.first_batch < p.batch; part.first_batch += kMaxBlocksYZ) {
    const int64_t batches = std::min(p.batch - part.first_batch, kMaxBlocksYZ);
    const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(head_groups),
                      static_cast<unsigned>(batches));
    kernel<<<blocks, kThreads, p.levels * sizeof(Level), static_cast<cudaStream_t>(stream)>>>(part);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
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
