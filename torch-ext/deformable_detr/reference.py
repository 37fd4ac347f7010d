"""The eager definition of multi-scale deformable attention: the specification.

Tests compare the kernels with these functions in float64; benchmarks time them. They favour being
obviously right over being fast, and run on any device and under autograd.
"""

from typing import List, Optional

import torch


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

    For every query and head, samples each level's map at that level's points and adds the samples
    up, each times its attention weight. Everything after the inputs is computed in float64 for
    float64 inputs and in float32 otherwise.

    Args:
        value: (batch, sum(h*w), heads, channels); the levels' maps, flattened row by row, one
            after the other.
        spatial_shapes: (levels, 2) integers, the (h, w) of each level.
        level_start_index: (levels,) integers, where each level starts in ``value``'s dimension 1.
        sampling_locations: (batch, queries, heads, levels, points, 2), (x, y) as a fraction of
            the level's width and height, not clamped: pixel = location * size - 0.5. A corner
            outside its map contributes zero; so does a point whose x or y is NaN or infinite.
        attention_weights: (batch, queries, heads, levels, points).
        points_per_level: the number of points of each level; the locations are then (batch,
            queries, heads, sum(points_per_level), 2) and the weights one dimension less.
        method: "bilinear", or "nearest": the pixel (floor(x * width + 0.5), floor(y * height +
            0.5)), moved into the map.

    Returns:
        (batch, queries, heads * channels) in ``value``'s dtype.
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    compute_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    if points_per_level is None:
        levels, points = sampling_locations.shape[3:5]
        points_per_level = [points] * levels
        sampling_locations = sampling_locations.flatten(3, 4)
        attention_weights = attention_weights.flatten(3)

    # Per head a table of pixels: (batch, heads, sum(h*w), channels).
    table = value.to(compute_dtype).permute(0, 2, 1, 3)
    output = table.new_zeros(batch, heads, queries, channels)
    of_levels = zip(
        spatial_shapes.tolist(),
        level_start_index.tolist(),
        sampling_locations.to(compute_dtype).transpose(1, 2).split(points_per_level, 3),
        attention_weights.to(compute_dtype).transpose(1, 2).split(points_per_level, 3),
    )
    for (height, width), start, location, weight in of_levels:
        # (batch, heads, queries, points) each.
        finite = location.isfinite().all(-1)
        x, y = torch.where(finite[..., None], location, 0).unbind(-1)
        for row, column, share in _pixels(x, y, height, width, method):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & finite
            pixel = torch.where(inside, row * width + column, 0).long() + start
            corner = torch.gather(
                table, 2, pixel.flatten(2)[..., None].expand(-1, -1, -1, channels)
            ).view(batch, heads, queries, -1, channels)
            # A corner that does not count is replaced, not multiplied by zero: 0 * inf is NaN.
            corner = torch.where(inside[..., None], corner, 0)
            share = torch.where(inside, weight * share, 0)
            output = output + (share[..., None] * corner).sum(3)

    return output.transpose(1, 2).flatten(2).to(value.dtype)


def _pixels(x, y, height, width, method):
    """The pixels a sample at (x, y) takes, and how much of each: (row, column, share)."""
    if method == "nearest":
        column = (x * width + 0.5).floor().clamp(0, width - 1)
        row = (y * height + 0.5).floor().clamp(0, height - 1)
        yield row, column, torch.ones_like(x)
        return
    x = x * width - 0.5
    y = y * height - 0.5
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
            yield row, column, row_share * column_share


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
    """``ms_deform_attn`` after the softmax and the location arithmetic of Deformable DETR.

    Args:
        reference_points: (batch, queries, levels or 1, 2) as (x, y): location = reference +
            offset / (width, height), the level's size; or (batch, queries, levels or 1, 4) as
            (x, y, w, h): location = (x, y) + offset / points of the level * (w, h) *
            offset_scale.
        sampling_offsets: (batch, queries, heads, levels, points, 2).
        attention_logits: (batch, queries, heads, levels, points); the attention weights are their
            softmax over all points of a (batch, query, head).
        The others: as for ``ms_deform_attn``, with what it says of the locations and weights true
            of the offsets and logits.

    Returns:
        (batch, queries, heads * channels) in ``value``'s dtype.
    """
    compute_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    if points_per_level is None:
        levels, points = sampling_offsets.shape[3:5]
        points_per_level = [points] * levels
        sampling_offsets = sampling_offsets.flatten(3, 4)
        attention_logits = attention_logits.flatten(3)

    reference_points = reference_points.to(compute_dtype)
    reference_points = reference_points.expand(-1, -1, len(points_per_level), -1)
    locations = []
    for level, offsets in enumerate(sampling_offsets.to(compute_dtype).split(points_per_level, 3)):
        reference = reference_points[:, :, None, level, None]
        if reference.shape[-1] == 2:
            locations.append(reference + offsets / spatial_shapes[level].flip(0))
        else:
            share = offsets / points_per_level[level] * offset_scale
            locations.append(reference[..., :2] + share * reference[..., 2:])
    return ms_deform_attn(
        value,
        spatial_shapes,
        level_start_index,
        torch.cat(locations, 3),
        attention_logits.to(compute_dtype).softmax(-1),
        points_per_level=points_per_level,
        method=method,
    )
