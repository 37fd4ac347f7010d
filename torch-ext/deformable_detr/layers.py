"""The layers that kernels puts in the place of transformers' layers and functions."""

from typing import List, Tuple

import torch
from torch import nn

from . import private
from .functional import ms_deform_attn
from .levels import ms_deform_attn_list
from .native import ops

# transformers' names for the methods.
METHODS = {"default": "bilinear", "discrete": "nearest"}


class MultiScaleDeformableAttention(nn.Module):
    """Multi-scale deformable attention with the signature of transformers' layer of this name.

    Stateless. Takes the place of the layer in Deformable DETR, Grounding DINO, RT-DETR and the
    other models of transformers that share it; see ``ms_deform_attn`` for shapes and dtypes.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: List[Tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        if torch.jit.is_scripting():  # of Python, TorchScript takes only what it can compile
            output: torch.Tensor = ops.ms_deform_attn_forward(
                value,
                value_spatial_shapes,
                level_start_index,
                sampling_locations,
                attention_weights,
            )
            return output
        if private.is_exporting():  # sizes in a list stay symbolic, a tensor may fix them
            return ms_deform_attn_list(
                value, value_spatial_shapes_list, sampling_locations, attention_weights
            )
        return ms_deform_attn(
            value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights
        )


class MultiScaleDeformableAttentionList(nn.Module):
    """The same with the signature of ``multi_scale_deformable_attention``, and sizes as a list.

    Stateless. Mask2Former and OneFormer of transformers sample in this function; see
    ``ms_deform_attn_list``.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: List[Tuple[int, int]],
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
    ) -> torch.Tensor:
        return ms_deform_attn_list(
            value, value_spatial_shapes, sampling_locations, attention_weights
        )


class MultiScaleDeformableAttentionV2(nn.Module):
    """The same with the signature of ``multi_scale_deformable_attention_v2``.

    Stateless. RT-DETRv2, D-FINE and DEIMv2 of transformers sample in this function, with the points
    of all levels in one dimension; see ``ms_deform_attn_list``. ``method`` is "default" for
    bilinear, "discrete" for nearest.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: List[Tuple[int, int]],
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        num_points_list: List[int],
        method: str = "default",
    ) -> torch.Tensor:
        return ms_deform_attn_list(
            value,
            value_spatial_shapes,
            sampling_locations,
            attention_weights,
            points_per_level=num_points_list,
            method=METHODS.get(method, method),
        )


__all__ = [
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttentionList",
    "MultiScaleDeformableAttentionV2",
]
