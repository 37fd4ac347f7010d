"""The fused operator against the float64 reference, and what only this operator has.

test_transforms.py, test_compile.py and test_determinism.py run both operators.
"""

import itertools

import pytest
import torch
from cases import (
    COARSE,
    DTYPES,
    MIXABLE,
    SMALL,
    SMALLEST,
    Case,
    make_fused_inputs,
    relative_error,
)
from test_contract import misaligned, strided, transposed
from test_operator import check_against_reference

SHAPES = ((20, 27), (10, 14), (5, 7))
CASES = [
    Case("pyramid", SHAPES, queries=40, heads=8, channels=32),
    Case("odd_channels", channels=30, heads=3),
    Case("wide", ((100, 167), (200, 334)), queries=100, heads=2, channels=8),
    Case("thin_maps", ((1, 1), (1, 9), (8, 1), (3, 3), (2, 1), (1, 2)), heads=3, points=3),
    Case("twelve_points", heads=16, points=12),
    Case("many_points", points=40, channels=8),
    Case("d_fine", SHAPES, queries=40, heads=8, channels=32, points_per_level=(3, 6, 3)),
    Case("levels_without_points", ((3, 4), (5, 7), (1, 2)), batch=1, points_per_level=(0, 2, 0)),
    Case("nearest", SHAPES, queries=40, heads=8, channels=32, method="nearest"),
    Case("nearest_d_fine", SHAPES, queries=40, channels=16, points_per_level=(3, 6, 3),
         method="nearest"),
    *SMALLEST,
]  # fmt: skip


@pytest.mark.parametrize("reference_levels", [None, 1], ids=["each_level", "one_for_all"])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(kernel, device, case, dtype, coordinates, reference_levels):
    inputs = make_fused_inputs(case, dtype, device, coordinates, reference_levels)
    check_against_reference(kernel, inputs)


@pytest.mark.parametrize(
    "dtype, offsets_dtype, coordinates",
    [
        (torch.float32, torch.float32, 4),
        (torch.float16, torch.float32, 2),
        (torch.bfloat16, torch.bfloat16, 4),
    ],
    ids=str,
)
def test_coarse_levels(kernel, device, dtype, offsets_dtype, coordinates):
    if device == "cpu":
        pytest.skip("a strategy of GPUs")
    inputs = make_fused_inputs(COARSE, dtype, device, coordinates, sampling_offsets=offsets_dtype)
    check_against_reference(kernel, inputs)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_on_a_pyramid(kernel, device, dtype, coordinates):
    case = Case("pyramid", ((9, 14), (5, 7), (3, 4)), queries=40, heads=8, channels=32)
    inputs = make_fused_inputs(case, dtype, device, coordinates, seed=1)
    inputs.options = {"offset_scale": 0.25}
    check_against_reference(kernel, inputs)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("operand_dtypes", list(itertools.product(MIXABLE, repeat=3)), ids=str)
@pytest.mark.parametrize("dtype", MIXABLE, ids=str)
def test_any_mixture_of_dtypes(kernel, device, dtype, operand_dtypes):
    names = ("reference_points", "sampling_offsets", "attention_logits")
    case = Case("mixed", channels=32)
    dtypes = dict(zip(names, operand_dtypes))
    check_against_reference(kernel, make_fused_inputs(case, dtype, device, 4, **dtypes))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("points_per_level", [None, (3, 1)])
def test_gradcheck(kernel, device, coordinates, points_per_level):
    case = Case("gradcheck", ((4, 5), (2, 3)), batch=2, queries=3, channels=3, points=2,
                points_per_level=points_per_level)  # fmt: skip
    inputs = make_fused_inputs(case, torch.float64, device, coordinates).require_grad()
    value, shapes, starts, *rest = inputs.args

    def operator(value, *rest):
        return kernel.fused_ms_deform_attn(value, shapes, starts, *rest, **inputs.options)

    assert torch.autograd.gradcheck(operator, (value, *rest))


