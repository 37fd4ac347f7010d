// Which part of each level some adjacent queries reach, for gather where points are many.
//
// A gather block would otherwise test every point of its level. In an encoder, whose queries are
// near what they sample, it looks only at the chunks of queries whose reach touches its slice.
#pragma once

#include "deformable_detr/cuda/backward_slices.cuh"

namespace ms_deform_attn::cuda {

// The cells from first to last, in rows and columns; none if last < first.
struct alignas(16) Reach {
  Cell first, last;

  __device__ __forceinline__ bool touches(const Rectangle& x) const {
    return last.row >= x.row - 1 && first.row < x.row + x.height && last.column >= x.column - 1 &&
           first.column < x.column + x.width;
  }
};

constexpr int kReachQueries = 128;  // of a chunk
constexpr int kReachThreads = 256;

// The chunks of a level, or 0 where the points of a level are few enough to look at all of them.
inline int32_t count_reach_chunks(const Params& p) {
  if (max_level_points(p) <= kMaxHeld) return 0;
  return static_cast<int32_t>(ceil_div<int64_t>(p.queries, kReachQueries));
}

// Where the chunks of a (batch, head, level) begin in the table, [batch, heads, levels, chunks].
__host__ __device__ __forceinline__ int64_t reach_index(const Params& p, int32_t chunks,
                                                        int64_t batch, int32_t head,
                                                        int32_t level) {
  return ((batch * p.heads + head) * p.levels + level) * chunks;
}

// Each warp serves a chunk of a (batch, head, level).
template <typename scalar_t, Source kSource>
__global__ void __launch_bounds__(kReachThreads)
    reach_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch, int32_t chunks,
                 Reach* reaches) {
  const int lane = threadIdx.x % 32;
  int64_t warp = int64_t(blockIdx.x) * (kReachThreads / 32) + threadIdx.x / 32;
  const int32_t level_index = static_cast<int32_t>(warp % p.levels);
  warp /= p.levels;
  const int32_t head = static_cast<int32_t>(warp % p.heads);
  const int64_t chunk = warp / p.heads, batch = first_batch + blockIdx.z;
  if (chunk >= chunks) return;

  const auto level = read_level_entry<LevelEntry<scalar_t, kSource>>(p, level_index);
  const int32_t first_point = first_point_of_level(p, level_index);
  const int32_t level_points = points_of_level(p, level_index);
  const int64_t first_query = chunk * kReachQueries;
  const int32_t queries =
      static_cast<int32_t>(min(int64_t(kReachQueries), p.queries - first_query));
  Reach reach{{INT32_MAX, INT32_MAX}, {kNoCell, kNoCell}};
  for (int32_t i = lane; i < queries * level_points; i += 32) {
    const int32_t query = i / level_points;
    const int64_t query_index = batch * p.queries + first_query + query;
    PointReader<scalar_t, kSource> point;
    point.seek(p, query_index * p.heads + head, query_index,
               first_point + i - query * level_points);
    point.read_xy(p);
    const Cell cell = find_cell(find_position(p, point, level_index, level), level, p.method);
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
  if (lane == 0) reaches[reach_index(p, chunks, batch, head, level_index) + chunk] = reach;
}

}  // namespace ms_deform_attn::cuda
