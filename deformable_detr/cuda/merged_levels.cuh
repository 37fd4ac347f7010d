// Which levels of a direct backward merge_kernel adds instead of points_kernel, where the plan lets
// it: those with so few pixels that the points of a block meet. Both look at the levels' shapes,
// which only the device has.
#pragma once

#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/points.cuh"

namespace ms_deform_attn::cuda {

constexpr int32_t kMergePoints = 4096;  // of a level, the most that a block sorts
// At two points for three pixels (bevformer_sca's second level) a block merges half of its atomics.
constexpr int32_t kMostMergedPixels = kMergePoints * 3 / 2;

__device__ __forceinline__ bool is_merged(const Params& p, int32_t level_index,
                                          const Level& level) {
  const int64_t pixels = level.height * level.width;
  const int64_t points = p.queries * points_of_level(p, level_index);
  return pixels > 0 && pixels <= kMostMergedPixels && 2 * pixels <= 3 * points;
}

// The queries whose points of a merged level a block sorts, about as many in each block.
__device__ __forceinline__ int32_t queries_of_share(const Params& p, int32_t level_index) {
  const int32_t most = kMergePoints / points_of_level(p, level_index);
  return static_cast<int32_t>(ceil_div<int64_t>(p.queries, ceil_div<int64_t>(p.queries, most)));
}

}  // namespace ms_deform_attn::cuda
