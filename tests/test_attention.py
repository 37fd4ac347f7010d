"""The attention modules of transformers under use_in_transformers, each against its own forward."""

import copy
import functools
import types
import warnings

import pytest
import torch
from cases import HALF_DTYPES, relative_error
from models import MODELS, build, inputs_of
from test_transformers import (
    FAMILIES,
    Calls,
    default_dtype,
    each_model,
    transformers_that_uses_kernels,
)
from torch import nn
from torch._dynamo.backends.common import aot_autograd

SIZES = ((6, 8), (3, 4), (2, 2), (1, 2))
NAMES = [spec.name for spec in MODELS]
# Of these eager cannot take 2 coordinates: its shapes do not fit together.
FOUR_COORDINATES = ("rt_detr_v2", "rt_detr_v2_discrete", "d_fine", "deimv2")
D_FINE = ("d_fine", "deimv2")
# Their layers do not say whether they keep the weights.
WEIGHTS_ALWAYS = ("grounding_dino", "mm_grounding_dino", "omdet_turbo")


def tolerance_of(name):
    """In float64. Eager keeps 1 / points in float32, which for 3 or 6 points is not exact."""
    return 1e-6 if name in D_FINE else 1e-12


@functools.cache
def _attention(name):
    spec = next(spec for spec in MODELS if spec.name == name)
    model = build(spec, transformers_that_uses_kernels(), "cpu")
    module = next(m for m in model.modules() if hasattr(m, "sampling_offsets"))
    for parameter in module.parameters():  # of which some begin as zeros
        nn.init.normal_(parameter, std=0.3)
    return module


def attention_of(name, device="cpu", dtype=torch.float64):
    """A module of the model's deformable attention, with random weights."""
    return copy.deepcopy(_attention(name)).to(device, dtype)


def inputs_for(name, module, device="cpu", dtype=torch.float64, coordinates=4, queries=7, batch=2):
    """Keyword arguments for the module, as its layer gives them."""
    generator = torch.Generator().manual_seed(0)
    sizes = SIZES[: module.n_levels]
    pixels = sum(height * width for height, width in sizes)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    reference_levels = 1 if name in FOUR_COORDINATES else module.n_levels
    reference = normal(batch, queries, reference_levels, coordinates).sigmoid()
    shapes = torch.tensor(sizes, device=device)
    inputs = {
        "hidden_states": normal(batch, queries, module.d_model).requires_grad_(),
        "encoder_hidden_states": normal(batch, pixels, module.d_model).requires_grad_(),
        "reference_points": reference.requires_grad_(),
        "spatial_shapes": shapes,
        "spatial_shapes_list": list(sizes),
    }
    if name not in D_FINE:
        inputs["position_embeddings"] = normal(batch, queries, module.d_model).requires_grad_()
        inputs["level_start_index"] = shapes.prod(1).cumsum(0) - shapes.prod(1)
        # In some families True marks padding, in some what to keep.
        inputs["attention_mask"] = normal(batch, pixels).float() > 0
    if name == "mask2former":
        del inputs["spatial_shapes"]
    return inputs


def gradients(module, output, inputs):
    tensors = {name: x for name, x in inputs.items() if getattr(x, "requires_grad", False)}
    tensors.update(module.named_parameters())
    grad_output = torch.linspace(-1, 1, output.numel()).to(output).view_as(output)
    grads = torch.autograd.grad(output, list(tensors.values()), grad_output, allow_unused=True)
    return dict(zip(tensors, grads))


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_eager(kernel, device, name, coordinates, fuse):
    """With a mask and position embeddings, where the module takes them."""
    if coordinates == 2 and name in FOUR_COORDINATES:
        pytest.skip(f"the attention of {name} fails in eager with 2 coordinates")
    module = attention_of(name, device)
    inputs = inputs_for(name, module, device, coordinates=coordinates)
    expected, expected_weights = module(**inputs)
    expected_grads = gradients(module, expected, inputs)
    with kernel.integrations.use_in_transformers(module, fuse=fuse), Calls() as calls:
        output, weights = module(**inputs)
    assert (calls.fused, calls.plain) == ((1, 0) if fuse else (0, 1))
    assert output.dtype == expected.dtype
    assert relative_error(output.detach(), expected.detach()) < tolerance_of(name)
    if weights is not None:
        assert torch.allclose(weights, expected_weights, atol=1e-12)
    for of, grad in gradients(module, output, inputs).items():
        wanted = expected_grads[of]
        if wanted is None or "value_proj.bias" in of and not wanted.any():
            assert grad is None or not grad.any(), of
        else:
            assert relative_error(grad, wanted) < 1e3 * tolerance_of(name), of


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_and_in_half_types(kernel, device, name, dtype):
    module = attention_of(name, device, torch.float32)
    inputs = inputs_for(name, module, device, torch.float32)
    expected = module(**inputs)[0].detach()
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    if "discrete" in name:
        tolerance = 1.0  # rounding moves points into the next pixel
    with kernel.integrations.use_in_transformers(module):
        with torch.autocast(device, dtype):
            output = module(**inputs)[0]
            assert output.dtype == dtype
            assert relative_error(output.detach(), expected.double()) < tolerance
            output.float().sum().backward()
        inputs = {
            key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for key, x in inputs.items()
        }
        output = module.to(dtype)(**inputs)[0]
        assert output.dtype == dtype
        assert relative_error(output.detach(), expected.double()) < tolerance


