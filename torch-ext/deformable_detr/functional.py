"""Multi-scale deformable attention as functions, and what PyTorch must know of the native ops."""

from typing import List

import torch

from ._ops import add_op_namespace_prefix, ops


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Multi-scale deformable attention (Zhu et al., Deformable DETR, arXiv:2010.04159, eq. 3).

    For every query and head, samples each level's map bilinearly at that level's points and adds
    the samples up, each times its attention weight. Differentiable in ``value``,
    ``sampling_locations`` and ``attention_weights``; works under ``torch.compile``.

    Args:
        value: (batch, sum(h*w), heads, channels), float32, float16, bfloat16 or float64; the
            levels' maps, flattened row by row, one after the other.
        spatial_shapes: (levels, 2), int64 or int32, the (h, w) of each level in pixels.
        level_start_index: (levels,), int64 or int32, where each level starts in ``value``'s
            dimension 1.
        sampling_locations: (batch, queries, heads, levels, points, 2), ``value``'s dtype or
            float32 beside a half ``value``; (x, y) as a fraction of the level's width and height,
            not clamped: pixel = location * size - 0.5. A corner outside its map contributes zero;
            so does a point whose x or y is NaN or infinite, and its gradient is zero.
        attention_weights: (batch, queries, heads, levels, points), dtype as for the locations.

    Returns:
        (batch, queries, heads * channels) in ``value``'s dtype. Sums are float32 for half types.

    Raises:
        RuntimeError: an argument's shape, dtype or device does not fit, or the level metadata (if
            it is on the CPU) does not describe ``value``; the message names the argument.
    """
    return ops.ms_deform_attn_forward(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


def ms_deform_attn_forward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc: torch.Tensor,
    attn_weight: torch.Tensor,
    im2col_step: int = 64,
) -> torch.Tensor:
    """``ms_deform_attn`` under the name and with the arguments of Deformable DETR's extension.

    ``im2col_step`` is accepted for compatibility and ignored: there is no column buffer to split,
    so any batch size works.
    """
    return ops.ms_deform_attn_forward(
        value, spatial_shapes, level_start_index, sampling_loc, attn_weight
    )


def ms_deform_attn_backward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc: torch.Tensor,
    attn_weight: torch.Tensor,
    grad_output: torch.Tensor,
    im2col_step: int = 64,
) -> List[torch.Tensor]:
    """The gradients of ``ms_deform_attn``, without autograd.

    Args:
        grad_output: (batch, queries, heads * channels) in ``value``'s dtype; the others as for
            ``ms_deform_attn``, ``im2col_step`` as for ``ms_deform_attn_forward``.

    Returns:
        [grad_value, grad_sampling_loc, grad_attn_weight], each in its input's shape and dtype;
        grad_value is summed in float32 for half types.

    Raises:
        RuntimeError: as for ``ms_deform_attn``.
    """
    return list(
        ops.ms_deform_attn_backward(
            value, spatial_shapes, level_start_index, sampling_loc, attn_weight, grad_output
        )
    )


@torch.library.register_fake(add_op_namespace_prefix("ms_deform_attn_forward"))
def _forward_fake(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


@torch.library.register_fake(add_op_namespace_prefix("ms_deform_attn_backward"))
def _backward_fake(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, grad_output
):
    return tuple(
        tensor.new_empty(tensor.shape) for tensor in (value, sampling_locations, attention_weights)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_output):
    grad_value, grad_locations, grad_weights = ops.ms_deform_attn_backward(
        *ctx.saved_tensors, grad_output
    )
    return grad_value, None, None, grad_locations, grad_weights


torch.library.register_autograd(
    add_op_namespace_prefix("ms_deform_attn_forward"), _backward, setup_context=_setup_context
)
