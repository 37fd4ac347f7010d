"""Autocast, vmap, second derivatives and checkpointing."""

from dataclasses import replace

import pytest
import torch
from cases import HALF_DTYPES, OPERATORS, SMALL, Case, relative_error

# ------------------------------------------------------------------------------- second derivatives

SECOND = Case("second", ((3, 4), (2, 2)), batch=1, queries=2, heads=1, channels=2, points=2)


@pytest.mark.parametrize(
    "options", [{}, {"points_per_level": (2, 1)}, {"method": "nearest"}], ids=str
)
def test_gradgradcheck(kernel, device, operator, options):
    inputs = OPERATORS[operator](replace(SECOND, **options), torch.float64, device).require_grad()

    def function(*tensors):
        replaced = iter(tensors)
        args = [next(replaced) if tensor.requires_grad else tensor for tensor in inputs.args]
        return getattr(kernel, operator)(*args, **inputs.options)

    # On a GPU sums come in any order: gradients repeat to rounding only.
    tolerance = 1e-10 if device == "cuda" else 0.0
    assert torch.autograd.gradgradcheck(function, inputs.differentiable(), nondet_tol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
def test_second_derivatives_have_the_dtype_of_their_input(kernel, device, operator, dtype):
    inputs = OPERATORS[operator](SECOND, dtype, device).require_grad()
    output = getattr(kernel, operator)(*inputs.args)
    grads = torch.autograd.grad(output.float().square().sum(), inputs.differentiable(),
                                create_graph=True)  # fmt: skip
    sum(grad.float().square().sum() for grad in grads).backward()
    for tensor in inputs.differentiable():
        assert tensor.grad.dtype == dtype and tensor.grad.isfinite().all() and tensor.grad.any()


def test_gradient_penalty_equals_the_reference(kernel, device, operator):
    """A gradient of a gradient, without one by the reference points."""
    results = []
    for module in (kernel, kernel.reference):
        inputs = OPERATORS[operator](SECOND, torch.float64, device)
        inputs.value.requires_grad_()
        output = getattr(module, operator)(*inputs.args)
        (grad,) = torch.autograd.grad(output.square().sum(), inputs.value, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), inputs.value)[0])
    assert relative_error(*results) < 1e-12


# --------------------------------------------------------------------------------------------- vmap


def problems(operator, device, number=3, dtype=torch.float64):
    """Inputs of several problems, and each tensor stacked over them but the level metadata."""
    each = [OPERATORS[operator](SMALL, dtype, device, seed=seed) for seed in range(number)]
    stacked = [
        torch.stack(tensors) if tensors[0].is_floating_point() else tensors[0]
        for tensors in zip(*(inputs.args for inputs in each))
    ]
    in_dims = tuple(0 if tensor.is_floating_point() else None for tensor in each[0].args)
    return each, stacked, in_dims


def test_vmap_over_problems(kernel, device, operator):
    function = getattr(kernel, operator)
    each, stacked, in_dims = problems(operator, device)
    outputs = torch.func.vmap(function, in_dims)(*stacked)
    for output, inputs in zip(outputs, each):
        assert relative_error(output, function(*inputs.args)) < 1e-12


def test_vmap_with_a_shared_value_and_another_dimension(kernel, device, operator):
    function = getattr(kernel, operator)
    each, stacked, in_dims = problems(operator, device)
    value = each[0].value
    stacked[-1] = stacked[-1].movedim(0, 2)
    outputs = torch.func.vmap(function, (None, *in_dims[1:-1], 2), out_dims=1)(value, *stacked[1:])
    for i, inputs in enumerate(each):
        assert relative_error(outputs[:, i], function(value, *inputs.args[1:])) < 1e-12


def test_gradients_of_vmap(kernel, device, operator):
    function = getattr(kernel, operator)
    each, stacked, in_dims = problems(operator, device)
    expected = []
    for inputs in each:
        output = function(*inputs.require_grad().args)
        expected.append(torch.autograd.grad(output.square().sum(), inputs.differentiable()))
    floating = [tensor.requires_grad_() for tensor in stacked if tensor.is_floating_point()]
    output = torch.func.vmap(function, in_dims)(*stacked)
    grads = torch.autograd.grad(output.square().sum(), floating)
    for grad, wanted in zip(grads, zip(*expected)):
        assert relative_error(grad, torch.stack(wanted)) < 1e-12


def test_vmap_over_level_metadata_is_refused(kernel, device, operator):
    _, stacked, in_dims = problems(operator, device)
    stacked[1] = stacked[1].expand(3, -1, -1)
    with pytest.raises(RuntimeError, match="spatial_shapes is vmapped"):
        torch.func.vmap(getattr(kernel, operator), (0, 0, *in_dims[2:]))(*stacked)


# ------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(kernel, device, operator, use_reentrant):
    function = getattr(kernel, operator)
    inputs = OPERATORS[operator](SMALL, torch.float64, device).require_grad()
    expected = torch.autograd.grad(function(*inputs.args).square().sum(), inputs.differentiable())
    torch.utils.checkpoint.checkpoint(
        function, *inputs.args, use_reentrant=use_reentrant
    ).square().sum().backward()
    for tensor, wanted in zip(inputs.differentiable(), expected):
        assert relative_error(tensor.grad, wanted) < 1e-12


# ----------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("rest", [torch.float32, "autocast"], ids=str)
def test_autocast_casts_value_and_nothing_else(kernel, device, operator, dtype, rest):
    inputs = OPERATORS[operator](SMALL, torch.float32, device)
    if rest == "autocast":
        for name, tensor in vars(inputs).items():
            if name not in ("value", "options", "grad_output") and tensor.is_floating_point():
                setattr(inputs, name, tensor.to(dtype))
    inputs.require_grad()
    function = getattr(kernel, operator)
    with torch.autocast(device, dtype):
        output = function(*inputs.args)
    assert output.dtype == dtype
    value, *others = inputs.args
    assert torch.equal(output, function(value.to(dtype), *others))
    output.float().sum().backward()
    assert all(tensor.grad.dtype == tensor.dtype for tensor in inputs.differentiable())


def test_autocast_leaves_float64_alone(kernel, device, operator):
    inputs = OPERATORS[operator](SMALL, torch.float64, device)
    with torch.autocast(device, torch.bfloat16):
        assert getattr(kernel, operator)(*inputs.args).dtype == torch.float64


def test_autocast_switched_off(kernel, device, operator):
    inputs = OPERATORS[operator](SMALL, torch.float32, device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert getattr(kernel, operator)(*inputs.args).dtype == torch.float32
