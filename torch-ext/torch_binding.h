// The functions torch_binding.cpp registers. See torch-ext/deformable_detr/functional.py for what
// they compute, and deformable_detr/ms_deform_attn.cpp for what they check.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace ms_deform_attn {

torch::stable::Tensor forward(const torch::stable::Tensor& value,
                              const torch::stable::Tensor& spatial_shapes,
                              const torch::stable::Tensor& level_start_index,
                              const torch::stable::Tensor& sampling_locations,
                              const torch::stable::Tensor& attention_weights);

// Returns grad_value, grad_sampling_locations, grad_attention_weights.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> backward(
    const torch::stable::Tensor& value, const torch::stable::Tensor& spatial_shapes,
    const torch::stable::Tensor& level_start_index, const torch::stable::Tensor& sampling_locations,
    const torch::stable::Tensor& attention_weights, const torch::stable::Tensor& grad_output);

}  // namespace ms_deform_attn