def test_references_for_all_of_a_batch(kernel, device):
    module = attention_of("deformable_detr", device)
    inputs = inputs_for("deformable_detr", module, device)
    inputs["reference_points"] = inputs["reference_points"][:1, :, :1]
    expected = module(**inputs)[0]
    with kernel.integrations.use_in_transformers(module):
        assert relative_error(module(**inputs)[0].detach(), expected.detach()) < 1e-12


def test_refuses_levels_that_do_not_fit(kernel, device):
    module = attention_of("deformable_detr", device)
    inputs = inputs_for("deformable_detr", module, device)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, 1:]
    with kernel.integrations.use_in_transformers(module):
        with pytest.raises(ValueError, match="encoder_hidden_states has 65 pixels, expected 66"):
            module(**inputs)


def test_positional_arguments(kernel, device):
    """Classes differ in the order of their arguments."""
    for name in ("deformable_detr", "mask2former", "oneformer"):
        module = attention_of(name, device)
        inputs = inputs_for(name, module, device)
        expected = module(**inputs)[0]
        hidden_states, mask, encoder_hidden_states = (
            inputs.pop(key) for key in ("hidden_states", "attention_mask", "encoder_hidden_states")
        )
        with kernel.integrations.use_in_transformers(module):
            output = module(hidden_states, mask, encoder_hidden_states, **inputs)[0]
        assert relative_error(output.detach(), expected.detach()) < 1e-12


# ----------------------------------------------------------------------------- attention weights


