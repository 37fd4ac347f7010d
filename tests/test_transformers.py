"""The layer alone, and this kernel inside real models of transformers."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import kernels
import pytest
import torch
from cases import HALF_DTYPES, SMALL, Case, make_inputs, relative_error
from conftest import KERNEL
from models import MODELS, build, inputs_of, run
from packaging.version import Version
from torch import nn

LAYER = "MultiScaleDeformableAttention"


def test_layer_is_what_kernels_accepts(kernel):
    layer = getattr(kernel.layers, LAYER)
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
    """transformers, or skip: each release of it goes with one range of kernels."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")  # the loss of its detectors needs it
    version = transformers.__version__
    if Version(version) < Version("5.22") or Version(version) >= Version("5.23"):
        pytest.skip(f"transformers {version} ignores kernels {kernels.__version__}; 5.22 uses it")
    return transformers


def kernelize(model, device, mode):
    repository = kernels.LocalLayerRepository(Path(KERNEL.__file__).parent.parent, layer_name=LAYER)
    with kernels.use_kernel_mapping({LAYER: {device: repository}}, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device=device)


@contextmanager
def on_this_kernel(kernel, spec, model, device, training, steps=1):
    """The model on this kernel; what samples is checked to be replaced, and to have run."""
    calls = []
    if spec.by == "layer":
        kernelize(model, device, kernels.Mode.TRAINING if training else kernels.Mode.INFERENCE)
        layers = [module for module in model.modules() if type(module).__name__ == LAYER]
        for layer in layers:
            function = layer.forward.__func__
            assert "transformers" not in function.__module__, "the layer was not replaced"
            layer.register_forward_hook(lambda *_: calls.append(1))
        yield
    else:
        function = kernel.integrations.ms_deform_attn

        def counted(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel.integrations, "ms_deform_attn", counted)
            with kernel.integrations.use_in_transformers(model):
                yield
    assert len(calls) == steps * spec.attentions, "each attention samples once a step"


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
@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_model(kernel, device, spec, training):
    """In float64, where neither the choice of proposals nor a pixel is up to rounding."""
    transformers = transformers_that_uses_kernels()
    with default_dtype(torch.float64):
        eager = run(spec, build(spec, transformers, device), device, training)
        model = build(spec, transformers, device).train(training)
        with on_this_kernel(kernel, spec, model, device, training):
            ours = run(spec, model, device, training)
    if training:
        learned = "sampling_offsets" if "discrete" not in spec.name else "attention_weights"
        assert any(learned in name and grad.any() for name, grad in ours.items())
    total = sum(x.norm() for name, x in eager.items() if name.startswith("gradient"))
    for name in {**eager, **ours}:
        # Where eager's sampling is not differentiable it gives None, for our zeros.
        expected = eager.get(name, torch.zeros_like(ours[name]))
        error = (ours[name] - expected).norm()
        limit = 1e-5 * total if name.startswith("gradient") else 1e-7 * expected.norm()
        assert error <= limit, f"{name} is off by {error:.1e}, limit {limit:.1e}"


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["deformable_detr", "mask2former"])
def test_training_under_autocast(kernel, device, name, dtype):
    """Six steps with a gradient scaler: the loss follows that of float32."""
    transformers = transformers_that_uses_kernels()
    spec = next(spec for spec in MODELS if spec.name == name)

    def train(enabled):
        model = build(spec, transformers, device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        scaler = torch.amp.GradScaler(device, enabled=enabled, init_scale=2.0**10)
        losses = []
        with on_this_kernel(kernel, spec, model, device, training=True, steps=6):
            for _ in range(6):
                torch.manual_seed(2)
                with torch.autocast(device, dtype, enabled=enabled):
                    loss = model(**inputs_of(spec, device, training=True)).loss
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
        assert scaler.get_scale() >= 2.0**10 or not enabled, "no step was skipped"
        return torch.tensor(losses)

    expected, losses = train(False), train(True)
    assert expected[-1] < 0.99 * expected[0], "it learns"
    assert ((losses - expected).abs() <= 0.05 * expected).all()


# ------------------------------------------------------------------------------------ integrations


def test_integrations_restore_what_they_replace(kernel):
    transformers = transformers_that_uses_kernels()
    from transformers.models.d_fine import modeling_d_fine as module

    spec = next(spec for spec in MODELS if spec.name == "d_fine")
    model = build(spec, transformers, "cpu")
    original = module.multi_scale_deformable_attention_v2
    kept = [m for m in model.modules() if hasattr(m, "ms_deformable_attn_core")]
    for error in (None, RuntimeError("inside")):
        try:
            with kernel.integrations.use_in_transformers(model) as entered:
                assert entered is model
                assert module.multi_scale_deformable_attention_v2 is not original
                assert all(m.ms_deformable_attn_core is not original for m in kept)
                if error:
                    raise error
        except RuntimeError as raised:
            assert raised is error
        assert module.multi_scale_deformable_attention_v2 is original
        assert all(m.ms_deformable_attn_core is original for m in kept)


def test_integrations_refuse_a_model_without_a_sampling_function(kernel):
    with pytest.raises(ValueError, match="model is a Linear, in which no module samples"):
        with kernel.integrations.use_in_transformers(nn.Linear(2, 2)):
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
