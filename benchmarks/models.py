"""``python -m benchmarks models``: whole models of transformers, as they are and on this kernel.

A record is one model, batch size, dtype and mode under one implementation, in the fields of the
suite's (see suite.py): ``lat_ms`` is the wall time of a whole forward, or of a whole training step
(forward, loss, backward, optimizer), waited for; ``peak_bytes`` all memory that the process had
allocated on the GPU at its peak; ``corr`` holds the sampling operator's relative errors against
float64 inside the model, on the model's own inputs, and ``not_finite`` names results with a NaN. A
record has a time only if the operator ran as often as the model has attentions, through the
implementation named. A model whose results are not finite, as half types may have it, is recorded
as wrong; where its loss refuses them, as failed, with what that said. On a CPU half types are
measured if --dtypes asks for them: float16 takes minutes a step without instructions for it.

Configurations are transformers' own defaults, weights are random: no network is needed. Batch
norms are given the statistics of a first image, without which half types overflow; sampling
offsets are spread by about a pixel, as in the suite's workloads. transformers' Deformable DETR
freezes a ResNet that is not timm's; deformable_detr_whole trains its last three stages, as the
paper does.
"""

import argparse
import copy
import gc
import importlib.metadata
import logging
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

import torch
from kernels import LayerRepository, Mode, kernelize, use_kernel_mapping
from torch import nn
from tqdm import tqdm

from . import environment
from .benchmark import Inputs
from .checks import TOLERANCES, load_reference
from .implementations import KERNEL, REPOSITORY, ROOT, get_project_kernel
from .peers import COMMUNITY
from .records import Results, failed
from .suite import DTYPES
from .table import build_models_table
from .timing import Effort, summarize, time_latency, timed_call
from .workloads import select

LAYER = "MultiScaleDeformableAttention"
FUNCTION = "multi_scale_deformable_attention"  # where a model has no layer
MODES = ("inference", "training")
MODEL_DTYPES = [name for name in DTYPES if name in ("float32", "float16", "bfloat16")]
BOXES = 8  # objects in each training image
CHECKED_QUERIES = 256  # of each call of the operator


@dataclass(frozen=True)
class Model:
    """How to build a model of transformers, and the images it is given."""

    config: str
    model: str
    settings: dict = field(default_factory=dict)
    image: tuple[int, int] = (640, 640)  # (height, width), pixels
    attentions: int = 6  # modules that sample, once a forward
    masks: bool = False  # its labels have masks instead of boxes
    train_backbone: bool = False  # all but the ResNet's stem and first stage

    @property
    def has_layer(self) -> bool:
        """Whether it samples in the layer that kernelize replaces, or in a function."""
        return not self.masks


_DEFORMABLE_DETR = {
    "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]},
    "num_labels": 91,
}
MODELS = {
    "deformable_detr": Model(
        "DeformableDetrConfig",
        "DeformableDetrForObjectDetection",
        _DEFORMABLE_DETR,
        image=(800, 1333),
        attentions=12,
    ),
    "rt_detr": Model("RTDetrConfig", "RTDetrForObjectDetection", {"num_labels": 80}),
    "mask2former": Model(
        "Mask2FormerConfig",
        "Mask2FormerForUniversalSegmentation",
        {"num_labels": 80},
        image=(1024, 1024),
        masks=True,
    ),
    "deformable_detr_whole": Model(
        "DeformableDetrConfig",
        "DeformableDetrForObjectDetection",
        _DEFORMABLE_DETR,
        image=(800, 1333),
        attentions=12,
        train_backbone=True,
    ),
}


@dataclass(frozen=True)
class Implementation:
    tags: dict[str, str]
    repository: str | None = None  # whose layer or function takes the place of transformers'
    compiled: bool = False  # torch.compile(mode="reduce-overhead"): CUDA graphs where there is CUDA


EAGER = "eager"
IMPLEMENTATIONS = {
    EAGER: Implementation({"family": "transformers", "backend": "eager"}),
    KERNEL: Implementation({"family": "hf-kernels", "backend": "native"}, REPOSITORY),
    f"{KERNEL}_compiled": Implementation(
        {"family": "hf-kernels", "backend": "compiled"}, REPOSITORY, compiled=True
    ),
    "eager_compiled": Implementation(
        {"family": "transformers", "backend": "compiled"}, compiled=True
    ),
    "kernels_community": Implementation({"family": "hf-kernels", "backend": "native"}, COMMUNITY),
}

