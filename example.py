"""Runs the examples of README.md and CARD.md, word for word, on small random inputs.

    python example.py                    # the published kernel
    LOCAL_KERNELS="org/deformable-detr=/path/to/checkout" python example.py

On the GPU where there is one. What needs a package that is missing is skipped, and said to be.
"""

import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
# What an example needs beside torch and kernels, by a name that its code has.
NEEDS = {"model": "transformers", "torch.onnx": "onnxscript"}


def examples(file: str):
    """The Python examples of a page, with kernel-builder's variables filled in."""
    config = (ROOT / "build.toml").read_text(encoding="utf-8")
    text = (ROOT / file).read_text(encoding="utf-8")
    for variable, key in (("repo_id", "repo-id"), ("version", "version")):
        value = re.search(rf'^{key} = "?([^"\n]+)', config, re.M)[1]
        text = text.replace("{{ " + variable + " }}", value)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def tensors(device: str) -> dict:
    """By the names that the examples give them."""
    batch, queries, heads, channels, points = 2, 10, 8, 32, 4
    spatial_shapes = torch.tensor([[16, 24], [8, 12], [4, 6]])
    pixels = spatial_shapes.prod(1)
    sampled = (batch, queries, heads, len(pixels), points)
    logits = torch.randn(sampled)
    made = {
        "value": torch.randn(batch, int(pixels.sum()), heads, channels),
        "spatial_shapes": spatial_shapes,
        "level_start_index": pixels.cumsum(0) - pixels,
        "sampling_locations": torch.rand(*sampled, 2),
        "attention_weights": logits.flatten(3).softmax(-1).view(sampled),
        "reference_points": torch.rand(batch, queries, len(pixels), 2),
        "sampling_offsets": torch.randn(*sampled, 2),
        "attention_logits": logits,
        "pixel_values": torch.rand(2, 3, 64, 96),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def small_model(device: str) -> torch.nn.Module:
    """A model of transformers with random weights."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32],
                "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
    config = DeformableDetrConfig(
        backbone_config=backbone, d_model=64, encoder_layers=1, decoder_layers=2, num_queries=20
    )
    return DeformableDetrForObjectDetection(config).eval().to(device)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = tensors(device)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # an example saves a file
        for file in ("README.md", "CARD.md"):
            scope = dict(names, inputs={"pixel_values": names["pixel_values"]})
            for number, code in enumerate(examples(file), 1):
                uses = [package for word, package in NEEDS.items() if word in code]
                missing = [package for package in uses if find_spec(package) is None]
                if missing:
                    print(f"{file}, example {number}: skipped, {', '.join(missing)} is not there")
                    continue
                if "transformers" in uses and "model" not in scope:
                    scope["model"] = small_model(device)
                exec(compile(code, f"{file}, example {number}", "exec"), scope)
                shape = f", output {tuple(scope['output'].shape)}" if "output" in code else ""
                print(f"{file}, example {number}: ran on {device}{shape}")
        os.chdir(here)


if __name__ == "__main__":
    main()
