// What backward.cu plans and launches: the kernels of the backward, one file each. Every function
// returns null, or what is wrong.
#pragma once

#include "deformable_detr/cuda/plan.h"

namespace ms_deform_attn::cuda {

// The plan_ functions follow plan.strategy and add to the rest of the plan.

// backward_points.cu
const char* plan_points(const BackwardParams& params, BackwardPlan& plan);
const char* launch_points(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// backward_scatter.cu
const char* launch_scatter(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// backward_gather.cu
const char* plan_gather(const BackwardParams& params, BackwardPlan& plan);
const char* launch_reach(const BackwardParams& params, const BackwardPlan& plan, void* stream);
const char* launch_gather(const BackwardParams& params, const BackwardPlan& plan, void* stream);

// A table in scratch, or null where the plan has none.
template <typename T>
T* in_scratch(const BackwardParams& params, int64_t offset) {
  if (offset == Scratch::kNone) return nullptr;
  return reinterpret_cast<T*>(static_cast<char*>(params.scratch) + offset);
}

}  // namespace ms_deform_attn::cuda
