// Multi-scale deformable attention on the GPU, backward: the entry, and the choice between the ways
// to sum grad_value. backward_kernels.h tells which file has which kernel.
//
// points_kernel works out the gradients of the points, or points_windows_kernel those of large
// encoders in half types (ddetr_encoder_b4 fp16 853 to 765 us). What each point's corners get,
// grad_output times attention and corner weight, is summed by one of four strategies:
//
//  strategy  when                            what it costs
//  gather    deterministic, or float64       Each block of pixels looks for its points: 1.0 to 2.4
//                                            times the time of the fastest (H100).
//            few points, many pixels         The fastest there: no clearing, no conversion.
//  patches   encoders (queries are pixels)   A sort of each block's points by patches of pixels, a
//            in half types                   product on tensor cores for each: ddetr_encoder_b4
//                                            fp16 316 us instead of scatter's 476.
//  scatter   other encoders                  A sort of each block's points, and an atomic for each
//                                            pixel they share: ddetr_encoder_b4 fp32 981 us.
//  direct    otherwise                       An atomic for each corner of each point, but on levels
//                                            with few pixels, where merge_kernel sorts the points
//                                            of a block first: bevformer_sca fp16 2430 to 1600 us.
//
// Patches, scatter and direct add to grad_value, which has to be cleared before; in a half type
// they add to sums in float, cleared before and converted after: see backward_sums.cu.
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/layout.cuh"

namespace ms_deform_attn::cuda {
namespace {

// merges_levels: set for Strategy::direct, see BackwardPlan.
Strategy choose_strategy(const BackwardParams& p, bool& merges_levels) {
  if (!p.grad_value) return Strategy::none;
  // float64 is for checking gradients, which must repeat. No other kernel that sums grad_value is
  // compiled for it: scatter would need 55 KB of static shared memory, and sums are cleared as
  // float.
  if (p.deterministic || p.value_dtype == DType::f64) return Strategy::gather;
  if (queries_are_pixels(p)) return can_patch(p) ? Strategy::patches : Strategy::scatter;
  // Where a level has few points and value many elements, clearing grad_value (and a float copy of
  // it) takes longer than looking for points. The bounds were measured on an H100, in each dtype; a
  // block holds 4096 points.
  const int64_t elements = p.batch * p.spatial_size * p.heads * p.channels;
  const int64_t points = max_level_points(p);
  const bool half = is_half(p.value_dtype);
  const bool gather =
      half ? points <= 4096 && elements >= (points <= 2048 ? 1 << 22 : 1 << 23)
           : points >= 1024 && points <= 4096 && elements >= (points <= 2048 ? 1 << 24 : 1 << 23);
  // Adding to floats is faster yet where most points are merged: hub_b8_q900 197 to 158 us. In a
  // half type it is not, as sums are cleared and converted (142 to 170).
  merges_levels = !(gather && half) && can_merge(p);
  return gather && !merges_levels ? Strategy::gather : Strategy::direct;
}

bool adds(Strategy strategy) {
  return strategy == Strategy::direct || strategy == Strategy::patches ||
         strategy == Strategy::scatter;
}

}  // namespace

BackwardPlan plan_backward(const BackwardParams& params) {
  BackwardPlan plan{};
  plan.strategy = choose_strategy(params, plan.merges_levels);
  if (adds(plan.strategy)) plan_sums(params, plan);
  plan_points(params, plan);
  if (plan.strategy == Strategy::gather) plan_gather(params, plan);
  return plan;
}

void backward(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  if (plan.slicing.reach_chunks > 0) launch_reach(params, plan, stream);
  BackwardParams with_sums = params;
  if (adds(plan.strategy)) {
    void* sums = in_scratch<void>(params, plan.scratch.sums);
    if (sums) with_sums.grad_value = sums;
    launch_clear(params, with_sums.grad_value, stream);
  }
  with_sums.windows = in_scratch<void>(params, plan.scratch.windows);
  if (plan.runs_points_kernel) launch_points(with_sums, plan, stream);
  switch (plan.strategy) {
    case Strategy::none: break;
    case Strategy::direct:  // points_kernel has added the other levels
      if (plan.merges_levels) launch_merge(with_sums, plan, stream);
      break;
    case Strategy::patches: launch_patches(with_sums, plan, stream); break;
    case Strategy::scatter: launch_scatter(with_sums, plan, stream); break;
    case Strategy::gather: launch_gather(params, plan, stream); break;
  }
  if (plan.scratch.sums != Scratch::kNone) {
    launch_convert(params, plan, with_sums.grad_value, stream);
  }
}

}  // namespace ms_deform_attn::cuda
