"""The ops of torch-universal, in Python, under the schemas of the native ones.

Three implementations compute them:

* ``triton_kernels`` on AMD's and Intel's GPUs, as NVIDIA's have a native variant. With
  ``MSDA_TRITON=1`` on every GPU that Triton compiles for, with 0 on none.
* ``grid_sample`` on other devices than a CPU. With ``MSDA_GRID_SAMPLE=1`` on a CPU too, with 0 on
  none.
* ``embedding_bag`` for the rest, which is a CPU, where it takes a third to three quarters of the
  time of grid_sample; gradients in PyTorch's deterministic mode, as it sums in a fixed order;
  nearest sampling; and sizes of levels that cannot be read, in the capture of a CUDA graph.

Triton's kernels have no float64.
"""

import contextlib
import importlib.util
import os
import threading
from typing import Any, Callable, Iterator, Optional, Sequence, Tuple

import torch

from .._ops import add_op_namespace_prefix, ops, schemas
from . import embedding_bag, grid_sample
from .checks import Inputs, check

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _plan(inputs: Inputs, deterministic: bool = False) -> tuple:
    """The module that computes this call, and the inputs with what it needs."""
    if inputs.is_empty or deterministic:
        return embedding_bag, inputs
    device = inputs.value.device.type
    wanted = os.environ.get("MSDA_TRITON")
    if device == "cpu":  # in Triton's interpreter, for tests
        wants = wanted == "1" and os.environ.get("TRITON_INTERPRET") == "1"
    else:
        wants = device in ("cuda", "xpu") and wanted != "0"
        wants = wants and (wanted == "1" or device == "xpu" or torch.version.hip is not None)
    if wants and _HAS_TRITON and inputs.acc_dtype != torch.float64:
        from . import triton_kernels

        if triton_kernels.runs(inputs):
            return triton_kernels, inputs
    if not inputs.nearest and os.environ.get("MSDA_GRID_SAMPLE", str(int(device != "cpu"))) == "1":
        levels = grid_sample.levels_of(inputs)
        if levels is not None:
            return grid_sample, inputs._replace(levels=levels)
    return embedding_bag, inputs


class _Kept(threading.local):
    """What grid_sample's forward leaves for its gradients, where one call records the other."""

    taken: Optional[list] = None
    given: Sequence[torch.Tensor] = ()


_kept = _Kept()


def keeping(op: Callable[..., Any], arguments: Sequence[Any]) -> Tuple[Any, Sequence[torch.Tensor]]:
    """The result of a forward op, and tensors that spare its backward op some of the work."""
    taken = _kept.taken = []
    try:
        return op(*arguments), taken
    finally:
        _kept.taken = None


@contextlib.contextmanager
def given(kept: Sequence[torch.Tensor]) -> Iterator[None]:
    """In it, backward ops are given these tensors."""
    before, _kept.given = _kept.given, kept
    try:
        yield
    finally:
        _kept.given = before


def _compute(inputs: Inputs) -> torch.Tensor:
    implementation, inputs = _plan(inputs)
    if implementation is grid_sample:
        return grid_sample.forward(inputs, _kept.taken)
    return implementation.forward(inputs)


def _gradients(inputs: Inputs, deterministic: bool, *asked: bool) -> tuple:
    """asked: whether the gradients of value, of points and of reference points are."""
    implementation, inputs = _plan(inputs, deterministic)
    if implementation is grid_sample:
        value, reference, coordinates, weights = grid_sample.backward(inputs, *asked, _kept.given)
    else:
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
