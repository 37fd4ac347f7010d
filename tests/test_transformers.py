"""The layer alone, and this kernel inside real models of transformers."""

import copy
import functools
import importlib.metadata
import inspect
import os
import pickle
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import kernels
import pytest
import torch
from cases import HALF_DTYPES, SMALL, Case, make_inputs, relative_error
from conftest import KERNEL, ROOT
from models import MODELS, build, inputs_of, run
from packaging.version import Version
from processes import python
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

LAYER = "MultiScaleDeformableAttention"
# One of each family of integrations/fused.py. make test leaves the others to make test-all.
FAMILIES = ("deformable_detr", "rt_detr_v2", "d_fine", "mask2former", "oneformer")


def each_model(models=MODELS):
    marks = {spec.name: () if spec.name in FAMILIES else pytest.mark.slow for spec in models}
    specs = [pytest.param(spec, id=spec.name, marks=marks[spec.name]) for spec in models]
    return pytest.mark.parametrize("spec", specs)


@pytest.mark.parametrize("name", [LAYER, f"{LAYER}List", f"{LAYER}V2"])
def test_layer_is_what_kernels_accepts(kernel, name):
    assert name in kernel.layers.__all__
    layer = getattr(kernel.layers, name)
    assert layer.__init__ is nn.Module.__init__
    assert layer.has_backward is True and layer.can_torch_compile is True
    own = {name for name in vars(layer) if not name.startswith("__")}
    assert own - {"forward", "has_backward", "can_torch_compile"} == set()


def test_layer_equals_function(kernel, device):
    inputs = make_inputs(SMALL, torch.float32, device)
    value, spatial_shapes, level_start_index, locations, weights = inputs.args
    layer = getattr(kernel.layers, LAYER)()
    output = layer(
        value, spatial_shapes, list(SMALL.shapes), level_start_index, locations, weights, 64
    )
    assert torch.equal(output, kernel.ms_deform_attn(*inputs.args))


# ----------------------------------------------------------------------------------------- models


def transformers_that_uses_kernels():
    """transformers, or skip. Each release of it ignores kernels of another range than its own.

    The check is lifted where a release wants a kernels that cannot be had: 5.24 wants 0.18.2.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")  # the loss of its detectors needs it
    if Version(transformers.__version__) < Version("5.22"):
        pytest.skip(f"transformers is {transformers.__version__}, expected 5.22 or later")
    checks = transformers.utils.import_utils
    if not checks.is_kernels_available():
        # The file that takes the check's answer, once, when it is imported.
        assert "transformers.integrations.hub_kernels" not in sys.modules
        checks.is_kernels_available = lambda *_: True
    return transformers


def kernelize(model, device, mode, layer=LAYER):
    repository = kernels.LocalLayerRepository(Path(KERNEL.__file__).parent.parent, layer_name=layer)
    with kernels.use_kernel_mapping({layer: {device: repository}}, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device=device)


class Calls(TorchDispatchMode):
    """Counts the calls of this kernel's operators while it is entered."""

    def __init__(self):
        super().__init__()
        self.plain = self.fused = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1]
        self.plain += name == "ms_deform_attn_forward"
        self.fused += name == "fused_ms_deform_attn_forward"
        return function(*args, **(kwargs or {}))


# How a model gets this kernel.
ROUTES = ["kernelized", "fused", "unfused"]


def routes_of(spec):
    return ROUTES if spec.by == "layer" else ROUTES[1:]


@contextmanager
def on_this_kernel(kernel, spec, model, device, training, route, steps=1):
    """The model on this kernel; each attention is checked to have sampled once a step."""
    with Calls() as calls:
        if route == "kernelized":
            kernelize(model, device, kernels.Mode.TRAINING if training else kernels.Mode.INFERENCE)
            yield
        else:
            with kernel.integrations.use_in_transformers(model, fuse=route == "fused"):
                yield
    expected = steps * spec.attentions
    assert (calls.fused, calls.plain) == ((expected, 0) if route == "fused" else (0, expected))


