// The operators, as torch-ext/torch_binding.cpp registers them. What they compute stands in
// torch-ext/deformable_detr/functional.py, what they refuse in inputs.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ms_deform_attn {

using torch::stable::Tensor;
using PointsPerLevel = std::optional<std::vector<int64_t>>;

Tensor forward(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
               const Tensor& sampling_locations, const Tensor& attention_weights,
               const PointsPerLevel& points_per_level, bool nearest);

// Returns grad_value, grad_sampling_locations, grad_attention_weights: the first if
// value_needs_grad, the others if points_need_grad, else a tensor of shape (0,) in their place.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights, const Tensor& grad_output,
    const PointsPerLevel& points_per_level, bool nearest, bool deterministic, bool value_needs_grad,
    bool points_need_grad);

Tensor fused_forward(const Tensor& value, const Tensor& spatial_shapes,
                     const Tensor& level_start_index, const Tensor& reference_points,
                     const Tensor& sampling_offsets, const Tensor& attention_logits,
                     const PointsPerLevel& points_per_level, bool nearest, double offset_scale);

// Returns grad_value, grad_reference_points, grad_sampling_offsets, grad_attention_logits; the
// second if reference_needs_grad, the others as above.
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits,
    const Tensor& grad_output, const PointsPerLevel& points_per_level, bool nearest,
    double offset_scale, bool reference_needs_grad, bool deterministic, bool value_needs_grad,
    bool points_need_grad);

}  // namespace ms_deform_attn
