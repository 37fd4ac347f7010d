"""Deformable attention as a module with parameters, for people who build models.

Apart from ``layers``, whose classes hold nothing: kernels copies their forward into other modules.
"""

import math
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import nn

from .functional import fused_ms_deform_attn
from .levels import Sizes, level_tensors


class MSDeformAttn(nn.Module):
    """A multi-scale deformable attention block (Zhu et al., Deformable DETR, arXiv:2010.04159).

    Projects the pixels to values, predicts sampling offsets and attention weights from the queries,
    samples with the fused operator, and projects what it gives. Arguments, parameters and their
    initial values are those of Deformable DETR's module of this name, so that its checkpoints load,
    and those of transformers' attention modules, which have the same names.

    Save its ``state_dict``. A pickle of the whole module names this build of the kernel, and loads
    only where this very build is loaded.

    Args:
        d_model: channels of queries, pixels and output, a multiple of ``n_heads``.
        n_levels, n_heads, n_points: feature levels, heads, and points of each head in each level.
        points_per_level: the points of each level where levels differ (D-FINE: [3, 6, 3]), in the
            place of ``n_points``; RT-DETRv2's checkpoints load with or without it.
        method: "bilinear", or "nearest", RT-DETRv2's "discrete".
        offset_scale: for reference points with 4 coordinates, see ``fused_ms_deform_attn``.

    Raises:
        ValueError: ``d_model`` is no multiple of ``n_heads``, or ``points_per_level`` has not
            ``n_levels`` numbers.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        *,
        points_per_level: Optional[List[int]] = None,
        method: str = "bilinear",
        offset_scale: float = 0.5,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model is {d_model}, expected a multiple of n_heads, {n_heads}")
        if points_per_level is not None and len(points_per_level) != n_levels:
            raise ValueError(
                f"points_per_level is {points_per_level}, expected {n_levels} numbers, n_levels"
            )
        self.d_model, self.n_heads = d_model, n_heads
        self.n_levels, self.n_points = n_levels, n_points
        self.points_per_level = None if points_per_level is None else list(points_per_level)
        self.method, self.offset_scale = method, offset_scale
        total = sum(points_per_level or [n_points] * n_levels)
        self.sampling_offsets = nn.Linear(d_model, n_heads * total * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * total)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.register_load_state_dict_pre_hook(_drop_scales)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head i looks in direction 360 / heads * i, its point j of a level j + 1 pixels away.

        Wherever the query is, and with equal weights: the layers that predict them begin as zeros.
        """
        angles = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions /= directions.abs().amax(-1, keepdim=True)
        points = self.points_per_level or [self.n_points] * self.n_levels
        distances = torch.cat([torch.arange(1, number + 1) for number in points])
        offsets = directions[:, None] * distances[:, None]
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        input_flatten: torch.Tensor,
        input_spatial_shapes: Sizes,
        input_level_start_index: Optional[torch.Tensor] = None,
        input_padding_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Queries attend to the pixels around their reference points.

        Args:
            query: (batch, queries, d_model), with its position embedding added.
            reference_points: (batch, queries, n_levels or 1, 2) as (x, y) in [0, 1], or 4 as
                (x, y, w, h); a batch of 1 is for each.
            input_flatten: (batch, sum(h*w), d_model), the pixels, one level after the other.
            input_spatial_shapes: (n_levels, 2), the (h, w) of each level, or a list of pairs.
            input_level_start_index: (n_levels,), where each level starts in ``input_flatten``;
                computed if it is not given.
            input_padding_mask: (batch, sum(h*w)), True for pixels whose value counts as zero.

        Returns:
            (batch, queries, d_model).

        Raises:
            RuntimeError: the shapes do not fit together; the message names the operator's argument:
                value is (batch, sum(h*w), n_heads, d_model / n_heads).
        """
        if input_level_start_index is None or not isinstance(input_spatial_shapes, torch.Tensor):
            levels = level_tensors(input_spatial_shapes, query.device)
        else:
            levels = input_spatial_shapes, input_level_start_index
        output, _ = attend(
            self,
            query,
            reference_points,
            input_flatten,
            levels,
            input_padding_mask,
            self.points_per_level,
            self.method,
            self.offset_scale,
        )
        return output

    def extra_repr(self) -> str:
        points = self.points_per_level or self.n_points
        return (
            f"d_model={self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, "
            f"points={points}, method={self.method!r}"
        )


def _drop_scales(module: nn.Module, state_dict: Dict[str, Any], prefix: str, *_: Any) -> None:
    """RT-DETRv2's buffer of one over the points of a level, which the operator computes itself."""
    for name in ("n_points_scale", "num_points_scale"):
        state_dict.pop(prefix + name, None)


def attend(
    module: Any,
    query: torch.Tensor,
    reference_points: torch.Tensor,
    pixels: torch.Tensor,
    levels: Tuple[torch.Tensor, torch.Tensor],
    padding_mask: Optional[torch.Tensor],
    points_per_level: Optional[List[int]],
    method: str,
    offset_scale: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The body of a deformable attention, on the layers of any module that names them so.

    Args:
        module: has n_heads, n_levels, n_points, sampling_offsets and attention_weights; value_proj
            and output_proj if the module projects.
        levels: spatial_shapes and level_start_index as tensors.
        The others: as for ``MSDeformAttn``.

    Returns:
        The output, (batch, queries, d_model), and the logits of the attention weights, (batch,
        queries, heads, levels, points) or (batch, queries, heads, sum(points_per_level)).
    """
    projects = hasattr(module, "value_proj")
    value = module.value_proj(pixels) if projects else pixels
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[..., None], 0.0)
    points: Tuple[int, ...] = (module.n_levels, module.n_points)
    if points_per_level is not None:
        points = (sum(points_per_level),)
    logits = module.attention_weights(query).unflatten(-1, (module.n_heads, *points))
    if reference_points.shape[0] != query.shape[0]:
        reference_points = reference_points.expand(query.shape[0], -1, -1, -1)
    spatial_shapes, level_start_index = levels
    output = fused_ms_deform_attn(
        value.unflatten(-1, (module.n_heads, -1)),
        spatial_shapes,
        level_start_index,
        reference_points,
        module.sampling_offsets(query).unflatten(-1, (module.n_heads, *points, 2)),
        logits,
        points_per_level=points_per_level,
        method=method,
        offset_scale=offset_scale,
    )
    return (module.output_proj(output) if projects else output), logits


__all__ = ["MSDeformAttn"]