class Softmaxes(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "softmax" in function.name()
        return function(*args, **(kwargs or {}))


def attended(kernel, module, inputs, **options):
    """What the module returns, fused, and how many softmaxes that took."""
    with kernel.integrations.use_in_transformers(module), Softmaxes() as softmaxes:
        return module(**inputs, **options), softmaxes.count


@pytest.mark.parametrize("name", NAMES)
def test_weights_for_those_who_ask(kernel, name):
    """By the argument, in a hook, or by calling forward; elsewhere they cost nothing."""
    module = attention_of(name)
    inputs = inputs_for(name, module)
    output, expected = module(**inputs)
    always = name in WEIGHTS_ALWAYS
    result, softmaxes = attended(kernel, module, inputs)
    assert type(result) is tuple and softmaxes == always
    assert (result[1] is None) != always

    if name not in D_FINE:
        result, softmaxes = attended(kernel, module, inputs, output_attentions=True)
        assert softmaxes == 1 and torch.allclose(result[1], expected, atol=1e-12)

    with kernel.integrations.use_in_transformers(module):
        for pair in (module.forward(**inputs), tuple(module.forward(**inputs))):
            assert isinstance(pair, tuple) and len(pair) == 2
            assert torch.allclose(pair[1], expected, atol=1e-12)
            assert torch.allclose(pair[0], output, atol=tolerance_of(name))


def unpacks(recorded):
    def hook(module, args, pair):
        output, weights = pair
        recorded.append(weights)

    return hook


HOOKS = {
    "unpacks": unpacks,
    "indexes": lambda recorded: lambda module, args, pair: recorded.append(pair[1]),
    "from_the_end": lambda recorded: lambda module, args, pair: recorded.append(pair[-1]),
    "slices": lambda recorded: lambda module, args, pair: recorded.append(pair[1:][0]),
    "adds": lambda recorded: lambda module, args, pair: recorded.append((pair + (1,))[1]),
    "pytree": lambda recorded: (
        lambda module, args, pair: recorded.append(torch.utils._pytree.tree_leaves(pair)[1])
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_look_at_the_weights(kernel, hook):
    module = attention_of("deformable_detr")
    inputs = inputs_for("deformable_detr", module)
    expected = module(**inputs)[1]
    recorded = []
    handle = module.register_forward_hook(HOOKS[hook](recorded))
    result, softmaxes = attended(kernel, module, inputs)
    assert softmaxes == 1
    for weights in (*recorded, result[1]):
        assert torch.allclose(weights, expected, atol=1e-12)
    grads = torch.autograd.grad(recorded[0].square().sum(), inputs["hidden_states"])
    wanted = torch.autograd.grad(expected.square().sum(), inputs["hidden_states"])
    assert torch.allclose(*grads, *wanted)

    handle.remove()
    module.register_forward_hook(lambda module, args, pair: None)
    assert attended(kernel, module, inputs)[1] == 0, "a hook that does not look costs nothing"


def test_other_hooks(kernel):
    module = attention_of("deformable_detr")
    inputs = inputs_for("deformable_detr", module)
    output = module(**inputs)[0]
    handle = module.register_forward_hook(lambda module, args, pair: (pair[0] * 2, None))
    doubled, weights = attended(kernel, module, inputs)[0]
    assert weights is None and torch.allclose(doubled, 2 * output, atol=1e-12)
    handle.remove()
    seen = []
    module.register_full_backward_hook(lambda module, grad_input, grad: seen.append(grad[0]))
    with kernel.integrations.use_in_transformers(module):
        module(**inputs)[0].sum().backward()
    assert torch.equal(seen[0], torch.ones_like(output))


def attentions_of(output):
    """All that a model returns of attention weights, by name; each is a tuple of the layers'."""
    return {name: x for name, x in output.items() if "attentions" in name and x is not None}


@each_model()
def test_a_model_returns_the_same_weights(kernel, spec):
    """Asked by the argument, then by the configuration, then not: the hooks stay installed."""
    transformers = transformers_that_uses_kernels()
    with default_dtype(torch.float64), torch.no_grad():
        model = build(spec, transformers, "cpu").eval()
        model.set_attn_implementation("eager")  # which alone returns weights
        inputs = inputs_of(spec, "cpu", training=False)
        unasked = attentions_of(model(**inputs))
        expected = attentions_of(model(**inputs, output_attentions=True))
        with kernel.integrations.use_in_transformers(model), Calls() as calls:
            returned = [attentions_of(model(**inputs, output_attentions=True))]
            model.config.output_attentions = True
            returned.append(attentions_of(model(**inputs)))
            model.config.output_attentions = False
            assert attentions_of(model(**inputs)) == unasked
    assert calls.fused == 3 * spec.attentions
    for attentions in returned:
        assert attentions.keys() == expected.keys()
        for name, weights in attentions.items():
            check_same(weights, expected[name], name)


def check_same(actual, expected, name):
    assert type(actual) is type(expected), name
    if isinstance(actual, torch.Tensor):
        assert torch.allclose(actual, expected, atol=1e-9), name
    elif actual is not None:
        assert len(actual) == len(expected), name
        for pair in zip(actual, expected):
            check_same(*pair, name)


# ----------------------------------------------------------------------------- compiled, exported


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in FAMILIES else pytest.mark.slow) for x in NAMES]
)
def test_compiled_without_a_break(kernel, device, name):
    """Forward and backward; weights that nobody uses leave the graph."""
    torch._dynamo.reset()
    module = attention_of(name, device)
    inputs = inputs_for(name, module, device)
    targets = []

    def note(graph, args):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def step(**inputs):
        return module(**inputs)[0]

    backend = aot_autograd(fw_compiler=note)
    with kernel.integrations.use_in_transformers(module):
        expected = step(**inputs)
        output = torch.compile(step, fullgraph=True, backend=backend)(**inputs)
        assert torch.allclose(output, expected, atol=1e-12)
        grads = gradients(module, output, inputs)
        for of, wanted in gradients(module, expected, inputs).items():
            assert torch.allclose(grads[of], wanted, atol=1e-9), of
    assert any("fused_ms_deform_attn_forward" in target for target in targets)
    assert not any("softmax" in target for target in targets)


def test_compiled_with_a_hook(kernel):
    torch._dynamo.reset()
    module = attention_of("deformable_detr")
    inputs = inputs_for("deformable_detr", module)
    expected = module(**inputs)[1]
    recorded = []
    module.register_forward_hook(unpacks(recorded))
    with kernel.integrations.use_in_transformers(module):
        torch.compile(lambda: module(**inputs)[0], backend="aot_eager")()
    assert torch.allclose(recorded[0], expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rt_detr", "mask2former"])
def test_a_compiled_model(kernel, device, name):
    torch._dynamo.reset()
    spec = next(spec for spec in MODELS if spec.name == name)
    model = build(spec, transformers_that_uses_kernels(), device).eval()
    inputs = inputs_of(spec, device, training=False)
    with torch.no_grad(), kernel.integrations.use_in_transformers(model):
        expected = model(**inputs)[spec.outputs[0]]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(**inputs)[spec.outputs[0]], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["deformable_detr", "mask2former", "d_fine", "rt_detr_v2"])