@contextmanager
def default_dtype(dtype):
    """Of parameters and inputs, and of the tensors that losses make."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@each_model()
def test_model(kernel, device, spec, training):
    """In float64, where neither the choice of proposals nor a pixel is up to rounding."""
    transformers = transformers_that_uses_kernels()
    with default_dtype(torch.float64):
        eager = run(spec, build(spec, transformers, device), device, training)
        for route in routes_of(spec):
            model = build(spec, transformers, device).train(training)
            with on_this_kernel(kernel, spec, model, device, training, route):
                ours = run(spec, model, device, training)
            check_equal(route, spec, eager, ours, training)


def check_equal(route, spec, eager, ours, training):
    if training:
        learned = "sampling_offsets" if "discrete" not in spec.name else "attention_weights"
        assert any(learned in name and grad.any() for name, grad in ours.items())
    total = sum(x.norm() for name, x in eager.items() if name.startswith("gradient"))
    for name in {**eager, **ours}:
        # Where eager's sampling is not differentiable it gives None, for our zeros.
        expected = eager.get(name, torch.zeros_like(ours[name]))
        error = (ours[name] - expected).norm()
        limit = 1e-5 * total if name.startswith("gradient") else 1e-7 * expected.norm()
        assert error <= limit, f"{route}: {name} is off by {error:.1e}, limit {limit:.1e}"


STEPS = 6


def train(spec, model, device, scaler, dtype=None):
    """The loss of each step: in float32, or under autocast to the dtype."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(STEPS):
        torch.manual_seed(2)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = model(**inputs_of(spec, device, training=True)).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return torch.tensor(losses)


@functools.cache
def losses_of_eager(name, device):
    spec = next(spec for spec in MODELS if spec.name == name)
    model = build(spec, transformers_that_uses_kernels(), device).train()
    return train(spec, model, device, torch.amp.GradScaler(device, enabled=False))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["deformable_detr", "mask2former"])
def test_training_under_autocast(kernel, device, name, route, dtype):
    """Six steps with a gradient scaler: the loss follows that of eager in float32."""
    spec = next(spec for spec in MODELS if spec.name == name)
    if route not in routes_of(spec):
        pytest.skip(f"kernelize does not see the function in which {name} samples")
    expected = losses_of_eager(name, device)
    assert expected[-1] < 0.99 * expected[0], "it learns"
    model = build(spec, transformers_that_uses_kernels(), device).train()
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    with on_this_kernel(kernel, spec, model, device, True, route, steps=STEPS):
        losses = train(spec, model, device, scaler, dtype)
    assert scaler.get_scale() >= 2.0**10, "no step was skipped"
    assert ((losses - expected).abs() <= 0.05 * expected).all()


def decorated(patch, file):
    """The file's sampling function, decorated as transformers does with Mamba2's.

    Two decorators a file: one makes a layer of the function, one shows it to kernelize.
    """
    from transformers.integrations import use_kernel_forward_from_hub, use_kernelized_func

    names = {
        "multi_scale_deformable_attention": f"{LAYER}List",
        "multi_scale_deformable_attention_v2": f"{LAYER}V2",
    }
    name = next(name for name in names if hasattr(file, name))
    original = getattr(file, name)
    copied = types.FunctionType(original.__code__, vars(file), name, original.__defaults__)
    layer = use_kernel_forward_from_hub(names[name])(copied)
    patch.setattr(file, name, layer)
    attention = next(
        x for x in vars(file).values() if "MultiscaleDef" in getattr(x, "__name__", "")
    )
    patch.setattr(attention, "__init__", attention.__init__)
    use_kernelized_func([layer])(attention)
    return names[name]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@each_model([spec for spec in MODELS if spec.by == "function"])
def test_kernelize_where_transformers_decorates_the_function(device, monkeypatch, spec, training):
    transformers = transformers_that_uses_kernels()
    with default_dtype(torch.float64):
        model = build(spec, transformers, device)
        eager = run(spec, model, device, training)
        layer = decorated(monkeypatch, sys.modules[type(model).__module__])
        model = build(spec, transformers, device).train(training)
        mode = kernels.Mode.TRAINING if training else kernels.Mode.INFERENCE
        kernelize(model, device, mode, layer)
        with Calls() as calls:
            ours = run(spec, model, device, training)
    assert (calls.fused, calls.plain) == (0, spec.attentions)
    check_equal("kernelized", spec, eager, ours, training)


