// Everything above the backends but the checks of the inputs: allocates the outputs, calls the
// backend on its device and stream.
#include "deformable_detr/ms_deform_attn.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

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
// function(stream), with the value's device as the current one, and named in what is thrown.
template <typename Function>
void on_device(const Tensor& value, Function&& function) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(value.get_device_index(), &stream) == 0,
        "cannot get the current CUDA stream of ", device_of(value));
  try {
    function(stream);
  } catch (const std::runtime_error& error) {
    check(false, "ms_deform_attn on ", device_of(value), ": ", error.what());
  }
}
#endif

// -------------------------------------------------------------------------- allocate and compute

// Throws what was caught. PyTorch is called to allocate and to copy alone, and the stable ABI does
// not tell why such a call failed.
[[noreturn]] void rethrow(const Tensor& value, const std::runtime_error& error) {
  const bool from_torch = std::string(error.what()).find("API call failed") != std::string::npos;
  check(!from_torch, "ms_deform_attn on ", device_of(value),
        ": out of memory, unless an earlier error of the device is pending. PyTorch could not "
        "allocate or copy a tensor: ",
        error.what());
  throw;
}

Tensor convert(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

}  // namespace

Tensor forward(Inputs&& inputs) try {
  Params params = inputs.check_and_align();
  Tensor output = torch::stable::new_empty(
      inputs.value, {params.batch, params.queries, int64_t(params.heads) * params.channels});
  if (output.numel() == 0) return output;
  if (params.points == 0) return torch::stable::zero_(output);
  params.output = output.data_ptr();
#if defined(USE_CUDA)
  if (inputs.value.is_cuda()) {
    on_device(inputs.value, [&](void* stream) {
      const cuda::ForwardPlan plan = cuda::plan_forward(params);
      Tensor scratch;
      if (plan.scratch_bytes > 0) {
        scratch = torch::stable::new_empty(inputs.value, {plan.scratch_bytes}, ScalarType::Byte);
        params.windows = scratch.data_ptr();
      }
      cuda::forward(params, plan, stream);
    });
    return output;
  }
#endif
  cpu::forward(params);
  return output;
} catch (const std::runtime_error& error) {
  rethrow(inputs.value, error);
}

Gradients backward(Inputs&& inputs, bool deterministic, const Wanted& wanted) try {
  const ScalarType coordinates_dtype = inputs.coordinates.scalar_type();
  const ScalarType weights_dtype = inputs.weights.scalar_type();
  const auto reference_dtype =
      inputs.reference_points ? inputs.reference_points->scalar_type() : ScalarType::Float;
  BackwardParams params{};
  static_cast<Params&>(params) = inputs.check_and_align();
  params.grad_output = inputs.grad_output->data_ptr();
  params.deterministic = deterministic;

  const auto nothing = [&] { return torch::stable::new_empty(inputs.value, {0}); };
  const auto empty_like = [&](bool needed, const Tensor& tensor) {
    return needed ? torch::stable::empty_like(tensor) : nothing();
  };
  // A GPU sums the gradients of reference points from those of the points.
  const bool points = wanted.points || (wanted.reference_points && inputs.value.is_cuda());
  Gradients grads{empty_like(wanted.value, inputs.value), empty_like(points, inputs.coordinates),
                  empty_like(points, inputs.weights), nothing()};
  params.grad_value = grads.value.data_ptr();
  (params.fused() ? params.grad_sampling_offsets : params.grad_sampling_locations) =
      grads.coordinates.data_ptr();
  (params.fused() ? params.grad_attention_logits : params.grad_attention_weights) =
      grads.weights.data_ptr();
  if (wanted.reference_points) {
    // Summed over the heads below, half types in float.
    const ScalarType acc_dtype =
        is_half(params.value_dtype) ? ScalarType::Float : inputs.value.scalar_type();
    grads.reference_points =
        torch::stable::new_empty(inputs.value,
                                 {params.batch, params.queries, params.heads,
                                  params.reference_levels, params.reference_coordinates},
                                 acc_dtype);
    params.grad_reference_points = grads.reference_points.data_ptr();
  }

  if (inputs.grad_output->numel() == 0 || params.points == 0) {
    torch::stable::zero_(grads.value);
    torch::stable::zero_(grads.coordinates);
    torch::stable::zero_(grads.weights);
    torch::stable::zero_(grads.reference_points);
#if defined(USE_CUDA)
  } else if (inputs.value.is_cuda()) {
    on_device(inputs.value, [&](void* stream) {
      const cuda::BackwardPlan plan = cuda::plan_backward(params);
      Tensor scratch;
      if (plan.scratch.bytes > 0) {
        scratch = torch::stable::new_empty(inputs.value, {plan.scratch.bytes}, ScalarType::Byte);
        params.scratch = scratch.data_ptr();
      }
      cuda::backward(params, plan, stream);
    });
#endif
  } else {
    cpu::backward(params);
  }
  if (!wanted.points) grads.coordinates = grads.weights = nothing();
  grads.coordinates = convert(grads.coordinates, coordinates_dtype);
  grads.weights = convert(grads.weights, weights_dtype);
  if (wanted.reference_points) {
    const int64_t heads[] = {2};
    grads.reference_points = torch::stable::sum(grads.reference_points, heads);
  }
  grads.reference_points = convert(grads.reference_points, reference_dtype);
  return grads;
} catch (const std::runtime_error& error) {
  rethrow(inputs.value, error);
}

}  // namespace ms_deform_attn
