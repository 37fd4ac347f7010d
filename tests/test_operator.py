"""Output and gradients against the float64 reference: cases x dtypes x devices."""

from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    COARSE,
    DTYPES,
    MIXABLE,
    SMALL,
    Case,
    FusedInputs,
    assert_close,
    make_inputs,
    on_the_exact_side,
    relative_error,
)


def check_against_reference(kernel, inputs, case_of_centres=None, tolerance=None):
    """Output and gradients of ms_deform_attn, or of fused_ms_deform_attn for its inputs."""
    name = "fused_ms_deform_attn" if isinstance(inputs, FusedInputs) else "ms_deform_attn"
    reference = inputs.double()
    if case_of_centres:
        locations = on_the_exact_side(
            reference.sampling_locations.flatten(3, 4),
            case_of_centres.shapes,
            case_of_centres.numbers_of_points,
        )
        reference.sampling_locations = locations.view(reference.sampling_locations.shape)
    reference.require_grad()
    expected = getattr(kernel.reference, name)(*reference.args, **reference.options)
    expected_grads = torch.autograd.grad(
        expected, reference.differentiable(), reference.grad_output, materialize_grads=True
    )

    output = getattr(kernel, name)(*inputs.require_grad().args, **inputs.options)
    grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)

    assert output.dtype == inputs.value.dtype
    assert_close(output, expected, "output", tolerance)
    for name, tensor, grad, expected_grad in zip(
        inputs.gradient_names(), inputs.differentiable(), grads, expected_grads
    ):
        assert grad.dtype == tensor.dtype, name
        without_gradient = ("grad_sampling", "grad_reference")
        if inputs.options.get("method") == "nearest" and name.startswith(without_gradient):
            assert grad.shape == expected_grad.shape and not grad.any(), name
        else:
            assert_close(grad, expected_grad, name, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(kernel, device, case, dtype):
    case_of_centres = case if case.locations == "centres" else None
    check_against_reference(kernel, make_inputs(case, dtype, device), case_of_centres)


def eager(value, shapes, locations, weights):
    """As models compute it: grid_sample on each level."""
    batch, _, heads, channels = value.shape
    samples = []
    for level, (height, width) in enumerate(shapes):
        start = sum(h * w for h, w in shapes[:level])
        image = value[:, start : start + height * width].permute(0, 2, 3, 1)
        image = image.reshape(batch * heads, channels, height, width)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(torch.nn.functional.grid_sample(image, grid, align_corners=False))
    weights = weights.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]
    output = (torch.cat(samples, -1) * weights).sum(-1)
    return output.view(batch, heads * channels, -1).transpose(1, 2)


@pytest.mark.parametrize("name", ["wide_334", "corner_334", "pyramid"])
def test_as_exact_as_eager_on_large_maps(kernel, device, name):
    """An error of grid_sample's coordinates is as large as a pixel's number is, in 2^-24ths."""
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, torch.float32, device).require_grad()
    double = inputs.double().require_grad()

    def with_gradients(output, inputs):
        grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
        return [output.detach(), *grads]

    expected = with_gradients(kernel.reference.ms_deform_attn(*double.args), double)
    actual = with_gradients(kernel.ms_deform_attn(*inputs.args), inputs)
    of_eager = eager(inputs.value, case.shapes, inputs.sampling_locations, inputs.attention_weights)
    for ours, theirs, exact in zip(actual, with_gradients(of_eager, inputs), expected):
        assert relative_error(ours, exact) <= max(1.1 * relative_error(theirs, exact), 1e-6)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_on_a_pyramid(kernel, device, dtype):
    case = Case("pyramid", ((9, 14), (5, 7), (3, 4)), queries=40, heads=8, channels=32)
    check_against_reference(kernel, make_inputs(case, dtype, device, seed=1))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("channels", [30, 32])
