// How work is laid out over the GPU, the same in forward and backward.
//
// A team of lanes (a power of two, inside one warp) serves one row: a (batch, query, head). Each
// lane owns kVec adjacent channels. The geometry of the points is worked out once: each lane takes
// one point of a stage, and leaves it in shared memory, where the whole team reads it.
//
// A block serves a tile: some adjacent queries, and as many heads as make a 128-byte line of value,
// so that a line brought into L1 is used whole.
#pragma once

#include <cstdint>

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

}  // namespace ms_deform_attn::cuda