# ------------------------------------------------------------------------- releases and their names


def arguments(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", sorted({spec.name.replace("_discrete", "") for spec in MODELS}))
def test_signatures_of_transformers(kernel, name):
    """What the tables of integrations hold of a model is what this release of transformers has."""
    transformers_that_uses_kernels()
    file = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    families = kernel.integrations.fused.FAMILIES
    own = {x: y for x, y in vars(file).items() if getattr(y, "__module__", "") == file.__name__}
    (attention,) = own.keys() & families.keys()
    takes = {*arguments(own[attention].forward)} - {"self", "kwargs", "output_attentions"}
    assert takes == families[attention].parameters, attention
    samplers = {LAYER: getattr(kernel.layers, LAYER), **kernel.integrations.transformers._FUNCTIONS}
    (sampler,) = own.keys() & samplers.keys()
    theirs, ours = (getattr(x, "forward", x) for x in (own[sampler], samplers[sampler]))
    assert arguments(theirs) == arguments(ours), sampler


NEWER = ("5.24.0",)


@pytest.mark.slow
@pytest.mark.parametrize("version", NEWER)
def test_newer_transformers(version, tmp_path):
    """What make test runs of this file and of test_attention.py, with the release.

    All models' attentions are compared, and one model of each family.
    """
    folder = ROOT / ".toolkits" / f"transformers-{version}"
    install = f"pip install --no-deps --target .toolkits/{folder.name} transformers=={version}"
    if importlib.metadata.version("transformers") in NEWER:
        pytest.skip("this is the process")
    if not folder.is_dir():
        pytest.skip(f"there is no .toolkits/{folder.name}; {install}")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "test_transformers.py", "test_attention.py", "-q", "-rs",
         "-m", "not slow", "-p", "no:cacheprovider"],
        cwd=ROOT / "tests", env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------ integrations


def small_model(name):
    spec = next(spec for spec in MODELS if spec.name == name)
    return spec, build(spec, transformers_that_uses_kernels(), "cpu").eval()


def runs_on_this_kernel(spec, model):
    with Calls() as calls:
        run(spec, model, "cpu", training=False)
    assert (calls.fused, calls.plain) in ((0, 0), (spec.attentions, 0), (0, spec.attentions))
    return calls.fused + calls.plain > 0


@pytest.mark.parametrize("name", ["d_fine", "mask2former", "rt_detr"])
@pytest.mark.parametrize("error", [None, RuntimeError("inside")], ids=["left", "raised"])
def test_integrations_restore_what_they_replace(kernel, name, error):
    spec, model = small_model(name)
    before = state_of_classes(model)
    try:
        with kernel.integrations.use_in_transformers(model) as entered:
            assert entered is model
            assert runs_on_this_kernel(spec, model)
            if error:
                raise error
    except RuntimeError as raised:
        assert raised is error
    assert not runs_on_this_kernel(spec, model)
    assert state_of_classes(model) == before