def test_equals_softmax_and_locations_and_ms_deform_attn(kernel, device):
    """As transformers' DeformableDetrMultiscaleDeformableAttention writes them."""
    inputs = make_fused_inputs(SMALL, torch.float64, device)
    value, shapes, starts, reference, offsets, logits = inputs.args
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    sizes = torch.stack([shapes[:, 1], shapes[:, 0]], -1)
    locations = reference[:, :, None, :, None, :] + offsets / sizes[None, None, None, :, None, :]
    expected = kernel.ms_deform_attn(value, shapes, starts, locations, weights)
    assert relative_error(kernel.fused_ms_deform_attn(*inputs.args), expected) < 1e-12

    boxes = torch.cat([reference, reference.flip(-1)], -1)
    locations = (
        boxes[:, :, None, :, None, :2]
        + offsets / SMALL.points * boxes[:, :, None, :, None, 2:] * 0.5
    )
    expected = kernel.ms_deform_attn(value, shapes, starts, locations, weights)
    output = kernel.fused_ms_deform_attn(value, shapes, starts, boxes, offsets, logits)
    assert relative_error(output, expected) < 1e-12


@pytest.mark.parametrize("index", range(4))
def test_one_input_at_a_time_may_require_grad(kernel, device, index):
    inputs = make_fused_inputs(SMALL, torch.float32, device, 4).require_grad()
    output = kernel.fused_ms_deform_attn(*inputs.args)
    expected = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    inputs = make_fused_inputs(SMALL, torch.float32, device, 4)
    inputs.differentiable()[index].requires_grad_()
    kernel.fused_ms_deform_attn(*inputs.args).backward(inputs.grad_output)
    for i, tensor in enumerate(inputs.differentiable()):
        if i == index:
            assert relative_error(tensor.grad, expected[i].double()) < 1e-6
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("layout", [strided, transposed, misaligned])
def test_any_layout(kernel, device, layout):
    inputs = make_fused_inputs(Case("layout", channels=32), torch.float16, device, 4)
    expected = kernel.fused_ms_deform_attn(*inputs.args)
    args = [layout(tensor) if tensor.dim() > 1 else tensor for tensor in inputs.args]
    assert torch.equal(kernel.fused_ms_deform_attn(*args), expected)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"channels": 0}])
def test_nothing_to_do(kernel, device, sizes):
    inputs = make_fused_inputs(Case("empty", **sizes), torch.float32, device).require_grad()
    output = kernel.fused_ms_deform_attn(*inputs.args)
    assert output.abs().sum() == 0
    output.sum().backward()
    for tensor in inputs.differentiable():
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_points_nowhere_contribute_nothing(kernel, device, bad, coordinates):
    """Their softmax weight is lost, and no gradient is NaN."""
    case = Case("nowhere", batch=1, channels=32, points=2)
    inputs = make_fused_inputs(case, torch.float32, device, coordinates).require_grad()
    with torch.no_grad():
        inputs.sampling_offsets[:, ::3, :, :, 1, 0] = bad
        inputs.reference_points[:, 1::3, 0, 1] = bad
    output = kernel.fused_ms_deform_attn(*inputs.args)
    expected = kernel.reference.fused_ms_deform_attn(*inputs.double().args)
    assert relative_error(output.detach(), expected) < 1e-5
    output.backward(inputs.grad_output)
    assert all(tensor.grad.isfinite().all() for tensor in inputs.differentiable())
    assert not inputs.sampling_offsets.grad[:, ::3, :, :, 1].any()
    assert not inputs.reference_points.grad[:, 1::3, 0].any()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_softmax_of_large_logits(kernel, device, shift):
    inputs = make_fused_inputs(SMALL, torch.float32, device)
    inputs.attention_logits = (inputs.attention_logits * 8).round() + shift
    inputs.attention_logits[:, :, :, 0, 0] = -float("inf")
    inputs.require_grad()
    reference = inputs.double().require_grad()
    output = kernel.fused_ms_deform_attn(*inputs.args)
    expected = kernel.reference.fused_ms_deform_attn(*reference.args)
    assert relative_error(output.detach(), expected.detach()) < 2e-6
    grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    expected = torch.autograd.grad(expected, reference.differentiable(), reference.grad_output)
    for grad, wanted in zip(grads, expected):
        assert relative_error(grad, wanted) < 2e-6
