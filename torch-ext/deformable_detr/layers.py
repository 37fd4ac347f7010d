"""The layer that transformers replaces by this kernel."""

from typing import List, Tuple

import torch
from torch import nn

from .functional import ms_deform_attn
from .native import ops


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
            return ops.ms_deform_attn_forward(
                value,
                value_spatial_shapes,
                level_start_index,
                sampling_locations,
                attention_weights,
            )
        return ms_deform_attn(
            value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights
        )


__all__ = ["MultiScaleDeformableAttention"]
