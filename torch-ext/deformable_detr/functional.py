"""Multi-scale deformable attention as functions."""

from typing import List, Optional

import torch

from . import registrations  # noqa: F401
from .autograd import call
from .names import OF_EXTENSIONS, also_named
from .native import ops  # noqa: F401
from .operations import FUSED, PLAIN


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    *,
    points_per_level: Optional[List[int]] = None,
    method: str = "bilinear",
) -> torch.Tensor:
    """Multi-scale deformable attention (Zhu et al., Deformable DETR, arXiv:2010.04159, eq. 3).

    For every query and head, samples each level's map at that level's points and adds up the
    samples, each multiplied by its attention weight. Differentiable in ``value``,
    ``sampling_locations`` and ``attention_weights``, to any order, under ``torch.compile`` and
    under every transform of ``torch.func``. First derivatives in reverse mode are kernels; all
    others go through the eager definition, ``reference``, and take its time. Under
    ``torch.autocast``, ``value`` is cast to the autocast dtype; locations and weights keep theirs.

    ``torch.utils.flop_counter`` counts 8 * batch * queries * heads * points * channels operations
    (points: of all levels together; nearest sampling: 2 in place of 8), and for the gradients
    twice as many. Of a DTensor the batch and the heads may be sharded.

    Args:
        value: (batch, sum(h*w), heads, channels), float32, float16, bfloat16 or float64; the
            levels' maps, flattened row by row, one after the other.
        spatial_shapes: (levels, 2), int64 or int32, the (h, w) of each level in pixels, each at
            most 2^24 unless ``value`` is float64.
        level_start_index: (levels,), int64 or int32, where each level starts in ``value``'s
            dimension 1. Levels that share pixels are refused on a CPU and summed on a GPU.
        sampling_locations: (batch, queries, heads, levels, points, 2), float32, float16 or
            bfloat16, or float64 as ``value``; (x, y) as a fraction of the level's width and height,
            not clamped: pixel = location * size - 0.5. A corner outside its map contributes zero;
            so does a point whose x or y is NaN or infinite, and its gradient is zero.
        attention_weights: (batch, queries, heads, levels, points), dtype as for the locations.
        points_per_level: the number of points of each level, where levels differ (D-FINE,
            arXiv:2410.13842: [3, 6, 3]). The locations are then (batch, queries, heads,
            sum(points_per_level), 2), level after level, and the weights (batch, queries, heads,
            sum(points_per_level)). If the numbers differ, there may be up to 32 levels.
        method: "bilinear", or "nearest" (RT-DETRv2, arXiv:2407.17140, its "discrete" sampling):
            only the pixel (floor(x * width + 0.5), floor(y * height + 0.5)), moved into the map,
            is sampled, and the gradient of the locations is zero.

    Returns:
        (batch, queries, heads * channels) in ``value``'s dtype. Sums are float32 for half types.

    Raises:
        RuntimeError: an argument is not a tensor, or its shape, dtype or device does not fit; the
            level metadata (if it is on the CPU) does not describe ``value``;
            ``points_per_level`` does not describe the locations; or a DTensor is sharded in
            another way. This message and the next name the argument.
        NotImplementedError: a tensor is sparse, nested or quantized.
        ValueError: ``method`` is unknown.
    """
    tensors = (
        _autocast(value),
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
    )
    output: torch.Tensor = call(PLAIN, tensors, (points_per_level, _is_nearest(method)))
    return output


def fused_ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
    *,
    points_per_level: Optional[List[int]] = None,
    method: str = "bilinear",
    offset_scale: float = 0.5,
) -> torch.Tensor:
    """``ms_deform_attn`` with the softmax and the location arithmetic inside.

    Takes what the two linear layers of a deformable attention module return (Deformable DETR,
    arXiv:2010.04159; RT-DETR; D-FINE), so that neither locations nor weights are ever stored.
    Differentiable in ``value``, ``reference_points``, ``sampling_offsets`` and
    ``attention_logits``. Derivatives, compilation, autocast, DTensors and counted operations are
    as for ``ms_deform_attn``; the softmax and the location arithmetic are not counted.

    Args:
        value, spatial_shapes, level_start_index: as for ``ms_deform_attn``.
        reference_points: (batch, queries, levels, 2) as (x, y), a fraction of the image: location
            = (x, y) + offset / (width, height) of the level, so that offsets are in pixels. Or
            (batch, queries, levels, 4) as (x, y, w, h): location = (x, y) + offset / points of
            the level * (w, h) * ``offset_scale``. A single level stands for all levels.
            Dtype as for ``ms_deform_attn``'s locations, as of offsets and logits.
        sampling_offsets: (batch, queries, heads, levels, points, 2) as (x, y).
        attention_logits: (batch, queries, heads, levels, points). The attention weights are their
            softmax over all points of a (batch, query, head), in float32 or better.
        points_per_level, method: as for ``ms_deform_attn``; with ``points_per_level`` the offsets
            are (batch, queries, heads, sum(points_per_level), 2) and the logits (batch, queries,
            heads, sum(points_per_level)).
        offset_scale: for reference points with 4 coordinates.

    Returns:
        (batch, queries, heads * channels) in ``value``'s dtype.

    Raises:
        RuntimeError, NotImplementedError, ValueError: as for ``ms_deform_attn``; also if
            ``reference_points`` have neither 2 nor 4 coordinates.
    """
    tensors = (
        _autocast(value),
        spatial_shapes,
        level_start_index,
        reference_points,
        sampling_offsets,
        attention_logits,
    )
    options = points_per_level, _is_nearest(method), offset_scale
    output: torch.Tensor = call(FUSED, tensors, options)
    return output


def _is_nearest(method: str) -> bool:
    if method not in ("bilinear", "nearest"):
        raise ValueError(f"method is {method!r}, expected 'bilinear' or 'nearest'")
    return method == "nearest"


def _autocast(value: torch.Tensor) -> torch.Tensor:
    """``value``, cast to the autocast dtype where autocast is on."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return value
    if not isinstance(value, torch.Tensor) or value.dtype == torch.float64:
        return value
    device = value.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return value
    return value.to(torch.get_autocast_dtype(device))


@also_named(**OF_EXTENSIONS)
def ms_deform_attn_forward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc: torch.Tensor,
    attn_weight: torch.Tensor,
    im2col_step: int = 64,
) -> torch.Tensor:
    """``ms_deform_attn`` under the name and with the arguments of Deformable DETR's extension.

    Arguments may be given by mmcv's names, too: value_spatial_shapes, value_level_start_index,
    sampling_locations and attention_weights.

    ``im2col_step`` is accepted for compatibility and ignored: there is no column buffer to split,
    so any batch size works.
    """
    tensors = (value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    output: torch.Tensor = call(PLAIN, tensors, PLAIN.defaults)
    return output


@also_named(**OF_EXTENSIONS)
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
        RuntimeError, NotImplementedError: as for ``ms_deform_attn``.
    """
    tensors = (value, spatial_shapes, level_start_index, sampling_loc, attn_weight, grad_output)
    everything = (True,) * len(PLAIN.tensors)
    wanted = PLAIN.backward.request(everything, torch.are_deterministic_algorithms_enabled())
    return list(call(PLAIN.backward, tensors, (*PLAIN.defaults, *wanted)))
