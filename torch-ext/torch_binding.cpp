// Schemas, once, and their implementations per backend. Fakes and autograd are registered in
// Python.
#include "deformable_detr/ops.h"

#include <torch/csrc/stable/library.h>

#include "registration.h"

// points_per_level is None where each level has the same number of points, and the locations and
// weights a dimension for the levels.
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

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("ms_deform_attn_forward", TORCH_BOX(&ms_deform_attn::forward));
  ops.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn::backward));
  ops.impl("fused_ms_deform_attn_forward", TORCH_BOX(&ms_deform_attn::fused_forward));
  ops.impl("fused_ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn::fused_backward));
}

#if defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("ms_deform_attn_forward", TORCH_BOX(&ms_deform_attn::forward));
  ops.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn::backward));
  ops.impl("fused_ms_deform_attn_forward", TORCH_BOX(&ms_deform_attn::fused_forward));
  ops.impl("fused_ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn::fused_backward));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
