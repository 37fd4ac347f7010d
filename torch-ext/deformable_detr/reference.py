"""The eager definition of multi-scale deformable attention: the specification.

Tests compare the kernels with these functions in float64; benchmarks time them; derivatives for
which there is no kernel are derivatives of these functions. They are meant to be obviously right
rather than fast. They run on any device, and autograd, torch.func and compilers can trace them.
"""

from typing import Iterator, List, Optional, Sequence, Tuple

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

    For every query and head, samples each level's map at that level's points and adds up the
    samples, each multiplied by its attention weight. All arithmetic is in float64 if ``value`` is
    float64, else in float32.

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
    sampling_locations, attention_weights, points_per_level = flatten_points(
        sampling_locations, attention_weights, points_per_level
    )
    dtype = _compute_dtype(value)
    widths_heights = spatial_shapes.flip(1).to(dtype)
    locations = sampling_locations.to(dtype).split(points_per_level, 3)
    pixels = [location * size - 0.5 for location, size in zip(locations, widths_heights)]
    weights = attention_weights.to(dtype).split(points_per_level, 3)
    return _sample(value, spatial_shapes, level_start_index, pixels, weights, method)


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
        The others: as for ``ms_deform_attn``; offsets take the place of locations, and logits that
            of weights.

    Returns:
        (batch, queries, heads * channels) in ``value``'s dtype.
    """
    sampling_offsets, attention_logits, points_per_level = flatten_points(
        sampling_offsets, attention_logits, points_per_level
    )
    dtype = _compute_dtype(value)
    references = reference_points.to(dtype).expand(-1, -1, len(points_per_level), -1)
    offsets = sampling_offsets.to(dtype).split(points_per_level, 3)
    pixels = []
    for level, size in enumerate(spatial_shapes.flip(1).to(dtype)):
        reference, offset = references[:, :, None, level, None], offsets[level]
        if reference.shape[-1] == 4:
            offset = offset / points_per_level[level] * reference[..., 2:] * offset_scale * size
        pixels.append(reference[..., :2] * size + offset - 0.5)
    weights = attention_logits.to(dtype).softmax(-1).split(points_per_level, 3)
    return _sample(value, spatial_shapes, level_start_index, pixels, weights, method)


def flatten_points(
    coordinates: torch.Tensor, weights: torch.Tensor, points_per_level: Optional[List[int]]
) -> Tuple[torch.Tensor, torch.Tensor, List[int]]:
    """Both with the points of all levels in one dimension, and how many each level has."""
    if points_per_level is None:
        levels, points = weights.shape[3:5]
        return coordinates.flatten(3, 4), weights.flatten(3), [points] * levels
    return coordinates, weights, list(points_per_level)


def _compute_dtype(value: torch.Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _sample(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    pixels: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    method: str,
) -> torch.Tensor:
    """The operator from each level's pixels, (batch, queries, heads, points, 2), and weights."""
    batch, _, heads, channels = value.shape
    queries = pixels[0].shape[1]

    # Per head a table of pixels: (batch, heads, sum(h*w), channels).
    table = value.to(_compute_dtype(value)).permute(0, 2, 1, 3)
    output = table.new_zeros(batch, heads, queries, channels)
    # Sizes and starts stay tensors: nothing waits for the GPU, and compilers can trace this.
    for shape, start, pixel, weight in zip(spatial_shapes, level_start_index, pixels, weights):
        height, width = shape
        finite = pixel.isfinite().all(-1)
        x, y = torch.where(finite[..., None], pixel, 0).unbind(-1)
        for row, column, corner_weight in _corners(x, y, height, width, method):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & finite
            index = torch.where(inside, row * width + column, 0).long() + start
            factor = torch.where(inside, weight * corner_weight, 0)
            # From (batch, queries, heads, points) each to (batch, heads, queries, points).
            inside, index, factor = (t.transpose(1, 2) for t in (inside, index, factor))
            corner = torch.gather(
                table, 2, index.flatten(2)[..., None].expand(-1, -1, -1, channels)
            ).view(*index.shape, channels)
            # A corner outside the map is replaced, not multiplied by zero: 0 * inf is NaN.
            corner = torch.where(inside[..., None], corner, 0)
            output = output + (factor[..., None] * corner).sum(3)

    return output.transpose(1, 2).flatten(2).to(value.dtype)


def _corners(
    x: torch.Tensor, y: torch.Tensor, height: torch.Tensor, width: torch.Tensor, method: str
) -> Iterator[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The pixels that contribute to a sample at pixel (x, y): (row, column, corner weight)."""
    left, top = x.floor(), y.floor()
    if method == "nearest":
        # floor(location * size + 0.5), moved into the map.
        row, column = (top + 1).clamp(min=0), (left + 1).clamp(min=0)
        yield row.minimum(height - 1), column.minimum(width - 1), torch.ones_like(x)
        return
    right_weight, bottom_weight = x - left, y - top
    for row, row_weight in ((top, 1 - bottom_weight), (top + 1, bottom_weight)):
        for column, column_weight in ((left, 1 - right_weight), (left + 1, right_weight)):
            yield row, column, row_weight * column_weight


__all__ = ["fused_ms_deform_attn", "ms_deform_attn"]