OURS = [name for name, item in IMPLEMENTATIONS.items() if item.repository == REPOSITORY]


@dataclass(frozen=True)
class Case:
    """What a record is of, beside the implementation."""

    model: str
    batch: int
    dtype: str  # a name of suite.DTYPES; training keeps its weights in float32, under autocast
    mode: str

    def as_workload(self) -> dict:
        """The record's ``wl``, with the names that records of the suite have for the same."""
        height, width = MODELS[self.model].image
        return {
            "name": f"{self.model}_b{self.batch}",
            "model": self.model,
            "batch": self.batch,
            "image": [height, width],
            "dtype": self.dtype,
            "pass": self.mode,
        }


# ----------------------------------------------------------------------------------------- building


@cache
def _pretrained(name: str) -> nn.Module:
    """The model with random weights, in float32 on the CPU; to be copied, not used."""
    import transformers

    spec = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, spec.config)(**spec.settings)
    model = getattr(transformers, spec.model)(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sampling_offsets.weight"):
            # Of normalised features: about N(0, 1) pixels.
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    norms = [m for m in model.modules() if "BatchNorm2d" in type(m).__name__]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    with torch.no_grad():
        model(torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(2)))
    for hook in hooks:
        hook.remove()
    if spec.train_backbone:
        for parameter_name, parameter in model.named_parameters():
            if any(f"encoder.stages.{stage}." in parameter_name for stage in (1, 2, 3)):
                parameter.requires_grad_(True)
    return model


def _take_statistics(norm: nn.Module, arguments: tuple[torch.Tensor]) -> None:
    variance, mean = torch.var_mean(arguments[0], (0, 2, 3))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def build(case: Case, device: torch.device) -> nn.Module:
    """The case's model on its device, not kernelized yet."""
    model = copy.deepcopy(_pretrained(case.model)).to(device)
    if case.mode == "training":
        return model.train()
    return model.to(DTYPES[case.dtype][0])


def make_inputs(case: Case, device: torch.device) -> dict:
    """Keyword arguments: N(0, 1) images, as normalised photographs, and labels to train with."""
    spec = MODELS[case.model]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, *spec.image, generator=generator)
    dtype = torch.float32 if case.mode == "training" else DTYPES[case.dtype][0]
    inputs = {"pixel_values": images.to(device, dtype)}
    if case.mode == "inference":
        return inputs
    classes = torch.randint(80, (case.batch, BOXES), generator=generator).to(device)
    if spec.masks:
        masks = torch.rand(case.batch, BOXES, *spec.image, generator=generator) > 0.5
        inputs["mask_labels"] = list(masks.to(device, torch.float32))
        inputs["class_labels"] = list(classes)
        return inputs
    centres = 0.2 + 0.6 * torch.rand(case.batch, BOXES, 2, generator=generator)
    sizes = 0.05 + 0.3 * torch.rand(case.batch, BOXES, 2, generator=generator)
    boxes = torch.cat((centres, sizes), -1).to(device)
    inputs["labels"] = [
        {"class_labels": labels, "boxes": box} for labels, box in zip(classes, boxes)
    ]
    return inputs


