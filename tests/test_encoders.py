"""Encoders that a GPU serves through windows in shared memory (cuda/windows.cuh), and whose gradient
of value it sums by patches in half types (cuda/backward_patches.cu).
"""

from dataclasses import replace

import pytest
import torch
from cases import HALF_DTYPES, Case, assert_close, make_fused_inputs, make_inputs

SIZES = {"queries": 4352, "channels": 32, "locations": "encoder"}
CASES = [
    Case("one_level", ((64, 68),), **SIZES),
    Case("three_levels", ((16, 16), (32, 32), (48, 64)), **SIZES),
    Case("four_levels", ((40, 80), (24, 32), (16, 16), (8, 16)), **SIZES),
    Case("five_levels", ((40, 80), (24, 32), (16, 16), (8, 14), (4, 4)), **SIZES),
]


def make(case, dtype, device, fused, far=False):
    """An encoder's inputs; far: with points that windows would miss, which only the GPU finds out.

    A GPU gets as many points as it wants for windows, 65536 for each multiprocessor, and more rows
    than patches want.
    """
    assert case.pixels == case.queries
    case = replace(case, batch=24, heads=8) if device == "cuda" else replace(case, batch=1, heads=1)
    if fused:
        inputs = make_fused_inputs(case, dtype, device)
        inputs.sampling_offsets *= 10 if far else 1
        return inputs
    return make_inputs(replace(case, locations="uniform") if far else case, dtype, device)


def operator(functions, fused):
    return functions.fused_ms_deform_attn if fused else functions.ms_deform_attn


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(kernel, device, case, dtype, fused, far):
    inputs = make(case, dtype, device, fused, far)
    output = operator(kernel, fused)(*inputs.args)
    assert_close(output, operator(kernel.reference, fused)(*inputs.double().args), "output")
    assert torch.equal(operator(kernel, fused)(*inputs.args), output)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_that_are_not_finite(kernel, device, case, dtype, fused):
    """They reach the rows that sample them, and no others."""
    inputs = make(case, dtype, device, fused)
    value = inputs.value.view(-1)
    for i, bad in enumerate([torch.inf, -torch.inf, torch.nan]):
        value[1000 + i :: 50021] = bad
    output = operator(kernel, fused)(*inputs.args)
    expected = operator(kernel.reference, fused)(*inputs.double().args)
    assert not expected.isfinite().all()
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isposinf(), expected.isposinf())
    assert torch.equal(output.isneginf(), expected.isneginf())


def grads_of_value(functions, inputs, fused):
    inputs.value.requires_grad_()
    output = operator(functions, fused)(*inputs.args)
    return torch.autograd.grad(output, inputs.value, inputs.grad_output)[0]


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_of_value(kernel, device, case, dtype, fused, far):
    inputs = make(case, dtype, device, fused, far)
    if not fused:
        inputs.attention_weights[:, ::7, :, ::3] *= 900  # more than fp16 multiplies by
    grad = grads_of_value(kernel, inputs, fused)
    assert_close(grad, grads_of_value(kernel.reference, inputs.double(), fused), "grad_value")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_where_grad_output_is_not_finite(kernel, device, case, fused):
    """It reaches the pixels that were sampled, and no others."""
    inputs = make(case, torch.float16, device, fused)
    grad_output = inputs.grad_output.view(-1)
    for i, bad in enumerate([torch.inf, -torch.inf, torch.nan]):
        grad_output[1000 + i :: 50021] = bad
    grad = grads_of_value(kernel, inputs, fused)
    expected = grads_of_value(kernel.reference, inputs.double(), fused)
    for is_class in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(is_class(grad), is_class(expected)), is_class.__name__
    finite = expected.isfinite()
    assert finite.any() and not finite.all()
    assert_close(grad[finite], expected[finite], "grad_value")
