// The functions torch_binding.cpp registers. See torch-ext/deformable_detr/functional.py for what
// they compute, and deformable_detr/ms_deform_attn.cpp for what they check.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ms_deform_attn {

torch::stable::Tensor forward(const torch::stable::Tensor& value,
                              const torch::stable::Tensor& spatial_shapes,
                              const torch::stable::Tensor& level_start_index,
                              const torch::stable::Tensor& sampling_locations,
                              const torch::stable::Tensor& attention_weights,
                              const std::optional<std::vector<int64_t>>& points_per_level,
                              bool nearest);

// Returns grad_value, grad_sampling_locations, grad_attention_weights.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> backward(
    const torch::stable::Tensor& value, const torch::stable::Tensor& spatial_shapes,
    const torch::stable::Tensor& level_start_index, const torch::stable::Tensor& sampling_locations,
    const torch::stable::Tensor& attention_weights, const torch::stable::Tensor& grad_output,
    const std::optional<std::vector<int64_t>>& points_per_level, bool nearest, bool deterministic);

torch::stable::Tensor fused_forward(
    const torch::stable::Tensor& value, const torch::stable::Tensor& spatial_shapes,
    const torch::stable::Tensor& level_start_index, const torch::stable::Tensor& reference_points,
    const torch::stable::Tensor& sampling_offsets, const torch::stable::Tensor& attention_logits,
    const std::optional<std::vector<int64_t>>& points_per_level, bool nearest, double offset_scale);

// Returns grad_value, grad_reference_points, grad_sampling_offsets, grad_attention_logits. Unless
// reference_needs_grad, grad_reference_points is empty: (0,).
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
fused_backward(const torch::stable::Tensor& value, const torch::stable::Tensor& spatial_shapes,
               const torch::stable::Tensor& level_start_index,
               const torch::stable::Tensor& reference_points,
               const torch::stable::Tensor& sampling_offsets,
               const torch::stable::Tensor& attention_logits,
               const torch::stable::Tensor& grad_output,
               const std::optional<std::vector<int64_t>>& points_per_level, bool nearest,
               double offset_scale, bool reference_needs_grad, bool deterministic);

}  // namespace ms_deform_attn
