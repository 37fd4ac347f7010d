"""Multi-scale deformable attention: the sampling operator of Deformable DETR and its heirs."""

from pathlib import Path

from . import integrations, layers, modules, native, reference
from .functional import (
    fused_ms_deform_attn,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from .levels import ms_deform_attn_list

native.check_build(Path(__file__).parent)

__all__ = [
    "fused_ms_deform_attn",
    "integrations",
    "layers",
    "modules",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "ms_deform_attn_list",
    "reference",
]
