"""Encoders that a GPU serves through windows in shared memory (cuda/windows.cuh): the forward, and
in half types the gradients of the points. Their gradient of value it sums by patches in half types
(cuda/backward_patches.cu).
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
FEW = 6  # batches


def make(case, dtype, device, fused, far=False, batch=24):
    """An encoder's inputs; far: with points that windows would miss, which only the GPU finds out.

    A GPU gets as many points as it wants for windows: for each multiprocessor 65536, or in the
    backward 16384, whose reference would not fit into memory with more than FEW. And more rows than
    patches want.
    """
    assert case.pixels == case.queries
    batch, heads = (batch, 8) if device == "cuda" else (1, 1)
    case = replace(case, batch=batch, heads=heads)
    if fused:
        inputs = make_fused_inputs(case, dtype, device)
        inputs.sampling_offsets *= 10 if far else 1
        return inputs
    return make_inputs(replace(case, locations="uniform") if far else case, dtype, device)


def operator(functions, fused):
    return functions.fused_ms_deform_attn if fused else functions.ms_deform_attn


def spoil(tensor):
    """Puts infinities and NaN into it."""
    elements = tensor.view(-1)
    for i, bad in enumerate([torch.inf, -torch.inf, torch.nan]):
        elements[1000 + i :: 50021] = bad


def assert_same_classes(actual, expected, name):
    for is_class in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(is_class(actual), is_class(expected)), f"{name}: {is_class.__name__}"


def gradients(functions, inputs, fused):
    """Of the operator, by the names of the inputs."""
    output = operator(functions, fused)(*inputs.require_grad().args)
    grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    return dict(zip(inputs.gradient_names(), grads))


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(kernel, device, case, dtype, fused, far):
    inputs = make(case, dtype, device, fused, far)
    output = operator(kernel, fused)(*inputs.args)
    assert_close(output, operator(kernel.reference, fused)(*inputs.double().args), "output")
    assert torch.equal(operator(kernel, fused)(*inputs.args), output)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_match_reference(kernel, device, case, dtype, fused, far):
    inputs = make(case, dtype, device, fused, far, batch=FEW)
    expected = gradients(kernel.reference, inputs.double(), fused)
    for name, grad in gradients(kernel, inputs, fused).items():
        assert_close(grad, expected[name], name)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_of_value_with_large_weights(kernel, device, case, far):
    """Larger than patches multiply in fp16. The gradients of locations would not fit into it."""
    inputs = make(case, torch.float16, device, False, far, batch=FEW)
    inputs.attention_weights[:, ::7, :, ::3] *= 900
    expected = gradients(kernel.reference, inputs.double(), False)["grad_value"]
    assert_close(gradients(kernel, inputs, False)["grad_value"], expected, "grad_value")


@pytest.mark.parametrize("bad", ["value", "grad_output"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_that_are_not_finite(kernel, device, case, fused, bad):
    """As in float64, where value or grad_output is not finite."""
    inputs = make(case, torch.float16, device, fused, batch=FEW)
    spoil(getattr(inputs, bad))
    expected = gradients(kernel.reference, inputs.double(), fused)
    for name, grad in gradients(kernel, inputs, fused).items():
        assert_same_classes(grad, expected[name], name)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_that_are_not_finite(kernel, device, case, dtype, fused):
    """They reach the rows that sample them, and no others."""
    inputs = make(case, dtype, device, fused)
    spoil(inputs.value)
    output = operator(kernel, fused)(*inputs.args)
    expected = operator(kernel.reference, fused)(*inputs.double().args)
    assert not expected.isfinite().all()
    assert_same_classes(output, expected, "output")
