// Regions of an image: the queries of all levels in a part of it, where the queries are the pixels.
// They sample about the same part of each level.
#pragma once

#include "deformable_detr/cuda/block_scan.cuh"
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/windows.cuh"

namespace ms_deform_attn::cuda {

// Queries of a region that follow each other: `columns` of each row.
struct QueryPart {
  int32_t first;  // of them among the region's
  int32_t query;  // the first one
  int32_t columns, pitch;
};

// How many regions lie in a row, of at most `regions`: by one warp. The largest one's queries
// should be no more than a block holds, and what the points near it reach on the largest level be
// small.
template <typename LevelEntry>
__device__ __forceinline__ int32_t choose_across(const Params& p, const LevelEntry* levels,
                                                 int32_t regions, int32_t most_queries) {
  constexpr float kHalo = 8;
  float most = 0, ratio = 1;
  for (int32_t l = 0; l < p.levels; ++l) {
    const float width = levels[l].width, height = levels[l].height;
    if (width * height > most) {
      most = width * height;
      ratio = __fdividef(width, height);
    }
  }
  const int32_t near = static_cast<int32_t>(sqrtf(regions * ratio));  // if regions are squares
  const int32_t across = max(1, min(near - 16 + static_cast<int>(threadIdx.x % 32), regions));
  const float down = floorf(__fdividef(regions + 0.5f, across));
  const float part_x = __fdividef(1, across), part_y = __fdividef(1, down);
  float queries = 0, reach = 0;
  for (int32_t l = 0; l < p.levels; ++l) {
    const float width = levels[l].width * part_x, height = levels[l].height * part_y;
    queries += ceilf(width) * ceilf(height);
    reach = max(reach, (width + kHalo) * (height + kHalo));
  }
  const float cost = (queries > most_queries ? 2 : 1) * reach;
  float least = cost;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    least = min(least, __shfl_xor_sync(kAllLanes, least, offset));
  }
  const unsigned best = __ballot_sync(kAllLanes, cost == least);
  return best == 0 ? 1 : __shfl_sync(kAllLanes, across, __ffs(best) - 1);
}

// Finds a region's parts, one a level, and one more: queries beyond what the levels' pixels add up
// to are shared by the regions. Whatever the levels are, each query is in one region. Returns how
// many there are. By one warp.
template <typename LevelEntry>
__device__ __forceinline__ int32_t find_parts(const Params& p, const LevelEntry* levels,
                                              int32_t across, int32_t down, int32_t index,
                                              QueryPart* parts) {
  const int32_t y = index / across, x = index - y * across, lane = threadIdx.x % 32;
  const int32_t queries = static_cast<int32_t>(p.queries);
  int32_t first = 0, count = 0;  // of the levels' queries; of the region's
  for (int32_t first_level = 0; first_level < p.levels; first_level += 32) {
    const int32_t l = first_level + lane;
    const int32_t width = l < p.levels ? levels[l].width : 0;
    const int32_t height = l < p.levels ? levels[l].height : 0;
    // All pixels of the levels so far; more than there are queries never fit again.
    const int64_t pixels = inclusive_warp_scan<int64_t>(width * height);
    const bool fits = first + pixels <= queries;
    const int32_t before = first + static_cast<int32_t>(fits ? pixels : 0) - width * height;
    const int32_t column = start_of_part(x, width, across), row = start_of_part(y, height, down);
    const int32_t columns = start_of_part(x + 1, width, across) - column;
    const int32_t rows = start_of_part(y + 1, height, down) - row;
    const int32_t own = fits ? columns * rows : 0, sum = inclusive_warp_scan(own);
    if (l < p.levels) {
      parts[l] = {count + sum - own, before + row * width + column, max(columns, 1), width};
    }
    count += __shfl_sync(kAllLanes, sum, 31);
    const unsigned all_fit = __ballot_sync(kAllLanes, fits);
    const int last = 31 - __clz(static_cast<int>(all_fit));  // levels are prefixes
    if (all_fit != 0) first += static_cast<int32_t>(__shfl_sync(kAllLanes, pixels, max(last, 0)));
    if (all_fit != kAllLanes) {
      for (int32_t other = l + 32; other < p.levels; other += 32) parts[other] = {count, 0, 1, 0};
      break;
    }
  }
  const int32_t rest = queries - first, regions = across * down;
  const int32_t begin = static_cast<int32_t>(int64_t(rest) * index / regions);
  const int32_t end = static_cast<int32_t>(int64_t(rest) * (index + 1) / regions);
  if (lane == 0) parts[p.levels] = {count, first + begin, max(end - begin, 1), 0};
  return count + end - begin;
}

__device__ __forceinline__ int32_t query_of_parts(const Params& p, const QueryPart* parts,
                                                  int32_t index) {
  int32_t l = 0;
  while (l < p.levels && index >= parts[l + 1].first) ++l;
  const QueryPart& part = parts[l];
  index -= part.first;
  const int32_t row = index / part.columns;
  return part.query + row * part.pitch + (index - row * part.columns);
}

}  // namespace ms_deform_attn::cuda
