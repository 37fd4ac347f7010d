"""The ops of torch-universal, in Python, under the schemas of the native ones.

``MSDA_TRITON`` chooses between the two implementations: "1" takes the Triton kernels on every GPU
that Triton compiles for, "0" on none. Without it they are taken on AMD's and Intel's GPUs, as
NVIDIA's have a native variant. float64, and gradients in PyTorch's deterministic mode, take
PyTorch's operators everywhere; so does whatever has no Triton.
"""

import importlib.util
import os

import torch

from .._ops import add_op_namespace_prefix, ops, schemas
from . import pytorch
from .checks import Inputs, check

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _implementation(inputs: Inputs):
    """The module that computes this call."""
    wanted = os.environ.get("MSDA_TRITON")
    device = inputs.value.device.type
    if device == "cpu":  # in Triton's interpreter, for tests
        wants = wanted == "1" and os.environ.get("TRITON_INTERPRET") == "1"
    else:
        wants = device in ("cuda", "xpu") and wanted != "0"
        wants = wants and (wanted == "1" or device == "xpu" or torch.version.hip is not None)
    if not (wants and _HAS_TRITON) or inputs.acc_dtype == torch.float64 or inputs.is_empty:
        return pytorch
    from . import triton_kernels

    return triton_kernels if triton_kernels.runs(inputs) else pytorch


def _compute(inputs: Inputs) -> torch.Tensor:
    return _implementation(inputs).forward(inputs)


def _gradients(inputs: Inputs, deterministic: bool, *asked: bool) -> tuple:
    """asked: whether the gradients of value, of points and of reference points are."""
    implementation = pytorch if deterministic else _implementation(inputs)
    value, reference, coordinates, weights = implementation.backward(inputs, *asked)
    nothing = inputs.value.new_empty(0)
    of_value, of_points, of_reference = asked
    return (
        value if of_value else nothing,
        reference if of_reference else nothing,
        coordinates if of_points else nothing,
        weights if of_points else nothing,
    )


# ---------------------------------------------------------------------------------------- the ops
# As in the schemas. What a caller leaves out, or gives as the default, does not arrive here.


def ms_deform_attn_forward(
    value, shapes, starts, locations, weights, points_per_level=None, nearest=False
):
    return _compute(check(value, shapes, starts, locations, weights, points_per_level, nearest))


def ms_deform_attn_backward(
    value, shapes, starts, locations, weights, grad_output, points_per_level=None, nearest=False,
    deterministic=False, for_value=True, for_points=True,
):  # fmt: skip
    arguments = (value, shapes, starts, locations, weights, points_per_level, nearest)
    inputs = check(*arguments, grad_outputs=(grad_output,))
    of_value, _, *of_points = _gradients(inputs, deterministic, for_value, for_points, False)
    if for_points:
        of_points = of_points[0].view_as(locations), of_points[1].view_as(weights)
    return (of_value, *of_points)


def fused_ms_deform_attn_forward(
    value, shapes, starts, reference, offsets, logits, points_per_level, nearest, offset_scale
):
    arguments = (value, shapes, starts, offsets, logits, points_per_level, nearest)
    return _compute(check(*arguments, fused=(reference, offset_scale)))


def fused_ms_deform_attn_backward(
    value, shapes, starts, reference, offsets, logits, grad_output, points_per_level, nearest,
    offset_scale, for_reference, deterministic=False, for_value=True, for_points=True,
):  # fmt: skip
    arguments = (value, shapes, starts, offsets, logits, points_per_level, nearest)
    inputs = check(*arguments, fused=(reference, offset_scale), grad_outputs=(grad_output,))
    *others, of_offsets, of_logits = _gradients(
        inputs, deterministic, for_value, for_points, for_reference
    )
    if for_points:
        of_offsets, of_logits = of_offsets.view_as(offsets), of_logits.view_as(logits)
    return (*others, of_offsets, of_logits)


def _define():
    library = torch.library.Library(ops.name, "DEF")
    for schema in schemas:
        name = schema.split("(")[0]
        torch.library.define(add_op_namespace_prefix(name), schema[len(name) :], lib=library)
        library.impl(add_op_namespace_prefix(name), globals()[name], "CompositeExplicitAutograd")
    ops.definitions = library  # withdrawn when it is no longer referenced


_define()
