// The operators' schemas, once, with what binds them to the two functions of ops.h. Fakes and
// autograd are registered in Python.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "deformable_detr/ops.h"
#include "registration.h"

namespace ms_deform_attn {
namespace {

Tensor plain_forward(const Tensor& value, const Tensor& spatial_shapes,
                     const Tensor& level_start_index, const Tensor& sampling_locations,
                     const Tensor& attention_weights, const PointsPerLevel& points_per_level,
                     bool nearest) {
  return forward({value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                  points_per_level, nearest});
}

std::tuple<Tensor, Tensor, Tensor> plain_backward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights, const Tensor& grad_output,
    const PointsPerLevel& points_per_level, bool nearest, bool deterministic, bool value_needs_grad,
    bool points_need_grad) {
  Gradients grads = backward({value, spatial_shapes, level_start_index, sampling_locations,
                              attention_weights, points_per_level, nearest, grad_output},
                             deterministic, {value_needs_grad, points_need_grad});
  return {std::move(grads.value), std::move(grads.coordinates), std::move(grads.weights)};
}

Tensor fused_forward(const Tensor& value, const Tensor& spatial_shapes,
                     const Tensor& level_start_index, const Tensor& reference_points,
                     const Tensor& sampling_offsets, const Tensor& attention_logits,
                     const PointsPerLevel& points_per_level, bool nearest, double offset_scale) {
  return forward({value, spatial_shapes, level_start_index, sampling_offsets, attention_logits,
                  points_per_level, nearest, std::nullopt, reference_points, offset_scale});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits,
    const Tensor& grad_output, const PointsPerLevel& points_per_level, bool nearest,
    double offset_scale, bool reference_needs_grad, bool deterministic, bool value_needs_grad,
    bool points_need_grad) {
  Gradients grads =
      backward({value, spatial_shapes, level_start_index, sampling_offsets, attention_logits,
                points_per_level, nearest, grad_output, reference_points, offset_scale},
               deterministic, {value_needs_grad, points_need_grad, reference_needs_grad});
  return {std::move(grads.value), std::move(grads.reference_points), std::move(grads.coordinates),
          std::move(grads.weights)};
}

}  // namespace
}  // namespace ms_deform_attn

// points_per_level is None where each level has the same number of points, and the locations and
// weights a dimension for the levels. Gradients that are not needed are returned with shape (0,).
STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "ms_deform_attn_forward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights, int[]? points_per_level=None, "
      "bool nearest=False) -> Tensor");
  ops.def(
      "ms_deform_attn_backward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights, Tensor grad_output, "
      "int[]? points_per_level=None, bool nearest=False, bool deterministic=False, "
      "bool value_needs_grad=True, bool points_need_grad=True) -> (Tensor, Tensor, Tensor)");
  ops.def(
      "fused_ms_deform_attn_forward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
      "int[]? points_per_level, bool nearest, float offset_scale) -> Tensor");
  ops.def(
      "fused_ms_deform_attn_backward(Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor reference_points, Tensor sampling_offsets, "
      "Tensor attention_logits, Tensor grad_output, int[]? points_per_level, bool nearest, "
      "float offset_scale, bool reference_needs_grad, bool deterministic=False, "
      "bool value_needs_grad=True, bool points_need_grad=True) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

static void implement(auto& ops) {
  ops.impl("ms_deform_attn_forward", TORCH_BOX(&ms_deform_attn::plain_forward));
  ops.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn::plain_backward));
  ops.impl("fused_ms_deform_attn_forward", TORCH_BOX(&ms_deform_attn::fused_forward));
  ops.impl("fused_ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn::fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) { implement(ops); }

#if defined(USE_CUDA)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) { implement(ops); }
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
