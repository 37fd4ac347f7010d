"""modules.MSDeformAttn against the eager definition, and with the parameters of others."""

import copy

import pytest
import torch
from cases import HALF_DTYPES, assert_close, level_tensors, relative_error
from torch import nn

SIZES = ((6, 8), (3, 4), (2, 2))
OPTIONS = {
    "plain": {},
    "points_per_level": {"points_per_level": [3, 6, 3]},
    "nearest": {"method": "nearest"},
    "offset_scale": {"points_per_level": [4, 4, 4], "offset_scale": 0.25},
}


def module_of(kernel, device, dtype=torch.float64, **options):
    """With random parameters: offsets and weights begin as zeros."""
    torch.manual_seed(0)
    module = kernel.modules.MSDeformAttn(32, n_levels=3, n_heads=4, n_points=2, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(device, dtype)


def inputs_for(device, dtype=torch.float64, coordinates=4, batch=2, queries=7):
    """query, reference_points, input_flatten, and keyword arguments for the rest."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_()

    pixels = sum(height * width for height, width in SIZES)
    shapes, starts = level_tensors(SIZES, device)
    tensors = (
        normal(batch, queries, 32),
        normal(batch, queries, 3, coordinates),
        normal(batch, pixels, 32),
    )
    mask = torch.rand(batch, pixels, generator=generator).to(device) > 0.8
    return tensors, {
        "input_spatial_shapes": shapes,
        "input_level_start_index": starts,
        "input_padding_mask": mask,
    }


def by_definition(kernel, module, query, reference, pixels, mask, points_per_level=None, **options):
    value = module.value_proj(pixels)
    if mask is not None:
        value = value * ~mask[..., None]
    points = (3, 2) if points_per_level is None else (sum(points_per_level),)
    output = kernel.reference.fused_ms_deform_attn(
        value.view(*value.shape[:2], 4, 8),
        *level_tensors(SIZES, query.device),
        reference,
        module.sampling_offsets(query).view(*query.shape[:2], 4, *points, 2),
        module.attention_weights(query).view(*query.shape[:2], 4, *points),
        points_per_level=points_per_level,
        **options,
    )
    return module.output_proj(output)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_definition(kernel, device, options, coordinates, masked):
    options = OPTIONS[options]
    module = module_of(kernel, device, **options)
    tensors, rest = inputs_for(device, coordinates=coordinates)
    if not masked:
        rest["input_padding_mask"] = None
    output = module(*tensors, **rest)
    expected = by_definition(kernel, module, *tensors, rest["input_padding_mask"], **options)
    assert_close(output, expected, "output")
    differentiable = [*tensors, *module.parameters()]
    grads = torch.autograd.grad(output.square().sum(), differentiable)
    expected_grads = torch.autograd.grad(
        expected.square().sum(), differentiable, materialize_grads=True
    )
    for grad, wanted in zip(grads, expected_grads):
        assert (grad - wanted).norm() <= 1e-11 * max(x.norm() for x in expected_grads)


def test_sizes_as_a_list_and_references_for_all(kernel, device):
    module = module_of(kernel, device)
    (query, reference, pixels), rest = inputs_for(device)
    expected = module(query, reference[:1, :, :1].expand(2, -1, 3, -1), pixels, **rest)
    rest["input_spatial_shapes"] = list(SIZES)
    for starts in (rest["input_level_start_index"], None):
        rest["input_level_start_index"] = starts
        output = module(query, reference[:1, :, :1], pixels, **rest)
        assert_close(output, expected, "output")


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_under_autocast(kernel, device, dtype):
    module = module_of(kernel, device, torch.float32)
    tensors, rest = inputs_for(device, torch.float32)
    expected = module(*tensors, **rest)
    with torch.autocast(device, dtype):
        output = module(*tensors, **rest)
    assert output.dtype == dtype
    assert relative_error(output.detach(), expected.detach().double()) < 0.05
    output.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_without_a_break(kernel, device, options):
    torch._dynamo.reset()
    module = module_of(kernel, device, **OPTIONS[options])
    tensors, rest = inputs_for(device)
    output = torch.compile(module, fullgraph=True, backend="aot_eager")(*tensors, **rest)
    expected = module(*tensors, **rest)
    assert_close(output, expected, "output")
    for actual, wanted in zip(
        torch.autograd.grad(output.sum(), list(module.parameters())),
        torch.autograd.grad(expected.sum(), list(module.parameters())),
    ):
        assert torch.allclose(actual, wanted, atol=1e-11)


# -------------------------------------------------------------------------------------- parameters


def test_initial_values(kernel):
    """Eight heads look in eight directions, point j of each reaching j + 1 pixels."""
    module = kernel.modules.MSDeformAttn()
    state = module.state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }
    offsets = state.pop("sampling_offsets.bias").view(8, 4, 4, 2)
    right, down_right, down = (offsets[head, 2] for head in (0, 1, 2))
    steps = torch.arange(1.0, 5)
    nothing = torch.zeros(4)
    assert torch.allclose(right, torch.stack([steps, nothing], -1), atol=1e-5)
    assert torch.allclose(down_right, torch.stack([steps, steps], -1), atol=1e-5)
    assert torch.allclose(down, torch.stack([nothing, steps], -1), atol=1e-5)
    limit = (6 / 512) ** 0.5
    for name in ("value_proj.weight", "output_proj.weight"):
        weight = state.pop(name)
        assert weight.abs().max() <= limit and 0.5 < weight.std() / (limit / 3**0.5) < 1.5
    assert not any(x.any() for x in state.values())


def test_initial_points_of_levels_that_differ(kernel):
    module = kernel.modules.MSDeformAttn(32, 3, 4, points_per_level=[1, 3, 2])
    offsets = module.sampling_offsets.bias.view(4, 6, 2)
    assert torch.allclose(offsets[0, :, 0], torch.tensor([1.0, 1, 2, 3, 1, 2]), atol=1e-6)


def transformers_attention(name):
    """An attention of transformers with random parameters, and the model's name for it."""
    from test_attention import attention_of

    return attention_of(name, dtype=torch.float32)


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr", "rt_detr_v2", "mask2former"])
def test_parameters_of_transformers(kernel, name):
    """Loaded strictly, with RT-DETRv2's buffer, and the same output as there."""
    from test_attention import inputs_for as keyword_arguments

    theirs = transformers_attention(name)
    ours = kernel.modules.MSDeformAttn(64, theirs.n_levels, theirs.n_heads, theirs.n_points)
    ours.load_state_dict(theirs.state_dict())
    inputs = keyword_arguments(name, theirs, dtype=torch.float32)
    mask = inputs["attention_mask"]
    output = ours(
        inputs["hidden_states"] + inputs["position_embeddings"],
        inputs["reference_points"],
        inputs["encoder_hidden_states"],
        inputs["spatial_shapes_list"],
        input_padding_mask=mask if name == "mask2former" else ~mask,
    )
    assert relative_error(output.detach(), theirs(**inputs)[0].detach().double()) < 1e-5


def test_a_missing_parameter_is_told(kernel):
    module = kernel.modules.MSDeformAttn(32, 3, 4)
    state = module.state_dict()
    state["value_projection.weight"] = state.pop("value_proj.weight")
    with pytest.raises(RuntimeError, match=r'Missing.*"value_proj.weight".*\n.*Unexpected'):
        module.load_state_dict(state)


def test_copied_and_moved(kernel, device):
    module = module_of(kernel, device)
    other = copy.deepcopy(module)
    tensors, rest = inputs_for(device)
    assert torch.equal(other(*tensors, **rest), module(*tensors, **rest))
    assert "n_heads=4, points=2, method='bilinear'" in repr(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 30}, "d_model is 30, expected a multiple of n_heads, 8"),
        ({"points_per_level": [3, 6]}, r"points_per_level is \[3, 6\], expected 4 numbers"),
    ],
    ids=["d_model", "points_per_level"],
)
def test_refuses_options(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        kernel.modules.MSDeformAttn(**options)


def test_refuses_inputs_that_do_not_fit(kernel, device):
    module = module_of(kernel, device)
    (query, reference, pixels), rest = inputs_for(device)
    with pytest.raises(RuntimeError, match="reference_points has"):
        module(query, reference[..., :3], pixels, **rest)
    with pytest.raises(ValueError, match="method is 'cubic', expected"):
        module.method = "cubic"
        module(query, reference, pixels, **rest)
