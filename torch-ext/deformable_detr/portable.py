"""The operators in PyTorch's own, for programs that leave this kernel behind: ONNX, and others.

reference.py is the specification. Here bilinear samples are taken by ``grid_sample``, which ONNX
has as GridSample, and sizes may be symbolic.
"""

import inspect
from typing import Any, Callable, Dict, List, Optional

import torch
from torch.nn import functional as F

from . import private, reference
from .native import ops


def in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` traces the call: ONNX has no place for this kernel."""
    return private.is_exporting() and _exporter_runs()


@torch.compiler.assume_constant_result  # Dynamo takes torch's own function for False
def _exporter_runs() -> bool:
    return torch.onnx.is_in_onnx_export()


@torch.compiler.assume_constant_result
def _refuse_old_opsets() -> None:
    """torch.onnx.export exports for a newer opset if it cannot convert, and only logs that."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is torch.onnx.export.__code__:
            opset = frame.f_locals.get("opset_version")
            if opset is not None and opset < 16:
                raise ValueError(f"opset_version is {opset}, expected at least 16: GridSample's")
        frame = frame.f_back


def decompositions() -> Dict[object, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``, which puts PyTorch's operators in place.

        table = torch.export.default_decompositions()
        table.update(kernel.integrations.decompositions())
        program = torch.export.export(model, args).run_decompositions(table)

    ``torch.export.load`` then needs no kernel. ``torch.onnx.export`` needs no table, but for a
    program that was exported before.
    """
    return {
        ops.ms_deform_attn_forward.default: ms_deform_attn,
        ops.fused_ms_deform_attn_forward.default: fused_ms_deform_attn,
    }


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    points_per_level: Optional[List[int]] = None,
    nearest: bool = False,
) -> torch.Tensor:
    """The op ``ms_deform_attn_forward``, which ``functional.ms_deform_attn`` describes.

    Args:
        spatial_shapes, level_start_index: tensors, or lists of integers, symbolic or not: what is
            not read from a tensor leaves no trace in the program.
    """
    sampling_locations, attention_weights, points_per_level = reference.flatten_points(
        sampling_locations, attention_weights, points_per_level
    )
    # GridSample has nearest pixels of its own, others at a border and half way between two; and no
    # float64 in most versions.
    if nearest or value.dtype == torch.float64:
        return reference.ms_deform_attn(
            value,
            _as_tensor(spatial_shapes, value).view(-1, 2),
            _as_tensor(level_start_index, value),
            sampling_locations,
            attention_weights,
            points_per_level=points_per_level,
            method="nearest" if nearest else "bilinear",
        )

    if in_onnx_export():
        _refuse_old_opsets()
    batch, pixels, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    maps = value.float().permute(0, 2, 3, 1)  # (batch, heads, channels, pixels)
    # (batch * heads, queries, points, 2) and (batch * heads, 1, queries, points) of each level.
    grids = (2 * sampling_locations.float() - 1).transpose(1, 2).flatten(0, 1)
    weights = attention_weights.float().transpose(1, 2).flatten(0, 1).unsqueeze(1)
    output: Any = 0
    for (height, width), start, grid, weight in zip(
        _as_integers(spatial_shapes),
        _as_integers(level_start_index),
        grids.split(points_per_level, 2),
        weights.split(points_per_level, 3),
    ):
        for size in (height, width):  # sizes that are read from a tensor could be anything
            torch._check(size > 0)
            torch._check(size <= pixels)
        torch._check(start >= 0)
        torch._check(start + height * width <= pixels)
        level = maps.narrow(3, start, height * width).reshape(
            batch * heads, channels, height, width
        )
        samples = F.grid_sample(level, grid, align_corners=False)
        output = output + (samples * weight).sum(-1)
    result: torch.Tensor = output.reshape(batch, heads * channels, queries).transpose(1, 2)
    return result.to(value.dtype)


def fused_ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
    points_per_level: Optional[List[int]],
    nearest: bool,
    offset_scale: float,
) -> torch.Tensor:
    """The op ``fused_ms_deform_attn_forward``; levels as for ``ms_deform_attn``."""
    sampling_offsets, attention_logits, points_per_level = reference.flatten_points(
        sampling_offsets, attention_logits, points_per_level
    )
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    levels = len(points_per_level)
    references = reference_points.to(dtype).expand(-1, -1, levels, -1).unbind(2)
    offsets = sampling_offsets.to(dtype).split(points_per_level, 3)
    locations = []
    for level, (points, offset) in enumerate(zip(points_per_level, offsets)):
        point = references[level][:, :, None, None]
        if point.shape[-1] == 4:
            offset = offset / points * point[..., 2:] * offset_scale
        else:
            height, width = spatial_shapes[level]
            offset = torch.stack([offset[..., 0] / width, offset[..., 1] / height], -1)
        locations.append(point[..., :2] + offset)
    return ms_deform_attn(
        value,
        spatial_shapes,
        level_start_index,
        torch.cat(locations, 3),
        attention_logits.to(dtype).softmax(-1),
        points_per_level,
        nearest,
    )


def _as_integers(numbers: Any) -> Any:
    return numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers


def _as_tensor(numbers: Any, like: torch.Tensor) -> torch.Tensor:
    if isinstance(numbers, torch.Tensor):
        return numbers
    flat = [x for size in numbers for x in (size if isinstance(size, tuple) else (size,))]
    return torch.cat([torch.full((1,), x, dtype=torch.int64, device=like.device) for x in flat])
