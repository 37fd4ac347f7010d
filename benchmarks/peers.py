"""Other kernels for the same operator: whichever of them this environment has.

None is installed by requirements.txt. A peer is timed from its Python entry on, with its arguments
in the form it wants; what it does not offer is recorded as unsupported.
"""

from collections.abc import Callable
from functools import cache, partial
from pkgutil import resolve_name

import torch
from kernels import get_kernel

from .benchmark import Inputs, Workload
from .operators import Implementation, Operator, Unsupported, plain_reference

IM2COL_STEP = 64  # what the models pass
COMMUNITY = "kernels-community/deformable-detr"


def _peer(family: str, backend: str, find: str | Callable, load: Callable) -> Implementation:
    """``load`` makes what is found, or has the name "module:attribute", into an operator."""
    find = cache(partial(resolve_name, find) if isinstance(find, str) else find)

    def load_equal_points(workload: Workload) -> Operator:
        if not isinstance(workload.points, int):
            raise Unsupported(f"points is {workload.points}, expected one number for all levels")
        return load(find(), workload)

    return Implementation({"family": family, "backend": backend}, load_equal_points, find)


def _in_dtypes(*dtypes: torch.dtype) -> Callable[[Inputs], tuple[torch.Tensor, ...]]:
    """An ``Operator.arrange`` that refuses a value of any other."""

    def arrange(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        if inputs.value.dtype not in dtypes:
            raise Unsupported(f"value is {inputs.value.dtype}, expected one of {dtypes}")
        return tuple(inputs)

    return arrange


_WITHOUT_BFLOAT16 = _in_dtypes(torch.float16, torch.float32, torch.float64)
_WITHOUT_FLOAT64 = _in_dtypes(torch.float16, torch.bfloat16, torch.float32)


def _load_community(kernel, workload: Workload) -> Operator:
    return Operator(
        lambda *arguments: kernel.ms_deform_attn_forward(*arguments, IM2COL_STEP),
        lambda *arguments: kernel.ms_deform_attn_backward(*arguments, IM2COL_STEP),
    )


def _load_msda_triton(function, workload: Workload) -> Operator:
    def forward(value, spatial_shapes, level_start_index, locations, weights):
        return function(value, spatial_shapes, locations, weights, "zeros", False).flatten(2)

    return Operator(forward, arrange=_WITHOUT_BFLOAT16)


def _load_deformops(registry, workload: Workload, fp32_sums: bool) -> Operator:
    """Its Triton kernels: which sums the gradient of value is in, is told to it."""
    options = {"backend": registry.Backend.TRITON, "fp32acc": fp32_sums}
    return Operator(partial(registry.msda, **options), arrange=_WITHOUT_FLOAT64)


def _load_libreyolo(function, workload: Workload) -> Operator:
    def forward(value, spatial_shapes, level_start_index, locations, weights):
        output = function(value, spatial_shapes, locations, weights)
        if output is None:  # where its caller would go another way
            raise Unsupported("forward on a GPU only, up to 128 channels")
        return output

    return Operator(forward, arrange=_WITHOUT_FLOAT64)


def _load_dcnv4(function, workload: Workload) -> Operator:
    """Locations and logits come in one tensor, and the softmax is part of the call: of (batch,
    queries, heads, 3 * levels * points), x and y of each point, then the logit of each."""
    points, levels = workload.points, len(workload.shapes)
    if points not in (4, 8) or levels > 5:
        # It is compiled for no others, and does not say so.
        raise Unsupported(f"points is {points} in {levels} levels, expected 4 or 8 in at most 5")
    plain, samples = plain_reference(workload), levels * points

    def arrange(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        value, shapes, starts, locations, weights = inputs
        if value.element_size() != 2:
            raise Unsupported(f"value is {value.dtype}, expected a half type")
        # Any constant may be added to them; around zero they lose least to rounding.
        logits = weights.double().flatten(3).log()
        logits = logits - logits.mean(-1, keepdim=True)
        return value, shapes, starts, torch.cat((locations.flatten(3), logits), -1).to(value.dtype)

    def reference(value, shapes, starts, both):
        locations, logits = both.split((2 * samples, samples), -1)
        locations = locations.unflatten(-1, (levels, points, 2))
        return plain(
            value, shapes, starts, locations, logits.softmax(-1).view(locations.shape[:-1])
        )

    return Operator(
        forward=lambda *arguments: function.apply(*arguments, IM2COL_STEP, points),
        arrange=arrange,
        reference=reference,
        gradients=lambda grads: (grads[0], *grads[1].split((2 * samples, samples), -1)),
        names=("grad_value", "grad_sampling_locations", "grad_attention_logits"),
    )


_DEFORMOPS = partial(_peer, "deformops", "triton", "deformops.registry")
# Not the package's own entry: that falls back to grid_sample without a word.
_MSDA_TRITON = "msda_triton.frontend:triton_multiscale_deformable_attention"
_LIBREYOLO = "libreyolo.kernels.attention.ms_deform_attn_triton:triton_ms_deform_attn"
PEERS = {
    # From LOCAL_KERNELS, else from the Hub, as ``kernels`` trusts it.
    "kernels_community": _peer(
        "hf-kernels", "native", lambda: get_kernel(COMMUNITY, version=1), _load_community
    ),
    "dcnv4_flash": _peer("dcnv4", "native", "DCNv4.functions:FlashDeformAttnFunction", _load_dcnv4),
    "torch_ms_deform_attn": _peer(
        *("torch-ms-deform-attn", "native", "torch_ms_deform_attn:ms_deform_attn"),
        lambda function, workload: Operator(function),
    ),
    "msda_triton": _peer("msda-triton", "triton", _MSDA_TRITON, _load_msda_triton),
    "deformops": _DEFORMOPS(partial(_load_deformops, fp32_sums=False)),
    "deformops_fp32_sums": _DEFORMOPS(partial(_load_deformops, fp32_sums=True)),
    "libreyolo_triton": _peer("libreyolo", "triton", _LIBREYOLO, _load_libreyolo),
}