def state_of_classes(model):
    """All that an integration could replace: attributes of classes, instances and modules."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    state = [(owner, name, id(x)) for owner in classes for name, x in vars(owner).items()]
    files = {sys.modules[owner.__module__] for owner in classes}
    state += [(file, name, id(x)) for file in files for name, x in vars(file).items()]
    kept = [(m, name) for m in model.modules() for name in vars(m) if "attn_core" in name]
    return {*state, *((m, name, id(vars(m)[name])) for m, name in kept)}


@pytest.mark.parametrize("name", ["d_fine", "mask2former", "rt_detr"])
def test_nested_contexts(kernel, name):
    """Two models of one class and one model twice; the contexts end in any order."""
    spec, model = small_model(name)
    other = small_model(name)[1]
    contexts = [kernel.integrations.use_in_transformers(m) for m in (model, other, model)]
    for context in contexts:
        context.__enter__()
        assert runs_on_this_kernel(spec, model)
    for context in (contexts[1], contexts[0]):
        context.__exit__(None, None, None)
        assert runs_on_this_kernel(spec, model)
        assert runs_on_this_kernel(spec, other)
    contexts[2].__exit__(None, None, None)
    assert not runs_on_this_kernel(spec, model)


def test_a_class_that_cannot_be_imported(kernel):
    """As in a notebook, or in a file that was loaded and not registered."""
    spec, model = small_model("mask2former")
    decoder = type(model.model.pixel_level_module.decoder)
    model.model.pixel_level_module.decoder.__class__ = type(
        "Decoder", (decoder,), {"__module__": "not_there"}
    )
    with kernel.integrations.use_in_transformers(model):
        assert runs_on_this_kernel(spec, model)


@pytest.mark.parametrize("name", ["d_fine", "mask2former", "rt_detr"])
def test_a_copy_made_inside_is_transformers_own_outside(kernel, name):
    spec, model = small_model(name)
    with kernel.integrations.use_in_transformers(model):
        copies = [copy.deepcopy(model), small_model(name)[1]]
        if name != "mask2former":  # whose backbone has a hook that cannot be pickled
            copies.append(pickle.loads(pickle.dumps(model)))
        for other in copies:
            assert runs_on_this_kernel(spec, other)
    for other in copies:
        assert not runs_on_this_kernel(spec, other)


LOADS_A_MODEL = """
import torch
model = torch.load({path!r}, weights_only=False)
assert not any("deformable_detr_c" in name for name in sys.modules), "it needs no kernel"
with torch.no_grad():
    print(model.eval()(pixel_values=torch.ones(1, 3, 64, 96)).logits.norm().item())
"""


def test_a_model_saved_inside_is_loaded_without_the_kernel(kernel, tmp_path):
    spec, model = small_model("d_fine")
    with kernel.integrations.use_in_transformers(model):
        torch.save(model, tmp_path / "model.pt")
    printed = python(LOADS_A_MODEL.format(path=str(tmp_path / "model.pt")))
    with torch.no_grad():
        expected = model(pixel_values=torch.ones(1, 3, 64, 96)).logits.norm().item()
    assert float(printed.split()[-1]) == pytest.approx(expected, rel=1e-4)


def test_integrations_refuse_a_model_that_does_not_sample(kernel):
    with pytest.raises(ValueError, match="model is a Linear, in which no module samples"):
        with kernel.integrations.use_in_transformers(nn.Linear(2, 2)):
            pass


def test_integrations_refuse_a_function_with_other_arguments(kernel, monkeypatch):
    spec, model = small_model("rt_detr_v2")
    file = sys.modules[type(model).__module__]

    def other(value, sizes):
        raise AssertionError

    other.__module__ = file.__name__
    monkeypatch.setattr(file, "multi_scale_deformable_attention_v2", other)
    with pytest.raises(
        ValueError, match=r"other takes \(value, sizes\), expected \(value, value_sp"
    ):
        with kernel.integrations.use_in_transformers(model):
            pass


@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_multi_scale_deformable_attention_v2(kernel, device, dtype, method):
    """transformers' own function, on random inputs, forward and backward."""
    transformers_that_uses_kernels()
    from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
        multi_scale_deformable_attention_v2,
    )

    case = Case("v2", ((20, 27), (10, 14), (5, 7)), queries=50, heads=8, channels=32,
                points_per_level=(3, 6, 3))  # fmt: skip
    if method == "discrete":
        case = replace(case, method="nearest", locations="far")
    inputs = make_inputs(case, dtype, device).require_grad()
    value, _, _, locations, weights = inputs.args
    expected = multi_scale_deformable_attention_v2(
        value, list(case.shapes), locations, weights, [3, 6, 3], method
    )
    output = kernel.ms_deform_attn(*inputs.args, **inputs.options)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(output.detach(), expected.detach().double()) < limit
    tensors = [value, weights] if method == "discrete" else [value, locations, weights]
    expected = torch.autograd.grad(expected, tensors, inputs.grad_output)
    grads = torch.autograd.grad(output, tensors, inputs.grad_output)
    for grad, wanted in zip(grads, expected):
        assert relative_error(grad, wanted.double()) < 100 * limit
