"""The eager definition of multi-scale deformable attention: the specification.

Tests compare the kernels with this function in float64; benchmarks time it. It favours being
obviously right over being fast, and runs on any device and under autograd.
"""

import torch


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Multi-scale deformable attention (Zhu et al., Deformable DETR, arXiv:2010.04159, eq. 3).

    For every query and head, samples each level's map bilinearly at that level's points and adds
    the samples up, each times its attention weight. Everything after the inputs is computed in
    float64 for float64 inputs and in float32 otherwise.

    Args:
        value: (batch, sum(h*w), heads, channels); the levels' maps, flattened row by row, one
            after the other.
        spatial_shapes: (levels, 2) integers, the (h, w) of each level.
        level_start_index: (levels,) integers, where each level starts in ``value``'s dimension 1.
        sampling_locations: (batch, queries, heads, levels, points, 2), (x, y) as a fraction of
            the level's width and height, not clamped: pixel = location * size - 0.5. A corner
            outside its map contributes zero; so does a point whose x or y is NaN or infinite.
        attention_weights: (batch, queries, heads, levels, points).

    Returns:
        (batch, queries, heads * channels) in ``value``'s dtype.
    """
    batch, _, heads, channels = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    compute_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32

    # Per head a table of pixels: (batch, heads, sum(h*w), channels).
    table = value.to(compute_dtype).permute(0, 2, 1, 3)
    output = table.new_zeros(batch, heads, queries, channels)
    for level in range(levels):
        height, width = (int(size) for size in spatial_shapes[level])
        start = int(level_start_index[level])

        # (batch, heads, queries, points) each.
        location = sampling_locations[:, :, :, level].to(compute_dtype).transpose(1, 2)
        weight = attention_weights[:, :, :, level].to(compute_dtype).transpose(1, 2)
        finite = location.isfinite().all(-1, keepdim=True)
        x, y = torch.where(finite, location, 0).unbind(-1)
        finite = finite.squeeze(-1)
        x = x * width - 0.5
        y = y * height - 0.5
        left, top = x.floor(), y.floor()
        right_share, bottom_share = x - left, y - top

        for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
            for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & finite
                pixel = torch.where(inside, row * width + column, 0).long() + start
                share = torch.where(inside, weight * row_share * column_share, 0)
                corner = torch.gather(
                    table, 2, pixel.flatten(2)[..., None].expand(-1, -1, -1, channels)
                ).view(batch, heads, queries, points, channels)
                # A corner that does not count is replaced, not multiplied by zero: 0 * inf is NaN.
                corner = torch.where(inside[..., None], corner, 0)
                output = output + (share[..., None] * corner).sum(3)

    return output.transpose(1, 2).flatten(2).to(value.dtype)
