"""Multi-scale deformable attention: the sampling operator of Deformable DETR and its heirs."""

from . import integrations, layers, reference
from .functional import (
    fused_ms_deform_attn,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)

__all__ = [
    "fused_ms_deform_attn",
    "integrations",
    "layers",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "reference",
]
