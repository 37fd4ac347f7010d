// What backward.cu plans and launches: the kernels of the backward, one file each.
#pragma once

#include "deformable_detr/cuda/plan.h"

namespace ms_deform_attn::cuda {

// The plan_ functions follow plan.strategy and add to the rest of the plan.

// backward_sums.cu
void plan_sums(const BackwardParams& params, BackwardPlan& plan);
void launch_clear(const BackwardParams& params, void* sums, void* stream);
void launch_convert(const BackwardParams& params, const BackwardPlan& plan, const void* sums,
                    void* stream);

// The kernels that add to sums have them as params.grad_value.

// backward_points.cu
void plan_points(const BackwardParams& params, BackwardPlan& plan);
void launch_points(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// backward_points_windows.cu: with params.windows, what points_kernel would do, or the choice that
// it does it
void plan_points_windows(const BackwardParams& params, BackwardPlan& plan);
void launch_points_windows(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// backward_merge.cu
bool can_merge(const BackwardParams& params);
void launch_merge(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// backward_patches.cu
bool can_patch(const BackwardParams& params);
void launch_patches(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// backward_scatter.cu
void launch_scatter(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// backward_gather.cu
void plan_gather(const BackwardParams& params, BackwardPlan& plan);
void launch_reach(const BackwardParams& params, const BackwardPlan& plan, void* stream);
void launch_gather(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// A table in scratch, or null where the plan has none.
template <typename T>
T* in_scratch(const BackwardParams& params, int64_t offset) {
  if (offset == Scratch::kNone) return nullptr;
  return reinterpret_cast<T*>(static_cast<char*>(params.scratch) + offset);
}

}  // namespace ms_deform_attn::cuda
