// Schemas, once, and their implementations per backend. Fakes and autograd are registered in
// Python.
#include "torch_binding.h"

#include <torch/csrc/stable/library.h>

#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "ms_deform_attn_forward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  ops.def(
      "ms_deform_attn_backward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights, Tensor grad_output) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("ms_deform_attn_forward", TORCH_BOX(&ms_deform_attn::forward));
  ops.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn::backward));
}

#if defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("ms_deform_attn_forward", TORCH_BOX(&ms_deform_attn::forward));
  ops.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn::backward));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
