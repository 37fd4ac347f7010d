"""Other kernels for the same operator: whichever of them this environment has.

None is installed by requirements.txt. A peer is timed from its Python entry on, with its arguments
in the form it wants; what it does not offer is recorded as unsupported.
"""

from functools import cache, partial
from importlib import import_module

import torch
from kernels import get_kernel

from .benchmark import Inputs, Workload
from .operators import Gradients, Implementation, Operator, Unsupported

IM2COL_STEP = 64  # what the models pass
COMMUNITY = "kernels-community/deformable-detr"


def _equal_points(workload: Workload) -> int:
    if not isinstance(workload.points, int):
        raise Unsupported(f"points is {workload.points}, expected one number for all levels")
    return workload.points


def _without_bfloat16(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    if inputs.value.dtype == torch.bfloat16:
        raise Unsupported("value is torch.bfloat16, expected float16, float32 or float64")
    return tuple(inputs)


# ---------------------------------------------------------------- kernels-community/deformable-detr


@cache
def _find_community():
    """From LOCAL_KERNELS, else from the Hub, as ``kernels`` trusts it."""
    return get_kernel(COMMUNITY, version=1)


def _load_community(workload: Workload) -> Operator:
    _equal_points(workload)
    kernel = _find_community()
    return Operator(
        lambda *arguments: kernel.ms_deform_attn_forward(*arguments, IM2COL_STEP),
        lambda *arguments: kernel.ms_deform_attn_backward(*arguments, IM2COL_STEP),
        differentiable=False,
    )


# --------------------------------------------------------------------------------------------- mmcv


@cache
def _find_mmcv():
    return import_module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction


def _load_mmcv(workload: Workload) -> Operator:
    _equal_points(workload)
    function = _find_mmcv()
    return Operator(
        lambda *arguments: function.apply(*arguments, IM2COL_STEP), arrange=_without_bfloat16
    )


# -------------------------------------------------------------------------------------------- DCNv4


@cache
def _find_dcnv4():
    return import_module("DCNv4.functions").FlashDeformAttnFunction


def _load_dcnv4(workload: Workload) -> Operator:
    """Locations and logits come in one tensor, and the softmax is part of the call."""
    points = _equal_points(workload)
    if points not in (4, 8) or len(workload.shapes) > 5:
        # It is compiled for no others, and does not say so.
        raise Unsupported(
            f"points is {points} in {len(workload.shapes)} levels, expected 4 or 8 in at most 5"
        )
    function = _find_dcnv4()
    return Operator(
        forward=lambda *arguments: function.apply(*arguments, IM2COL_STEP, points),
        arrange=_with_logits,
        gradients=partial(_without_logits, levels=len(workload.shapes), points=points),
        takes_logits=True,
        meaning=_of_logits,
    )


def _with_logits(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """value, both of the metadata, and (batch, queries, heads, 3 * levels * points): x and y of
    each point, then the logit of each."""
    value, shapes, starts, locations, weights = inputs
    if value.element_size() != 2:
        raise Unsupported(f"value is {value.dtype}, expected a half type")
    # Any constant may be added to them; around zero they lose least to rounding.
    logits = weights.double().flatten(3).log()
    logits = logits - logits.mean(-1, keepdim=True)
    return value, shapes, starts, torch.cat((locations.flatten(3), logits), -1).to(value.dtype)


def _of_logits(inputs: Inputs) -> Inputs:
    """With the weights, in float64, that the rounded logits stand for. Where the locations lose
    bits to the dtype of value, that is the peer's own doing."""
    weights = inputs.attention_weights
    logits = _with_logits(inputs)[3][..., -weights[0, 0, 0].numel() :]
    return inputs._replace(attention_weights=logits.double().softmax(-1).view_as(weights))


def _without_logits(
    gradients: tuple[torch.Tensor, torch.Tensor], levels: int, points: int
) -> Gradients:
    grad_value, grad_both = gradients
    samples = levels * points
    grad_locations, grad_logits = grad_both.split((2 * samples, samples), -1)
    return (
        grad_value,
        grad_locations.unflatten(-1, (levels, points, 2)),
        grad_logits.unflatten(-1, (levels, points)),
    )


# -------------------------------------------------------------------------------------- msda_triton


@cache
def _find_triton():
    # Not the package's own entry: that falls back to grid_sample without a word.
    return import_module("msda_triton.frontend").triton_multiscale_deformable_attention


def _load_triton(workload: Workload) -> Operator:
    _equal_points(workload)
    function = _find_triton()

    def forward(value, spatial_shapes, level_start_index, locations, weights):
        return function(value, spatial_shapes, locations, weights, "zeros", False).flatten(2)

    return Operator(forward, arrange=_without_bfloat16)


# ---------------------------------------------------------------------------------------------- all

PEERS = {
    "kernels_community": Implementation(
        {"family": "hf-kernels", "backend": "native"}, _load_community, _find_community
    ),
    "mmcv": Implementation({"family": "mmcv", "backend": "native"}, _load_mmcv, _find_mmcv),
    "dcnv4_flash": Implementation(
        {"family": "dcnv4", "backend": "native"}, _load_dcnv4, _find_dcnv4
    ),
    "msda_triton": Implementation(
        {"family": "msda-triton", "backend": "triton"}, _load_triton, _find_triton
    ),
}
