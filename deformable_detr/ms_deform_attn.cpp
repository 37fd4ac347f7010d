// Everything above the backends: checks the inputs, allocates the outputs, picks the backend.
//
// Nothing here reads a tensor that lives on a GPU, so nothing waits for one.
#include "deformable_detr/ms_deform_attn.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "deformable_detr/inputs.h"
#include "deformable_detr/ops.h"

#if defined(USE_CUDA)
#include "deformable_detr/cuda/plan.h"

// Part of the stable ABI, but declared only where torch itself was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace ms_deform_attn {
namespace {

using torch::headeronly::ScalarType;

// ---------------------------------------------------------------------------------------- backends

#if defined(USE_CUDA)
void check_cuda(const Tensor& value, const char* error) {
  check(error == nullptr, "ms_deform_attn on ", device_of(value), ": ", error ? error : "");
}

void* current_stream(const Tensor& value) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(value.get_device_index(), &stream) == 0,
        "cannot get the current CUDA stream of ", device_of(value));
  return stream;
}
#endif

// -------------------------------------------------------------------------- allocate and compute

Tensor allocate_and_forward(Inputs& inputs) {
  Params params{};
  inputs.check_and_align(params);
  Tensor output = torch::stable::new_empty(
      inputs.value, {params.batch, params.queries, int64_t(params.heads) * params.channels});
  if (output.numel() == 0) return output;
  if (inputs.attention_weights.numel() == 0) return torch::stable::zero_(output);
  params.output = output.data_ptr();
#if defined(USE_CUDA)
  if (inputs.value.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(inputs.value.get_device_index());
    check_cuda(inputs.value, cuda::forward(params, current_stream(inputs.value)));
    return output;
  }
#endif
  cpu::forward(params);
  return output;
}

struct Gradients {
  Tensor value, sampling_locations, attention_weights;
  std::optional<Tensor> reference_points;
};

Gradients allocate_and_backward(Inputs& inputs, const Tensor& grad_output, bool deterministic,
                                bool reference_needs_grad = false) {
  BackwardParams params{};
  inputs.check_and_align(params);
  const ScalarType dtype = inputs.value.scalar_type();

  check_shape("grad_output", grad_output,
              {{"batch", params.batch},
               {"queries", params.queries},
               {"heads*channels", int64_t(params.heads) * params.channels}});
  check(grad_output.scalar_type() == dtype, "grad_output has dtype ",
        torch::headeronly::toString(grad_output.scalar_type()), ", expected ",
        torch::headeronly::toString(dtype), ", the dtype of value");
  check_device("grad_output", grad_output, inputs.value);
  const Tensor aligned_grad_output = aligned(grad_output);
  params.grad_output = aligned_grad_output.data_ptr();

  params.deterministic = deterministic;
  // Half types are summed in float.
  const ScalarType acc_dtype = is_half(params.value_dtype) ? ScalarType::Float : dtype;

  Gradients grads{torch::stable::Tensor(), torch::stable::empty_like(inputs.sampling_locations),
                  torch::stable::empty_like(inputs.attention_weights), std::nullopt};
  (params.fused() ? params.grad_sampling_offsets : params.grad_sampling_locations) =
      grads.sampling_locations.data_ptr();
  (params.fused() ? params.grad_attention_logits : params.grad_attention_weights) =
      grads.attention_weights.data_ptr();
  if (reference_needs_grad) {
    grads.reference_points =
        torch::stable::new_empty(inputs.value,
                                 {params.batch, params.queries, params.heads,
                                  params.reference_levels, params.reference_coordinates},
                                 acc_dtype);
    params.grad_reference_points = grads.reference_points->data_ptr();
  }

  const bool no_channels = int64_t(params.heads) * params.channels == 0;
  if (no_channels || grads.attention_weights.numel() == 0) {
    grads.value = torch::stable::empty_like(inputs.value);
    torch::stable::zero_(grads.value);
    torch::stable::zero_(grads.sampling_locations);
    torch::stable::zero_(grads.attention_weights);
    if (reference_needs_grad) torch::stable::zero_(*grads.reference_points);
#if defined(USE_CUDA)
  } else if (inputs.value.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(inputs.value.get_device_index());
    cuda::BackwardPlan plan;
    check_cuda(inputs.value, cuda::plan_backward(params, plan));
    Tensor scratch;
    if (plan.scratch.bytes > 0) {
      scratch = torch::stable::new_empty(inputs.value, {plan.scratch.bytes}, ScalarType::Byte);
      params.scratch = scratch.data_ptr();
    }
    grads.value = plan.adds_to_zeros
                      ? torch::stable::new_zeros(inputs.value, inputs.value.sizes(), acc_dtype)
                      : torch::stable::empty_like(inputs.value);
    params.grad_value = grads.value.data_ptr();
    check_cuda(inputs.value, cuda::backward(params, plan, current_stream(inputs.value)));
    if (acc_dtype != dtype && plan.adds_to_zeros) {
      grads.value = torch::stable::to(grads.value, dtype);
    }
#endif
  } else {
    grads.value = torch::stable::empty_like(inputs.value);
    params.grad_value = grads.value.data_ptr();
    cpu::backward(params);
  }
  if (reference_needs_grad) {
    // Over the heads.
    grads.reference_points = torch::stable::to(
        torch::stable::sum(*grads.reference_points, torch::headeronly::IntHeaderOnlyArrayRef({2})),
        inputs.reference_points->scalar_type());
  }
  return grads;
}

}  // namespace

// ----------------------------------------------------------------------------------------- the ops

Tensor forward(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
               const Tensor& sampling_locations, const Tensor& attention_weights,
               const std::optional<std::vector<int64_t>>& points_per_level, bool nearest) {
  Inputs inputs{value,
                spatial_shapes,
                level_start_index,
                sampling_locations,
                attention_weights,
                points_per_level,
                nearest};
  return allocate_and_forward(inputs);
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights, const Tensor& grad_output,
    const std::optional<std::vector<int64_t>>& points_per_level, bool nearest, bool deterministic) {
  Inputs inputs{value,
                spatial_shapes,
                level_start_index,
                sampling_locations,
                attention_weights,
                points_per_level,
                nearest};
  const Gradients grads = allocate_and_backward(inputs, grad_output, deterministic);
  return {grads.value, grads.sampling_locations, grads.attention_weights};
}

Tensor fused_forward(const Tensor& value, const Tensor& spatial_shapes,
                     const Tensor& level_start_index, const Tensor& reference_points,
                     const Tensor& sampling_offsets, const Tensor& attention_logits,
                     const std::optional<std::vector<int64_t>>& points_per_level, bool nearest,
                     double offset_scale) {
  Inputs inputs{value,
                spatial_shapes,
                level_start_index,
                sampling_offsets,
                attention_logits,
                points_per_level,
                nearest,
                reference_points,
                offset_scale};
  return allocate_and_forward(inputs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits,
    const Tensor& grad_output, const std::optional<std::vector<int64_t>>& points_per_level,
    bool nearest, double offset_scale, bool reference_needs_grad, bool deterministic) {
  Inputs inputs{value,
                spatial_shapes,
                level_start_index,
                sampling_offsets,
                attention_logits,
                points_per_level,
                nearest,
                reference_points,
                offset_scale};
  const Gradients grads =
      allocate_and_backward(inputs, grad_output, deterministic, reference_needs_grad);
  return {grads.value,
          grads.reference_points ? *grads.reference_points
                                 : torch::stable::new_empty(reference_points, {0}),
          grads.sampling_locations, grads.attention_weights};
}

}  // namespace ms_deform_attn
