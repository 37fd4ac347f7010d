// What queries reach.
#pragma once

#include "deformable_detr/cuda/backward_slices.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {

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

template <typename scalar_t>
const char* launch_reach(const BackwardParams& p, void* stream) {
  return with_source<scalar_t>(p, [&](auto source) {
    const int64_t warps = int64_t(reach_chunks(p)) * p.heads * p.levels;
    return launch(reach_kernel<scalar_t, source.value>, p,
                  ceil_div<int64_t>(warps, kReachThreads / 32), 1, kReachThreads, 0, false, stream);
  });
}

}  // namespace ms_deform_attn::cuda