def make_step(case: Case, model: nn.Module, inputs: dict, compiled: bool) -> Callable[[], object]:
    """A function that does what is timed, and returns the model's outputs."""
    device_type = inputs["pixel_values"].device.type
    forward = model
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(model, mode="reduce-overhead", dynamic=False)
    if case.mode == "inference":

        @torch.inference_mode()
        def infer():
            return forward(**inputs)

        return infer

    dtype, master_dtype = DTYPES[case.dtype]
    autocast = dtype != master_dtype
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5
    )
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)

    def train():
        with torch.autocast(device_type, dtype, enabled=autocast):
            outputs = forward(**inputs)
        scaler.scale(outputs.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return outputs

    return train


@contextmanager
def on_implementation(
    implementation: Implementation, case: Case, model: nn.Module, device: torch.device
) -> Iterator[None]:
    """The model on an implementation's operator.

    Raises:
        RuntimeError: transformers' own is still in its place.
        ValueError: the repository has none for this model.
    """
    spec, repository = MODELS[case.model], implementation.repository
    if repository is None:
        yield
        return
    if not spec.has_layer:
        if repository != REPOSITORY:
            raise ValueError(f"{repository} has a layer only, expected a function for {case.model}")
        with get_project_kernel().integrations.use_in_transformers(model, fuse=False):
            yield
        return
    os.environ.setdefault("LOCAL_KERNELS", f"{REPOSITORY}={ROOT}")
    layer = LayerRepository(repository, layer_name=LAYER, revision="v1", trust_remote_code=True)
    mode = Mode.TRAINING if case.mode == "training" else Mode.INFERENCE
    if implementation.compiled:
        mode |= Mode.TORCH_COMPILE
    # It warns of each activation that it has no kernel for.
    logging.getLogger("kernels.layer").setLevel(logging.ERROR)
    with use_kernel_mapping({LAYER: {device.type: layer}}, inherit_mapping=False):
        kernelize(model, mode=mode, device=device.type)
    for module in _layers(model):
        if "transformers" in module.forward.__func__.__module__:
            raise RuntimeError(f"{case.model} keeps transformers' layer, expected {repository}'s")
    yield


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == LAYER]


# ----------------------------------------------------------------------------------------- checking


class Observer:
    """Compares every call of the sampling operator in a model with float64."""

    def __init__(self):
        self.calls = 0
        self.error = 0.0  # the largest of all calls
        self.tolerance = 0.0
        self._reference = load_reference()

    @contextmanager
    def watch(self, case: Case, model: nn.Module) -> Iterator[None]:
        """Enter it on the implementation to be watched."""
        with ExitStack() as stack:
            if MODELS[case.model].has_layer:
                for layer in _layers(model):
                    hook = layer.register_forward_hook(self._after_layer)
                    stack.callback(hook.remove)
            else:
                stack.enter_context(self._around_function(sys.modules[type(model).__module__]))
            yield

    def _after_layer(self, layer: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        value, shapes, _, starts, locations, weights, _ = arguments
        self._compare(Inputs(value, shapes, starts, locations, weights), output)

    @contextmanager
    def _around_function(self, module) -> Iterator[None]:
        function = getattr(module, FUNCTION)

        def observed(value, shapes, locations, weights):
            output = function(value, shapes, locations, weights)
            sizes = torch.as_tensor(shapes, device=value.device)
            starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
            self._compare(Inputs(value, sizes, starts, locations, weights), output)
            return output

        setattr(module, FUNCTION, observed)
        try:
            yield
        finally:
            setattr(module, FUNCTION, function)

    @torch.no_grad()
    def _compare(self, inputs: Inputs, output: torch.Tensor) -> None:
        self.calls += 1
        self.tolerance = max(self.tolerance, TOLERANCES[inputs.value.dtype])
        count = output.shape[1]
        some = torch.linspace(0, count - 1, min(count, CHECKED_QUERIES), device=output.device)
        some = some.round().long()
        inputs = inputs.at(some)
        doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
        expected = self._reference(*doubled)
        error = float((output[:, some].double() - expected).norm() / expected.norm())
        # Written so that a NaN stays.
        self.error = error if not error <= self.error else self.error

    def as_record(self) -> dict:
        """The ``corr`` field of a record."""
        return {
            "ok": self.error <= self.tolerance,
            "ref": "float64",
            "queries": CHECKED_QUERIES,
            "calls": self.calls,
            "error": {"operator": self.error},
            "tolerance": {"operator": self.tolerance},
        }


def not_finite(model: nn.Module, outputs) -> list[str]:
    """The names of results, and of parameters after a step of training, with a NaN or an inf."""
    tensors = [(name, outputs[name]) for name in _RESULTS if outputs.get(name) is not None]
    tensors += model.named_parameters()
    return [name for name, tensor in tensors if not tensor.isfinite().all()]


# Not all outputs: RT-DETR marks invalid anchors by the largest number, and computes with it.
_RESULTS = ("loss", "logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")


# ---------------------------------------------------------------------------------------- measuring


def measure(case: Case, implementation: Implementation, device: torch.device, effort: Effort):
    """A record's results."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    model = build(case, device)
    inputs = make_inputs(case, device)
    with on_implementation(implementation, case, model, device):
        observer = Observer()
        with observer.watch(case, model):
            make_step(case, model, inputs, compiled=False)()
        if observer.calls != MODELS[case.model].attentions:
            raise RuntimeError(
                f"the operator was called {observer.calls} times, expected "
                f"{MODELS[case.model].attentions}"
            )
        step = make_step(case, model, inputs, implementation.compiled)
        outputs, first_ms = timed_call(step, device)
        wrong = not_finite(model, outputs)
        del outputs
        if on_gpu:
            for _ in range(2):  # CUDA graphs are recorded at the second call
                step()
            torch.cuda.reset_peak_memory_stats(device)
            timed_call(step, device)
        peak_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else None
        times = time_latency(step, device, effort)
    lat_ms = summarize(times, warmup=4 if on_gpu else 2)
    corr = observer.as_record() | {"not_finite": wrong}
    corr["ok"] &= not wrong
    return {
        "lat_ms": lat_ms,
        "images_per_s": 1e3 * case.batch / lat_ms["p50"],
        "compile_ms": first_ms,
        "peak_bytes": peak_bytes,
        "ok": corr["ok"],
        "absmax": None,
        "corr": corr,
        "err": None,
    }


def _measure_or_explain(case: Case, name: str, device: torch.device, effort: Effort) -> dict:
    try:
        return measure(case, IMPLEMENTATIONS[name], device, effort)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return {**failed(error), "images_per_s": None}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def describe(device: torch.device) -> dict:
    """The ``env`` field of a record."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "kernels")}
    return {
        **environment.describe(device),
        **versions,
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
        },
    }


