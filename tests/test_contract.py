"""What callers may pass, and what they are told when they pass something else."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from cases import (
    COARSE,
    DTYPES,
    OPERATORS,
    SMALL,
    TOLERANCES,
    Case,
    assert_close,
    level_tensors,
    make_inputs,
    relative_error,
)
from test_operator import check_against_reference


def reference_of(kernel, inputs):
    return kernel.reference.ms_deform_attn(*inputs.double().args)


# ------------------------------------------------------------------------------------ accepted


@pytest.mark.kernels_ci
def test_names_and_arguments_of_the_original_extension(kernel, device):
    inputs = make_inputs(Case("five", batch=5), torch.float32, device)
    value, spatial_shapes, level_start_index, locations, weights = inputs.args
    expected = reference_of(kernel, inputs)
    for im2col_step in (0, 1, 7, 64):
        output = kernel.ms_deform_attn_forward(
            value=value,
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            sampling_loc=locations,
            attn_weight=weights,
            im2col_step=im2col_step,
        )
        assert_close(output, expected, "output")


def test_int32_level_metadata(kernel, device):
    inputs = make_inputs(SMALL, torch.float32, device)
    expected = reference_of(kernel, inputs)
    for shapes_dtype in (torch.int32, torch.int64):
        inputs.spatial_shapes = inputs.spatial_shapes.to(shapes_dtype)
        inputs.level_start_index = inputs.level_start_index.int()
        assert_close(kernel.ms_deform_attn(*inputs.args), expected, "output")


def strided(tensor):
    """The same values, every other element of a larger tensor."""
    larger = torch.stack([tensor, torch.full_like(tensor, 7)], -1)
    return larger[..., 0]


def transposed(tensor):
    """The same values, stored with the last two dimensions swapped."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def misaligned(tensor):
    """The same values, one element past an aligned address."""
    padded = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    padded[1:] = tensor.flatten()
    return padded[1:].view(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [strided, transposed, misaligned])
def test_any_layout(kernel, device, layout, dtype):
    inputs = make_inputs(Case("layout", channels=32), dtype, device)
    expected = kernel.ms_deform_attn(*inputs.args)
    expected_grads = kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)
    for name in ("value", "sampling_locations", "attention_weights", "grad_output",
                 "spatial_shapes"):  # fmt: skip
        setattr(inputs, name, layout(getattr(inputs, name)))
    inputs.level_start_index = strided(inputs.level_start_index)
    assert torch.equal(kernel.ms_deform_attn(*inputs.args), expected)
    grads = kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)
    for grad, expected_grad in zip(grads, expected_grads):
        assert relative_error(grad, expected_grad.double()) < 1e-3


def test_expanded_gradient(kernel, device):
    inputs = make_inputs(SMALL, torch.float32, device).require_grad()
    kernel.ms_deform_attn(*inputs.args).sum().backward()
    reference = inputs.double().require_grad()
    kernel.reference.ms_deform_attn(*reference.args).sum().backward()
    for tensor, expected in zip(inputs.differentiable(), reference.differentiable()):
        assert_close(tensor.grad, expected.grad, "gradient")


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"channels": 0}])
def test_nothing_to_do(kernel, device, sizes):
    case = Case("empty", **sizes)
    inputs = make_inputs(case, torch.float32, device).require_grad()
    output = kernel.ms_deform_attn(*inputs.args)
    assert output.shape == (case.batch, case.queries, case.heads * case.channels)
    assert output.abs().sum() == 0
    grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    for tensor, grad in zip(inputs.differentiable(), grads):
        assert grad.shape == tensor.shape
        assert grad.abs().sum() == 0