@pytest.mark.parametrize("weights_dtype", MIXABLE, ids=str)
@pytest.mark.parametrize("locations_dtype", MIXABLE, ids=str)
@pytest.mark.parametrize("dtype", MIXABLE, ids=str)
def test_any_mixture_of_dtypes(kernel, device, dtype, locations_dtype, weights_dtype, channels):
    case = Case("mixed", channels=channels)
    inputs = make_inputs(case, dtype, device, locations_dtype, weights_dtype)
    check_against_reference(kernel, inputs)


@pytest.mark.parametrize("channels, method", [(20, "bilinear"), (48, "bilinear"), (16, "nearest")])
@pytest.mark.parametrize(
    "dtype, locations_dtype", [*zip(MIXABLE, MIXABLE), (torch.float16, torch.float32)], ids=str
)
def test_coarse_levels(kernel, device, dtype, locations_dtype, channels, method):
    if device == "cpu":
        pytest.skip("a strategy of GPUs")
    case = replace(COARSE, channels=channels, method=method)
    check_against_reference(kernel, make_inputs(case, dtype, device, locations_dtype))


@pytest.mark.parametrize("dtype", MIXABLE, ids=str)
def test_float64_goes_with_float64_alone(kernel, device, dtype):
    inputs = make_inputs(SMALL, torch.float64, device, weights_dtype=dtype)
    with pytest.raises(RuntimeError, match="attention_weights has dtype .*, expected Double"):
        kernel.ms_deform_attn(*inputs.args)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("channels", [3, 4])
def test_gradcheck(kernel, device, channels):
    case = Case("gradcheck", ((4, 5), (2, 3)), batch=2, queries=3, channels=channels, points=2)
    inputs = make_inputs(case, torch.float64, device).require_grad()
    value, spatial_shapes, level_start_index, locations, weights = inputs.args

    def operator(value, locations, weights):
        return kernel.ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)

    assert torch.autograd.gradcheck(operator, (value, locations, weights))


@pytest.mark.parametrize("channels", [30, 64, 1025, 2048, 3096])
def test_gradcheck_of_the_original_extension(kernel, device, channels):
    """As its own tests have it: with as many channels as these, sums in any order fail it."""
    case = Case("original", ((6, 4), (3, 2)), batch=1, queries=2, channels=channels, points=2)
    inputs = make_inputs(case, torch.float64, device).require_grad()
    value, spatial_shapes, level_start_index, locations, weights = inputs.args

    def operator(value, locations, weights):
        return kernel.ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)

    assert torch.autograd.gradcheck(operator, (value, locations, weights), fast_mode=True)


@pytest.mark.kernels_ci
def test_backward_function_equals_autograd(kernel, device):
    inputs = make_inputs(SMALL, torch.float32, device)
    grads = kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)
    assert isinstance(grads, list)
    output = kernel.ms_deform_attn(*inputs.require_grad().args)
    expected = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    for name, grad, other in zip(inputs.gradient_names(), grads, expected):
        assert relative_error(grad, other.double()) < 1e-6, name


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_input_at_a_time_may_require_grad(kernel, device, index):
    inputs = make_inputs(SMALL, torch.float32, device)
    full = kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)
    inputs.differentiable()[index].requires_grad_()
    kernel.ms_deform_attn(*inputs.args).backward(inputs.grad_output)
    for i, tensor in enumerate(inputs.differentiable()):
        if i == index:
            assert relative_error(tensor.grad, full[i].double()) < 1e-6
        else:
            assert tensor.grad is None


def test_gpu_equals_cpu(kernel):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    case = Case("both", ((20, 27), (10, 14)), queries=500, heads=8, channels=32)
    on_cpu = kernel.ms_deform_attn(*make_inputs(case, torch.float32).args)
    on_gpu = kernel.ms_deform_attn(*make_inputs(case, torch.float32, "cuda").args)
    assert relative_error(on_gpu.cpu(), on_cpu.double()) < 1e-6
