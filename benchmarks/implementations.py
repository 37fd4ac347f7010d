"""What is compared. To add an implementation, add an entry to ``IMPLEMENTATIONS``."""

from functools import partial

import torch
from torch.nn import functional as F

from .benchmark import Inputs, Workload, for_points_of
from .operators import Implementation, Operator, get_project_kernel
from .peers import PEERS


def seed_eager(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    points_per_level: list[int] | None = None,
) -> torch.Tensor:
    """The eager function of the kernels-benchmarks project, in substance: the baseline.

    Per level, the four corners are read by advanced indexing, with clamped indices and float32
    masks. Like the original it computes coordinates in the dtype of the locations, copies the
    shapes to the host, and needs finite locations.

    Args:
        points_per_level: where the levels' numbers of points differ; locations and weights then
            have one dimension for all points, as ``benchmark.make_inputs`` says.
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    shapes = spatial_shapes.tolist()
    batch_index = torch.arange(batch, device=value.device).view(-1, 1, 1, 1)
    head_index = torch.arange(heads, device=value.device).view(1, 1, -1, 1)
    locations = _by_level(sampling_locations, points_per_level)
    weights = _by_level(attention_weights, points_per_level)
    output = value.new_zeros(batch, queries, heads, channels)
    for level, pixels in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        height, width = shapes[level]
        pixels = pixels.reshape(batch, height, width, heads, channels)
        # (batch, queries, heads, points) each.
        x = locations[level][..., 0] * width - 0.5
        y = locations[level][..., 1] * height - 0.5
        left, top = x.floor().long(), y.floor().long()
        right_share, bottom_share = x - left.float(), y - top.float()

        sample = 0
        for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
            row_inside = (row >= 0) & (row < height)
            row_index = row.clamp(0, height - 1)
            for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
                inside = row_inside & (column >= 0) & (column < width)
                column_index = column.clamp(0, width - 1)
                corner = pixels[batch_index, row_index, column_index, head_index]
                corner = corner * inside.unsqueeze(-1).float()
                sample = sample + (row_share * column_share).unsqueeze(-1) * corner
        output += (sample * weights[level].unsqueeze(-1)).sum(dim=3)
    return output.flatten(2)


def _by_level(tensor: torch.Tensor, points_per_level: list[int] | None) -> tuple[torch.Tensor, ...]:
    """(batch, queries, heads, points, ...) of each level."""
    return tensor.unbind(3) if points_per_level is None else tensor.split(points_per_level, 3)


def grid_sample(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    *,
    shapes: tuple[tuple[int, int], ...],
    points_per_level: list[int] | None = None,
) -> torch.Tensor:
    """The decomposition of Deformable DETR's and transformers' models: one grid_sample per level.

    Args:
        shapes: spatial_shapes on the host, which models have at hand.
        points_per_level: as for ``seed_eager``.
    """
    batch, _, heads, channels = value.shape
    # Beside float32 locations, half values are promoted, as autocast promotes them.
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    grids = _by_level((2 * sampling_locations - 1).to(dtype), points_per_level)
    samples = []
    for level, pixels in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        images = pixels.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shapes[level])
        grid = grids[level].transpose(1, 2).flatten(0, 1)
        samples.append(
            F.grid_sample(
                images.to(dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )
        )
    # (batch * heads, channels, queries, all points), each times its weight.
    weights = attention_weights.flatten(3).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def _load_grid_sample_compiled(workload: Workload) -> Operator:
    # Each workload counts as new: else dynamo stops specialising after a few of them.
    torch.compiler.reset()
    # Compiled backwards free what they were given; timing calls them again and again.
    torch._functorch.config.donated_buffer = False
    return Operator(torch.compile(_grid_sample_of(workload), dynamic=False))


def _grid_sample_of(workload: Workload):
    return partial(for_points_of(workload, grid_sample), shapes=workload.shapes)


def _load_kernel(workload: Workload) -> Operator:
    kernel = get_project_kernel()
    # It takes one number of points for all levels.
    backward = kernel.ms_deform_attn_backward if isinstance(workload.points, int) else None
    return Operator(for_points_of(workload, kernel.ms_deform_attn), backward)


def _load_fused(workload: Workload) -> Operator:
    """From reference points, offsets and logits, which a model's linear layers give."""
    counts = torch.tensor(workload.points_per_level)
    sizes = torch.tensor(workload.shapes).flip(1).repeat_interleave(counts, 0)  # of each point
    names = "grad_value grad_reference_points grad_sampling_offsets grad_attention_logits".split()
    kernel = get_project_kernel()

    def arrange(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        value, shapes, starts, locations, weights = inputs
        flat = locations.double().flatten(3, -2)  # the points of all levels in one dimension
        # One reference point a query, amid its points.
        references = flat.mean((2, 3))[:, :, None].to(locations.dtype)
        offsets = (flat - references.double()[:, :, None]) * sizes.to(flat)
        offsets = offsets.view_as(locations).to(locations.dtype)
        return value, shapes, starts, references, offsets, weights.double().log().to(weights.dtype)

    return Operator(
        for_points_of(workload, kernel.fused_ms_deform_attn),
        arrange=arrange,
        reference=for_points_of(workload, kernel.reference.fused_ms_deform_attn),
        names=names,
    )


BASELINE = "seed_eager"  # speed-ups are over this one
KERNEL = "deformable_detr"
FUSED = "deformable_detr_fused"
OURS = (KERNEL, FUSED)

_EAGER = {"family": "pytorch", "backend": "eager"}
_COMPILED = {"family": "pytorch", "backend": "compiled"}
_NATIVE = {"family": "hf-kernels", "backend": "native"}
IMPLEMENTATIONS = {
    BASELINE: Implementation(
        _EAGER, lambda workload: Operator(for_points_of(workload, seed_eager))
    ),
    "grid_sample": Implementation(_EAGER, lambda workload: Operator(_grid_sample_of(workload))),
    "grid_sample_compiled": Implementation(_COMPILED, _load_grid_sample_compiled),
    KERNEL: Implementation(_NATIVE, _load_kernel),
    FUSED: Implementation(_NATIVE, _load_fused),
    **PEERS,
}