def test_exported_with_any_number_of_queries(kernel, name):
    module = attention_of(name)
    inputs = inputs_for(name, module)
    batch, queries = torch.export.Dim("batch", min=2), torch.export.Dim("queries", min=2)
    dynamic = {key: None for key in inputs}
    for key in ("hidden_states", "position_embeddings", "reference_points"):
        if key in inputs:
            dynamic[key] = {0: batch, 1: queries}
    for key in ("encoder_hidden_states", "attention_mask"):
        if key in inputs:
            dynamic[key] = {0: batch}
    dynamic["spatial_shapes_list"] = [(None, None)] * module.n_levels
    with kernel.integrations.use_in_transformers(module), torch.no_grad():
        program = torch.export.export(module, (), inputs, dynamic_shapes=dynamic, strict=False)
        for sizes in ({}, {"queries": 12, "batch": 3}):
            inputs = inputs_for(name, module, **sizes)
            for actual, wanted in zip(program.module()(**inputs), module.forward(**inputs)):
                assert torch.allclose(actual, wanted, atol=1e-12)


# ------------------------------------------------------------------------ what the table expects


def take_other_arguments(module, patch):
    def forward(self, hidden_states, sizes=None):
        raise AssertionError

    file = type(module).forward.__globals__
    patch.setattr(type(module), "forward", types.FunctionType(forward.__code__, file))


CHANGES = {
    "a class whose forward takes other arguments": (
        take_other_arguments,
        r"its forward takes \(hidden_states, sizes\), expected \(attention_mask",
    ),
    "an instance without an attribute": (
        lambda module, patch: patch.delattr(module, "n_points"),
        "it has no n_points",
    ),
    "an instance with a forward of its own": (
        lambda module, patch: patch.setattr(module, "forward", module.forward),
        "an instance has a forward of its own",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_says_once_that_a_class_is_not_what_it_was(kernel, monkeypatch, change):
    module = attention_of("deformable_detr")
    inputs = inputs_for("deformable_detr", module)
    expected = module(**inputs)[0]
    alter, message = CHANGES[change]
    alter(module, monkeypatch)
    monkeypatch.setattr(kernel.integrations.transformers, "_warned", set())
    name = type(module).__name__
    with pytest.warns(UserWarning, match=f"{name} only samples on this kernel.*: {message}"):
        with kernel.integrations.use_in_transformers(module), Calls() as calls:
            if "forward of its own" in change:
                assert torch.allclose(module(**inputs)[0], expected, atol=1e-12)
                assert (calls.fused, calls.plain) == (0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with kernel.integrations.use_in_transformers(module):
            pass


def test_a_subclass(kernel):
    """Without a forward of its own it is its base; with one it only samples on this kernel."""
    module = attention_of("deformable_detr")
    inputs = inputs_for("deformable_detr", module)
    expected = module(**inputs)[0]
    base = type(module)
    module.__class__ = type("Mine", (base,), {})
    with kernel.integrations.use_in_transformers(module), Calls() as calls:
        assert torch.allclose(module(**inputs)[0], expected, atol=1e-12)
    assert (calls.fused, calls.plain) == (1, 0)
    module.__class__ = type("Mine", (base,), {"forward": lambda self, **x: base.forward(self, **x)})
    with pytest.warns(UserWarning, match="MultiScaleDeformableAttention only samples"):
        with kernel.integrations.use_in_transformers(module), Calls() as calls:
            assert torch.allclose(module(**inputs)[0], expected, atol=1e-12)
    assert (calls.fused, calls.plain) == (0, 1)


def test_the_context_entered_last_decides(kernel):
    module = attention_of("d_fine")
    inputs = inputs_for("d_fine", module)
    use = kernel.integrations.use_in_transformers
    for fuse in (True, False):
        with use(module, fuse=fuse), use(module, fuse=not fuse), Calls() as calls:
            module(**inputs)
            assert (calls.fused, calls.plain) == ((0, 1) if fuse else (1, 0))
    with Calls() as calls:
        module(**inputs)
    assert (calls.fused, calls.plain) == (0, 0)
