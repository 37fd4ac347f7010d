"""What callers may pass, and what they are told when they pass something else."""

import pytest
import torch
from cases import SMALL, Case, assert_close, level_tensors, make_inputs, relative_error


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


def test_public_names(kernel):
    assert set(kernel.__all__) == {
        "fused_ms_deform_attn",
        "integrations",
        "layers",
        "ms_deform_attn",
        "ms_deform_attn_backward",
        "ms_deform_attn_forward",
        "reference",
    }
    assert all(hasattr(kernel, name) for name in kernel.__all__)


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
    inputs = make_inputs(Case("nowhere", channels=32), dtype, device)
    inputs.sampling_locations[:, ::3, :, :, 1, 0] = bad
    inputs.sampling_locations[:, 1::3, :, 0, :, 1] = bad
    without = make_inputs(Case("nowhere", channels=32), dtype, device)
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


# ------------------------------------------------------------------------------------- refused


def with_(**changes):
    def change(inputs):
        for name, function in changes.items():
            setattr(inputs, name, function(getattr(inputs, name)))

    return change


# name: (what to change, what the message must hold)
BAD_INPUTS = {
    "value rank": (with_(value=lambda t: t[0]), ["value", "(83, 2, 16)", "batch"]),
    "value int": (with_(value=lambda t: t.int()), ["value", "Int", "Float"]),
    "value complex": (with_(value=lambda t: t.to(torch.complex64)), ["value", "ComplexFloat"]),
    "shapes rank": (with_(spatial_shapes=lambda t: t[0]), ["spatial_shapes", "(2)", "levels"]),
    "shapes columns": (
        with_(spatial_shapes=lambda t: t[:, :1]), ["spatial_shapes", "(2, 1)", "2=2"]),
    "shapes float": (
        with_(spatial_shapes=lambda t: t.float()), ["spatial_shapes", "Float", "Long or Int"]),
    "starts length": (
        with_(level_start_index=lambda t: t[:1]), ["level_start_index", "(1)", "levels=2"]),
    "starts float": (
        with_(level_start_index=lambda t: t.float()), ["level_start_index", "Float", "Long"]),
    "locations rank": (
        with_(sampling_locations=lambda t: t[0]), ["sampling_locations", "batch=2", "heads=2"]),
    "locations batch": (
        with_(sampling_locations=lambda t: t[:1]),
        ["sampling_locations", "(1, 13, 2, 2, 4, 2)", "batch=2"]),
    "locations heads": (
        with_(sampling_locations=lambda t: t[:, :, :1]), ["sampling_locations", "heads=2"]),
    "locations levels": (
        with_(sampling_locations=lambda t: t[:, :, :, :1]), ["sampling_locations", "levels=2"]),
    "locations coordinates": (
        with_(sampling_locations=lambda t: t[..., :1]), ["sampling_locations", "2=2"]),
    "locations dtype": (
        with_(sampling_locations=lambda t: t.double()), ["sampling_locations", "Double", "Float"]),
    "locations half": (
        with_(sampling_locations=lambda t: t.half()), ["sampling_locations", "Half", "Float"]),
    "weights queries": (
        with_(attention_weights=lambda t: t[:, :5]),
        ["attention_weights", "(2, 5, 2, 2, 4)", "queries=13"]),
    "weights points": (
        with_(attention_weights=lambda t: t[..., :3]), ["attention_weights", "points=4"]),
    "weights dtype": (
        with_(attention_weights=lambda t: t.double()), ["attention_weights", "Double", "Float"]),
}  # fmt: skip

