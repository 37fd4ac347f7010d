// How forward_kernel and points_kernel lay out their work over the GPU.
//
// A team of lanes (a power of two, inside one warp) serves one row: a (batch, query, head). Each
// lane owns kVec adjacent channels. The geometry of the points is worked out once: each lane takes
// one point of a stage and leaves it in shared memory, where the whole team reads it.
//
// A block serves a tile: some adjacent queries, and as many heads as make a 128-byte line of value,
// so that a line brought into L1 is used whole.
#pragma once

#include <algorithm>
#include <cstdint>

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

constexpr int kThreads = 256;
// With fewer rows a GPU has lanes to spare, and groups of them share the points of a row.
constexpr int64_t kFewRows = 16384;

template <typename integer_t>
__host__ __device__ constexpr integer_t ceil_div(integer_t a, integer_t b) {
  return (a + b - 1) / b;
}

inline int64_t count_rows(const Params& p) { return p.batch * p.queries * p.heads; }

// The most points of a level, over all queries of a (batch, head).
inline int64_t max_level_points(const Params& p) {
  int64_t points = p.points_per_level;
  for (int32_t l = 0; l < p.levels && p.points_per_level == 0; ++l) {
    points = std::max<int64_t>(points, p.level_points[l]);
  }
  return points * p.queries;
}

// ------------------------------------------------------------------------------------------- tiles

// How a block's threads are cut into teams, and its tile into queries and heads. kLanes lanes hold
// a row's channels, usually 16 bytes each; kSplit such groups share the points of one row.
template <int kLanes, int kSplit, int kBlock = kThreads>
struct Layout {
  static constexpr int kTeam = kLanes * kSplit;
  static constexpr int kTeams = kBlock / kTeam;
  static constexpr int kTileHeads = kLanes < 8 ? 8 / kLanes : 1;
  static constexpr int kTileQueries = kTeams / kTileHeads;
  static_assert(32 % kTeam == 0, "the lanes of a team exchange numbers by warp shuffles");
  static_assert(kTeams % kTileHeads == 0);

  // Shared memory for a stage: per warp, kTeam points of each of its teams. The teams read the same
  // point at the same time, so its entries are adjacent; the gap after them keeps lanes that write
  // the points of one team in different banks.
  static constexpr int kWarpTeams = 32 / kTeam;
  static constexpr int kPitch = kWarpTeams + (kWarpTeams > 4 ? kWarpTeams / 4 : kWarpTeams > 1);
  static constexpr int kSlots = kBlock / 32 * kTeam * kPitch;

  // Where this thread's team keeps its point 0; point i is i * kPitch further.
  static __device__ __forceinline__ int first_slot() {
    return threadIdx.x / 32 * kTeam * kPitch + threadIdx.x % 32 / kTeam;
  }

  // The grid: blocks that serve `tiles` adjacent tiles of queries each (x), and groups of heads
  // (y).
  static int64_t query_blocks(const Params& p, int tiles = 1) {
    return ceil_div<int64_t>(ceil_div<int64_t>(p.queries, kTileQueries), tiles);
  }
  static int64_t head_blocks(const Params& p) { return ceil_div(p.heads, kTileHeads); }
};

// The row that this thread's team serves.
struct TeamRow {
  int64_t batch, query;
  int64_t index;  // (batch * queries + query) * heads + head
  int32_t head;
  int32_t points;  // to serve: none for a team without a row, in the last tile

  __device__ __forceinline__ bool active() const { return points > 0; }
  // The index of the query among all of the batch, as in reference_points.
  __device__ __forceinline__ int64_t query_index(const Params& p) const {
    return active() ? batch * p.queries + query : 0;
  }
};

// In the tile at `tile` of those of a batch and of a block of heads.
template <typename Layout>
__device__ __forceinline__ TeamRow find_row(const Params& p, int64_t batch, int32_t head_block,
                                            int64_t tile) {
  const int team = threadIdx.x / Layout::kTeam;
  TeamRow row;
  row.query = tile * Layout::kTileQueries + team / Layout::kTileHeads;
  row.batch = batch;
  row.head = head_block * Layout::kTileHeads + team % Layout::kTileHeads;
  const bool active = row.query < p.queries && row.head < p.heads;
  row.points = active ? p.points : 0;
  row.index = active ? (row.batch * p.queries + row.query) * p.heads + row.head : 0;
  if (!active) row.head = 0;
  return row;
}

// ------------------------------------------------------------------------------------------ strips

// Where the queries are the pixels (an encoder), neighbouring queries sample neighbouring pixels.
// Their levels can be served in strips of kRows image rows, column after column, so that a block's
// tile is about square and its samples overlap.
__host__ __device__ __forceinline__ bool queries_are_pixels(const Params& p) {
  return p.queries == p.spatial_size;
}

// The query at a position in the order of the strips, which is a permutation of the queries
// whatever the level metadata holds: queries beyond what the levels' pixels add up to stay as they
// are.
template <int kRows, typename LevelEntry>
__device__ __forceinline__ int64_t query_in_strips(const Params& p, const LevelEntry* levels,
                                                   int64_t position) {
  int32_t first = 0;
  for (int32_t l = 0; l < p.levels; ++l) {
    const Level& level = levels[l];
    const int32_t pixels = level.height * level.width;
    if (pixels > p.queries - first) break;
    const int32_t index = static_cast<int32_t>(position) - first;
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
  return position;
}

// Moves a team from its position in the order of the strips to the query there.
template <typename LevelEntry>
__device__ __forceinline__ void follow_strips(const Params& p, const LevelEntry* levels,
                                              TeamRow& row) {
  if (!row.active()) return;
  const int64_t query = query_in_strips<4>(p, levels, row.query);
  row.index += (query - row.query) * p.heads;
  row.query = query;
}

}  // namespace ms_deform_attn::cuda