def run(
    cases: list[tuple[Case, str]], device: torch.device, effort: Effort, results: Results
) -> Iterator[dict]:
    """Yields a record for every (case, implementation) that ``results`` does not have yet."""
    head = {"run": uuid.uuid4().hex}
    env = describe(device)
    with tqdm(cases, unit="row", dynamic_ncols=True) as progress:
        for case, implementation in progress:
            wl = case.as_workload()
            progress.set_description(f"{wl['name']} {case.dtype} {case.mode}: {implementation}")
            if results.has(implementation, wl, env):
                continue
            figures = _measure_or_explain(case, implementation, device, effort)
            yield {
                "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **head,
                "impl": implementation,
                "tags": IMPLEMENTATIONS[implementation].tags,
                "wl": wl,
                "env": env,
                **figures,
            }


# -------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; the exit status is 1 if a model on this project's kernel failed."""
    parser = argparse.ArgumentParser("python -m benchmarks models", description=__doc__)
    cuda = torch.cuda.is_available()

    def names(option: str, known, default: list[str]):
        parser.add_argument(
            option,
            nargs="+",
            default=default,
            metavar="NAME",
            help=f"names, globs or all; default: {' '.join(default)}; known: {', '.join(known)}",
        )

    names("--models", MODELS, ["deformable_detr", "rt_detr", "mask2former"])
    names("--impls", IMPLEMENTATIONS, [EAGER, KERNEL])
    names("--dtypes", MODEL_DTYPES, MODEL_DTYPES if cuda else ["float32"])
    names("--modes", MODES, ["inference"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--reps", type=int, help="steps per row; default: what fits in 2 seconds")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--resume", action="store_true", help="skip what --out has measured")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        chosen = [
            select(options.models, list(MODELS)),
            select(options.dtypes, MODEL_DTYPES),
            select(options.modes, list(MODES)),
            select(options.impls, list(IMPLEMENTATIONS)),
        ]
        results = Results.open(options.out, "models", device, options.resume)
    except ValueError as error:
        parser.error(str(error))
    models, dtypes, modes, implementations = chosen
    cases = [
        (Case(model, batch, _dtype_of(mode, dtype), mode), implementation)
        for model, batch, mode, dtype, implementation in product(
            models, options.batches, modes, dtypes, implementations
        )
    ]
    effort = Effort(options.reps, budget_ms=2000, min_reps=5 if cuda else 3, max_reps=30)
    return results.collect(
        run(cases, device, effort, results), build_models_table, lambda r: r["impl"] in OURS
    )


def _dtype_of(mode: str, dtype: str) -> str:
    """Half types train under autocast."""
    return f"{dtype}_autocast" if mode == "training" and dtype != "float32" else dtype