BAD_LEVELS = {
    "sum": ([(7, 9), (4, 4)], [0, 63], ["spatial_shapes", "79", "value.size(1)=83"]),
    "too large": ([(7, 9), (4, 6)], [0, 63], ["spatial_shapes", "4 * 6", "83"]),
    "negative": ([(7, 9), (-4, -5)], [0, 63], ["spatial_shapes", "(-4, -5)", "positive"]),
    "zero": ([(7, 9), (0, 5)], [0, 63], ["spatial_shapes", "(0, 5)", "positive"]),
    "start negative": ([(7, 9), (4, 5)], [-1, 63], ["level_start_index", "-1"]),
    "start too large": ([(7, 9), (4, 5)], [0, 83], ["level_start_index", "83"]),
    "overlapping": ([(7, 9), (4, 5)], [0, 10], ["level_start_index", "10", "overlap"]),
    "huge": ([(2**62, 2**62), (4, 5)], [0, 63], ["spatial_shapes", str(2**62)]),
}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(kernel, device, name):
    change, expected = BAD_INPUTS[name]
    inputs = make_inputs(SMALL, torch.float32, device)
    good = kernel.ms_deform_attn(*inputs.args)
    change(inputs)
    for call in (
        lambda: kernel.ms_deform_attn(*inputs.args),
        lambda: kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        for part in expected:
            assert part in str(error.value)
    assert torch.equal(kernel.ms_deform_attn(*make_inputs(SMALL, torch.float32, device).args), good)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", BAD_LEVELS)
def test_bad_levels_on_the_cpu(kernel, name):
    shapes, starts, expected = BAD_LEVELS[name]
    inputs = make_inputs(SMALL, torch.float32)
    inputs.spatial_shapes = torch.tensor(shapes)
    inputs.level_start_index = torch.tensor(starts)
    with pytest.raises(RuntimeError) as error:
        kernel.ms_deform_attn(*inputs.args)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize("name", BAD_LEVELS)
def test_bad_levels_on_a_gpu_read_and_write_nothing_outside(kernel, name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: level metadata on the CPU is refused")
    shapes, starts, _ = BAD_LEVELS[name]
    inputs = make_inputs(SMALL, torch.float32, "cuda")
    # The value lies between guards of NaN: what is read there would show.
    guarded = torch.full((3, *inputs.value.shape), float("nan"), device="cuda")
    guarded[1] = inputs.value
    inputs.value = guarded[1]
    inputs.spatial_shapes = torch.tensor(shapes, device="cuda")
    inputs.level_start_index = torch.tensor(starts, device="cuda")
    output = kernel.ms_deform_attn(*inputs.args)
    grads = kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)
    torch.cuda.synchronize()
    assert all(tensor.isfinite().all() for tensor in (output, *grads))


def test_more_levels_than_a_gpu_takes(kernel, device):
    case = Case("levels", ((1, 1),) * 1025, batch=1, queries=2, heads=1, points=1)
    inputs = make_inputs(case, torch.float32, device)
    if device == "cpu":
        assert_close(kernel.ms_deform_attn(*inputs.args), reference_of(kernel, inputs), "output")
    else:
        with pytest.raises(RuntimeError, match="spatial_shapes has too many levels.*1024"):
            kernel.ms_deform_attn(*inputs.args)


def test_bad_grad_output(kernel, device):
    inputs = make_inputs(SMALL, torch.float32, device)
    for grad_output, expected in (
        (inputs.grad_output[:, :3], ["grad_output", "(2, 3, 32)", "queries=13"]),
        (inputs.grad_output[..., :3], ["grad_output", "heads*channels=32"]),
        (inputs.grad_output.double(), ["grad_output", "Double", "Float"]),
    ):
        with pytest.raises(RuntimeError) as error:
            kernel.ms_deform_attn_backward(*inputs.args, grad_output, 64)
        for part in expected:
            assert part in str(error.value)


@pytest.mark.parametrize("name", ["spatial_shapes", "level_start_index", "sampling_locations",
                                  "attention_weights"])  # fmt: skip
def test_tensors_on_different_devices(kernel, name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: there is one device only")
    inputs = make_inputs(SMALL, torch.float32, "cuda")
    setattr(inputs, name, getattr(inputs, name).cpu())
    with pytest.raises(RuntimeError, match=f"{name} is on cpu, expected cuda:0"):
        kernel.ms_deform_attn(*inputs.args)


@pytest.mark.parametrize("wrong", [None, 3, [1.0], "value"])
def test_not_a_tensor(kernel, wrong):
    inputs = make_inputs(SMALL, torch.float32)
    inputs.attention_weights = wrong
    with pytest.raises((RuntimeError, TypeError), match="attention_weights"):
        kernel.ms_deform_attn(*inputs.args)


def test_sparse_and_meta(kernel):
    inputs = make_inputs(SMALL, torch.float32)
    shape = kernel.ms_deform_attn(*(tensor.to("meta") for tensor in inputs.args)).shape
    assert shape == (2, 13, 32)
    inputs.value = inputs.value.to_sparse()
    with pytest.raises(NotImplementedError, match="Sparse"):
        kernel.ms_deform_attn(*inputs.args)


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
