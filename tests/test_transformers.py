"""The layer, alone and in the place of transformers' own inside a real Deformable DETR."""

import importlib.metadata
from pathlib import Path

import kernels
import pytest
import torch
from cases import SMALL, make_inputs, relative_error
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


# -------------------------------------------------------------------------------- Deformable DETR


def transformers_that_uses_kernels():
    """transformers, or skip: each release of it goes with one range of kernels."""
    version = importlib.metadata.version("transformers")
    if Version(version) < Version("5.22") or Version(version) >= Version("5.23"):
        pytest.skip(f"transformers {version} ignores kernels {kernels.__version__}; 5.22 uses it")
    import transformers

    return transformers


def small_model(transformers, device):
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=20,
        num_labels=5,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    model = transformers.DeformableDetrForObjectDetection(config)
    # A fresh model points exactly at pixel centres, where the gradient of the location jumps and
    # eager's rounding decides the side.
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(device)


def image_and_labels(device):
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.rand(2, 3, 96, 128, generator=generator)
    labels = [
        {
            "class_labels": torch.tensor([1, 3], device=device),
            "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.6, 0.1, 0.2]], device=device),
        }
        for _ in range(2)
    ]
    return pixel_values.to(device), labels


def attention_layers(model):
    return [module for module in model.modules() if type(module).__name__ == LAYER]


def kernelize(model, device, mode):
    repository = kernels.LocalLayerRepository(
        Path(__file__).resolve().parent.parent, layer_name=LAYER
    )
    with kernels.use_kernel_mapping({LAYER: {device: repository}}, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device=device)
    replaced = attention_layers(model)
    assert len(replaced) == 4, "two encoder and two decoder layers"
    for layer in replaced:
        function = layer.forward.__func__
        assert "transformers" not in function.__module__, "the layer was not replaced"


def run(model, device, training):
    pixel_values, labels = image_and_labels(device)
    if not training:
        with torch.no_grad():
            output = model(pixel_values=pixel_values)
        return {"logits": output.logits, "boxes": output.pred_boxes}
    model.zero_grad()
    output = model(pixel_values=pixel_values, labels=labels)
    output.loss.backward()
    gradients = {
        f"gradient of {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.norm() > 1e-6
    }
    assert any("sampling_offsets" in name for name in gradients)
    assert any("value_proj" in name for name in gradients)
    return {"loss": output.loss, "logits": output.logits, **gradients}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_deformable_detr(kernel, device, training):
    transformers = transformers_that_uses_kernels()
    model = small_model(transformers, device).train(training)
    eager = run(model, device, training)
    kernelize(model, device, kernels.Mode.TRAINING if training else kernels.Mode.INFERENCE)
    ours = run(model, device, training)
    assert ours.keys() == eager.keys()
    for name, expected in eager.items():
        error = relative_error(ours[name].detach(), expected.detach().double())
        assert error < (2e-3 if name.startswith("gradient") else 1e-4), f"{name}: {error:.1e}"