@pytest.mark.kernels_ci
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_points_nowhere_contribute_nothing(kernel, device, dtype, bad):
    case = Case("nowhere", batch=1, channels=32, points=2)
    inputs = make_inputs(case, dtype, device)
    inputs.sampling_locations[:, ::3, :, :, 1, 0] = bad
    inputs.sampling_locations[:, 1::3, :, 0, :, 1] = bad
    without = make_inputs(case, dtype, device)
    without.attention_weights[:, ::3, :, :, 1] = 0
    without.attention_weights[:, 1::3, :, 0] = 0
    output = kernel.ms_deform_attn(*inputs.args)
    assert relative_error(output, kernel.ms_deform_attn(*without.args).double()) < 1e-6
    grad_value, grad_locations, grad_weights = kernel.ms_deform_attn_backward(
        *inputs.args, inputs.grad_output, 64
    )
    expected = kernel.ms_deform_attn_backward(*without.args, without.grad_output, 64)
    assert relative_error(grad_value, expected[0].double()) < 1e-3
    assert grad_locations.isfinite().all() and grad_weights.isfinite().all()
    assert (grad_locations[:, ::3, :, :, 1] == 0).all()
    assert (grad_weights[:, ::3, :, :, 1] == 0).all()
    assert (grad_locations[:, 1::3, :, 0] == 0).all()
    assert (grad_weights[:, 1::3, :, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pixels_that_are_not_sampled_do_not_matter(kernel, device, dtype):
    """NaN in a pixel no point touches stays there, also beside points outside the map."""
    case = Case("poison", ((6, 8),), channels=32, queries=20)
    inputs = make_inputs(case, dtype, device)
    # All points in the right half or beyond the border; the left column is poisoned.
    inputs.sampling_locations[..., 0] = inputs.sampling_locations[..., 0].abs() * 0.7 + 0.5
    clean = kernel.ms_deform_attn(*inputs.args)
    inputs.value.view(case.batch, 6, 8, case.heads, case.channels)[:, :, 0] = float("nan")
    assert torch.equal(kernel.ms_deform_attn(*inputs.args), clean)
    for grad in kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64):
        assert grad.isfinite().all()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("channels", [30, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pixel_influences_the_samples_that_have_it_as_a_corner(
    kernel, device, operator, dtype, channels
):
    """An infinite or NaN pixel makes of each output what it makes in float64, and no more."""
    case = Case("not_finite", ((6, 4), (3, 2)), batch=1, queries=400, channels=channels)
    inputs = OPERATORS[operator](case, dtype, device)
    for pixel, head, bad in ((5, 0, "inf"), (11, 1, "-inf"), (26, 1, "nan")):
        inputs.value[0, pixel, head, pixel % channels] = float(bad)
    output = getattr(kernel, operator)(*inputs.args)
    double = inputs.double()
    expected = getattr(kernel.reference, operator)(*double.args)
    assert expected.isnan().any() and expected.isinf().any() and expected.isfinite().any()
    for is_class in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(is_class(output), is_class(expected)), is_class.__name__
    finite = expected.isfinite()
    assert_close(output[finite], expected[finite], "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_that_nobody_asked_for(kernel, device, operator, dtype):
    """Are not computed, and the others are as they would be with them."""
    inputs = OPERATORS[operator](Case("some", ((9, 14), (5, 7)), channels=30), dtype, device)
    backward = kernel.operations.OPERATIONS[
        kernel.native.add_op_namespace_prefix(f"{operator}_backward")
    ]
    names = [f.name for f in fields(inputs) if f"grad_{f.name}" in inputs.gradient_names()]

    def gradients_of(wanted):
        some = {name: getattr(inputs, name).detach().requires_grad_() for name in wanted}
        output = getattr(kernel, operator)(*replace(inputs, **some).args)
        grads = torch.autograd.grad(output, list(some.values()), inputs.grad_output)
        return dict(zip(wanted, grads))

    everything = gradients_of(names)
    for flags in itertools.product((False, True), repeat=len(names)):
        wanted = [name for name, flag in zip(names, flags) if flag]
        if not wanted:
            continue
        for name, grad in gradients_of(wanted).items():
            if device == "cpu":
                assert torch.equal(grad, everything[name]), name
            else:
                assert_close(grad, everything[name].double(), name)
        needs = [name in wanted for name in backward.forward.tensors]
        options = (*backward.forward.defaults, *backward.request(needs, False))
        results = backward.op(*inputs.args, inputs.grad_output, *options)
        for name, result, asked in zip(names, results, backward.requested(options)):
            assert result.shape == (getattr(inputs, name).shape if asked else (0,)), name


@pytest.mark.parametrize(
    "case",
    [Case("not_finite", ((6, 4), (3, 2)), batch=1, queries=60, channels=32), COARSE],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_gradients_where_grad_output_is_not_finite(kernel, device, operator, method, case):
    """Each is NaN or infinite where it is in float64, and nowhere else."""
    if case is COARSE and device == "cpu":
        pytest.skip("a strategy of GPUs")
    case = replace(case, method=method)
    inputs = OPERATORS[operator](case, torch.float32, device)
    for query, channel, bad in ((0, 0, "inf"), (1, 33, "-inf"), (2, 5, "nan")):
        inputs.grad_output[0, query, channel] = float(bad)
    double = inputs.double()
    grads, expected = [
        torch.autograd.grad(
            getattr(functions, operator)(*problem.args, **problem.options),
            problem.differentiable(),
            problem.grad_output,
            materialize_grads=True,
        )
        for functions, problem in (
            (kernel, inputs.require_grad()),
            (kernel.reference, double.require_grad()),
        )
    ]
    for name, grad, wanted in zip(inputs.gradient_names(), grads, expected):
        for is_class in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(is_class(grad), is_class(wanted)), f"{name}: {is_class.__name__}"
        finite = wanted.isfinite()
        if wanted[finite].any():
            assert_close(grad[finite], wanted[finite], name)
        else:  # of locations, with nearest sampling
            assert method == "nearest" and not grad[finite].any(), name


# In the larger batch, gather is what sums a half type's gradients; of many queries, merge_kernel.
@pytest.mark.parametrize("batch, queries", [(4, 60), (2, 2100)])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_that_overlap(kernel, device, operator, dtype, deterministic, batch, queries):
    """Refused where that can be seen; on a GPU each level is sampled, and gradients add up."""
    shapes = ((30, 40), (30, 40), (15, 20), (40, 8))
    case = Case("overlap", shapes, batch=batch, queries=queries, heads=8, channels=32)
    inputs = OPERATORS[operator](case, dtype, device).require_grad()
    inputs.level_start_index.copy_(torch.tensor([0, 0, 1200, 1100]))
    torch.use_deterministic_algorithms(deterministic)
    try:
        if device == "cpu":
            with pytest.raises(RuntimeError, match="level_start_index .* expected no overlap"):
                getattr(kernel, operator)(*inputs.args)
            return
        output = getattr(kernel, operator)(*inputs.args)
        grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    finally:
        torch.use_deterministic_algorithms(False)
    double = inputs.double().require_grad()
    expected = getattr(kernel.reference, operator)(*double.args)
    assert_close(output, expected, "output")
    wanted = torch.autograd.grad(expected, double.differentiable(), double.grad_output)
    for name, grad, other in zip(inputs.gradient_names(), grads, wanted):
        assert_close(grad, other, name)


def on_a_gpu_only(device):
    if device == "cpu":
        pytest.skip("a limit of GPUs")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_most_levels_of_a_gpu(kernel, device, operator, dtype, deterministic):
    on_a_gpu_only(device)
    case = Case("levels", ((1, 1),) * 1024, batch=1, queries=2, heads=2, points=2)
    torch.use_deterministic_algorithms(deterministic)
    try:
        check_against_reference(kernel, OPERATORS[operator](case, dtype, device))
    finally:
        torch.use_deterministic_algorithms(False)
    case = replace(case, shapes=((1, 1),) * 1025)
    with pytest.raises(RuntimeError, match="spatial_shapes has 1025 levels, expected at most 1024"):
        getattr(kernel, operator)(*OPERATORS[operator](case, dtype, device).args)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_points_than_shared_memory_holds(kernel, device, operator, dtype, deterministic):
    """Of a row: a fused backward keeps them until it has seen all."""
    on_a_gpu_only(device)
    case = Case("points", ((5, 7),), batch=1, queries=3, channels=32, points=3000)
    torch.use_deterministic_algorithms(deterministic)
    try:
        inputs = OPERATORS[operator](case, dtype, device)
        # Each of 3000 weights is a three-thousandth, and gradients of logits cancel.
        check_against_reference(kernel, inputs, tolerance=500 * TOLERANCES[dtype])
    finally:
        torch.use_deterministic_algorithms(False)


def test_most_heads_of_a_gpu(kernel, device):
    on_a_gpu_only(device)
    case = Case("heads", ((1, 2),), batch=1, queries=2, heads=65535, channels=1, points=1)
    check_against_reference(kernel, make_inputs(case, torch.float32, device))
    with pytest.raises(RuntimeError, match="value has 65536 heads, expected at most 65535"):
        kernel.ms_deform_attn(*make_inputs(replace(case, heads=65536), torch.float32, device).args)


def test_more_levels_on_a_cpu(kernel):
    case = Case("levels", ((1, 1),) * 1025, batch=1, queries=2, heads=1, points=1)
    inputs = make_inputs(case, torch.float32)
    assert_close(kernel.ms_deform_attn(*inputs.args), reference_of(kernel, inputs), "output")


def test_levels_helper_agrees_with_transformers_convention():
    shapes, starts = level_tensors([(7, 9), (4, 5), (1, 1)])
    assert starts.tolist() == [0, 63, 83] and shapes.tolist() == [[7, 9], [4, 5], [1, 1]]


def test_levels_in_any_order(kernel, device):
    """level_start_index says where each is."""
    inputs = make_inputs(SMALL, torch.float32, device).require_grad()
    expected = reference_of(kernel, inputs)
    turned = make_inputs(SMALL, torch.float32, device)
    turned.spatial_shapes, turned.level_start_index = level_tensors(SMALL.shapes[::-1], device)
    turned.value = turned.value.roll(-63, 1)
    turned.spatial_shapes = turned.spatial_shapes.flip(0)
    turned.level_start_index = turned.level_start_index.flip(0)
    assert_close(kernel.ms_deform_attn(*turned.args), expected, "output")
    kernel.ms_deform_attn(*turned.require_grad().args).sum().backward()
    kernel.ms_deform_attn(*inputs.args).sum().backward()
    assert relative_error(turned.value.grad.roll(63, 1), inputs.value.grad.double()) < 1e-6


def test_levels_may_change_in_place(kernel, device):
    """A later call sees them, whatever was read for an earlier one."""
    inputs = make_inputs(SMALL, torch.float32, device)
    kernel.ms_deform_attn(*inputs.args)
    inputs.spatial_shapes.copy_(inputs.spatial_shapes.flip(1))
    output = kernel.ms_deform_attn(*inputs.args)
    assert_close(output, reference_of(kernel, inputs), "of other shapes")
    with torch.inference_mode():  # whose tensors do not count their versions
        turned = make_inputs(SMALL, torch.float32, device)
        kernel.ms_deform_attn(*turned.args)
        turned.spatial_shapes.copy_(inputs.spatial_shapes)
        assert torch.equal(kernel.ms_deform_attn(*turned.args), output)
