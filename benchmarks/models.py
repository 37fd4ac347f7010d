"""``python -m benchmarks models``: whole models of transformers, as they are and on this kernel.

A case's implementations are all built first; then they take turns step by step, each round in
another order, in one process, so that all share what a machine does beside, its clocks and its
memory. ``ratio`` is what that is for: the time of an implementation's baseline (transformers
without this kernel, compiled if it is) over its own, round by round, and its quartiles.

A record has the fields of the suite's (see suite.py): ``lat_ms`` is the wall time of a whole
forward or training step (forward, loss, backward, optimizer); ``peak_bytes`` all that model and
step had allocated on the GPU; ``corr`` the sampling operator's errors against float64 inside the
model, and ``not_finite`` names results with a NaN: those make a model wrong. There is a time only
if the operator ran as often as the model has attentions, on the implementation named.

Configurations are transformers' defaults, weights are random: no network is needed. Batch norms are
given the statistics of a first image, without which half types overflow; sampling offsets are
spread by about a pixel, as in the suite's workloads. transformers freezes a ResNet that is not
timm's. On a CPU float16 takes minutes a step without instructions for it.
"""

import copy
import importlib.metadata
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce
from itertools import product
from unittest import mock

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from . import environment
from .benchmark import of_queries
from .checks import TOLERANCES, Verdict, distance
from .implementations import FUSED, KERNEL
from .operators import get_project_kernel
from .records import Results, add_names, add_number, add_run, command, failed, recorder
from .render import build_table
from .suite import DTYPES, free_memory
from .timing import Effort, summarize, timed_call

LAYER = "MultiScaleDeformableAttention"
KEPT_AS = "ms_deformable_attn_core"  # an attribute in which instances keep a function
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
    function: str | None = None  # where it samples, if not in the layer that kernelize replaces
    masks: bool = False  # its labels have masks instead of boxes


_STAGES = {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}
_80, _91 = {"num_labels": 80}, {"num_labels": 91}
_DETR = ("DeformableDetrConfig", "DeformableDetrForObjectDetection")
_MASK2FORMER = ("Mask2FormerConfig", "Mask2FormerForUniversalSegmentation")
_FUNCTION = "multi_scale_deformable_attention"
MODELS = {
    "deformable_detr": Model(*_DETR, _91 | {"backbone_config": _STAGES}, (800, 1333), 12),
    "rt_detr": Model("RTDetrConfig", "RTDetrForObjectDetection", _80),
    "mask2former": Model(*_MASK2FORMER, _80, (1024, 1024), function=_FUNCTION, masks=True),
    "d_fine": Model(
        *("DFineConfig", "DFineForObjectDetection", _80 | {"decoder_n_points": [3, 6, 3]}),
        function=f"{_FUNCTION}_v2",
    ),
    "rf_detr": Model("RfDetrConfig", "RfDetrForObjectDetection", _91, (560, 560), 3),
}


@dataclass(frozen=True)
class Implementation:
    operator: str  # EAGER is transformers'; FUSED takes the place of the attention as a whole
    compiled: bool  # in inference with CUDA graphs, as mode "reduce-overhead" does

    @property
    def ours(self) -> bool:
        return self.operator != EAGER

    @property
    def tags(self) -> dict[str, str]:
        backend = "compiled" if self.compiled else "native" if self.ours else "eager"
        return {"family": "hf-kernels" if self.ours else "transformers", "backend": backend}

    @property
    def baseline(self) -> str:
        """What its speed-up is over."""
        return f"{EAGER}_compiled" if self.compiled and self.ours else EAGER


EAGER = "eager"
IMPLEMENTATIONS = {
    f"{operator}{'_compiled' * compiled}": Implementation(operator, compiled)
    for compiled in (False, True)
    for operator in (EAGER, FUSED, KERNEL)
}


@dataclass(frozen=True)
class Case:
    """What a record is of, beside the implementation."""

    model: str
    batch: int
    dtype: str  # a name of suite.DTYPES; training keeps its weights in float32, under autocast
    mode: str

    def as_workload(self) -> dict:
        """The record's ``wl``, with the names that records of the suite have for the same."""
        name = f"{self.model}_b{self.batch}"
        return {"name": name, "dtype": self.dtype, "pass": self.mode}


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
    if norms:
        with torch.no_grad():
            model(torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(2)))
    for hook in hooks:
        hook.remove()
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
    inputs["labels"] = [{"class_labels": x, "boxes": box} for x, box in zip(classes, boxes)]
    return inputs


def make_step(case: Case, forward: Callable, model: nn.Module, inputs: dict) -> Callable:
    """A function that does what is timed, and returns the model's outputs.

    Args:
        forward: the model, or what it is compiled to.
    """
    device_type = inputs["pixel_values"].device.type
    if case.mode == "inference":

        @torch.inference_mode()
        def infer():
            return forward(**inputs)

        return infer

    dtype, master_dtype = DTYPES[case.dtype]
    autocast = dtype != master_dtype
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
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


class Compiler:
    """What ``torch.compile(model, backend=Compiler(…))`` compiles with, and the calls it finds.

    Dynamo takes no code that another backend compiled: with a backend for each, implementations of
    one model do not get each other's.

    graphs: whether it makes CUDA graphs, as mode "reduce-overhead" does. Training steps do without:
    torch 2.11 refuses them for these models, with this kernel or not ("These storage data ptrs are
    not allocated in pool").
    """

    def __init__(self, graphs: bool):
        self.graphs = graphs
        self.calls = 0  # of this project's operators, in what has been compiled

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.calls += sum(KERNEL in str(node.target) for node in graph.graph.nodes)
        return torch._inductor.compile(graph, inputs, {"triton.cudagraphs": self.graphs})


def place(implementation: Implementation, model: nn.Module) -> Callable[[], AbstractContextManager]:
    """The contexts in which the model runs on an implementation's operator."""
    if not implementation.ours:
        return nullcontext
    in_use = get_project_kernel().integrations.use_in_transformers
    return partial(in_use, model, fuse=implementation.operator == FUSED)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == LAYER]


class Observer:
    """Compares every call of the sampling operator in a model with float64."""

    def __init__(self):
        self.verdicts: list[Verdict] = []  # of the calls

    @contextmanager
    def watch(self, case: Case, model: nn.Module, fused: bool) -> Iterator[None]:
        """Enter it on the implementation to be watched."""
        function = MODELS[case.model].function
        with ExitStack() as stack:
            if fused:
                kernel, name = get_project_kernel(), "fused_ms_deform_attn"
                compare = partial(self._compare, kernel.reference.fused_ms_deform_attn)
                stack.enter_context(_observed(kernel.modules, name, compare))
            elif function is None:
                for layer in _layers(model):
                    stack.callback(layer.register_forward_hook(self._after_layer).remove)
            else:
                keepers = [module for module in model.modules() if KEPT_AS in vars(module)]
                for owner in keepers or [sys.modules[type(model).__module__]]:
                    name = KEPT_AS if keepers else function
                    stack.enter_context(_observed(owner, name, self._after_function))
            yield

    def _after_layer(self, layer: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        value, shapes, _, starts, *sampled, _ = arguments
        self._compare_plain(output, value, shapes, starts, *sampled)

    def _after_function(self, output, value, shapes, locations, weights, points=None, method=None):
        sizes = torch.as_tensor(shapes, device=value.device)
        starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
        options = {} if points is None else {"points_per_level": list(points)}
        if method not in (None, "default"):
            raise ValueError(f"method is {method}, expected default, which is bilinear")
        self._compare_plain(output, value, sizes, starts, locations, weights, **options)

    def _compare_plain(self, *arguments, **options) -> None:
        self._compare(get_project_kernel().reference.ms_deform_attn, *arguments, **options)

    @torch.no_grad()
    def _compare(self, reference: Callable, output: torch.Tensor, *arguments, **options) -> None:
        """``arguments``: value, shapes and starts, and then tensors with queries."""
        tolerance = TOLERANCES[arguments[0].dtype]
        count = output.shape[1]
        some = torch.linspace(0, count - 1, min(count, CHECKED_QUERIES), device=output.device)
        some = some.round().long()
        arguments = of_queries(arguments, some)
        doubled = [x.double() if x.is_floating_point() else x for x in arguments]
        error, absmax = distance(output[:, some], reference(*doubled, **options))
        verdict = Verdict({"operator": error}, {"operator": tolerance}, absmax, len(some))
        self.verdicts.append(verdict)


def _observed(owner, name: str, observe: Callable) -> AbstractContextManager:
    """``observe(output, *arguments)`` after each call of a function that ``owner`` holds."""
    function = getattr(owner, name)

    def observed(*arguments, **options):
        output = function(*arguments, **options)
        observe(output, *arguments, **options)
        return output

    return mock.patch.object(owner, name, observed)


def not_finite(model: nn.Module, outputs) -> list[str]:
    """The names of results, and of parameters after a step of training, with a NaN or an inf."""
    tensors = [(name, outputs[name]) for name in _RESULTS if outputs.get(name) is not None]
    tensors += model.named_parameters()
    return [name for name, tensor in tensors if not tensor.isfinite().all()]


# Not all outputs: RT-DETR marks invalid anchors by the largest number, and computes with it.
_RESULTS = ("loss", "logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")


class Subject:
    """A model on one implementation, checked and warm: its steps are what is timed."""

    def __init__(self, case: Case, implementation: Implementation, device: torch.device):
        on_gpu = device.type == "cuda"
        allocated = torch.cuda.memory_allocated(device) if on_gpu else 0
        self.device = device
        model = build(case, device)
        inputs = make_inputs(case, device)
        self._context = place(implementation, model)
        self._compiled = implementation.compiled
        self._step = make_step(case, model, model, inputs)
        observer = Observer()
        with self._context(), observer.watch(case, model, implementation.operator == FUSED):
            for layer in _layers(model) if implementation.operator == KERNEL else ():
                if "transformers." in layer.forward.__module__:
                    raise RuntimeError(f"{case.model} keeps transformers' layer")
            self._step()
        calls, expected = len(observer.verdicts), MODELS[case.model].attentions
        if calls != expected:
            raise RuntimeError(f"the operator was called {calls} times, expected {expected}")
        if implementation.compiled:
            compiler = Compiler(graphs=case.mode == "inference")
            # Implementations and what follows breaks of a graph share a limit.
            torch._dynamo.config.recompile_limit = 64
            forward = torch.compile(model, backend=compiler, dynamic=False)
            self._step = make_step(case, forward, model, inputs)
        with self._context():
            outputs, self.first_ms = timed_call(self._step, device)
        worst = reduce(Verdict.worse, observer.verdicts)
        self.verdict = replace(worst, not_finite=not_finite(model, outputs))
        del outputs
        if implementation.compiled and bool(compiler.calls) != implementation.ours:
            raise RuntimeError(f"{compiler.calls} calls of {KERNEL} were compiled")
        self.warmup = 4 if on_gpu else 2
        if on_gpu:
            for _ in range(2):  # CUDA graphs are recorded at the second call
                self.time()
            torch.cuda.reset_peak_memory_stats(device)
            self.time()
        self.peak_bytes = torch.cuda.max_memory_allocated(device) - allocated if on_gpu else None

    def time(self) -> float:
        """The milliseconds of a step.

        What was compiled is called twice before: torch checks all its guards once more where the
        context has just put attentions in place, which takes 1 to 2 ms and no user's call.
        """
        with self._context():
            for _ in range(2 if self._compiled else 0):
                self._step()
            return timed_call(self._step, self.device)[1]


def measure(case: Case, names: list[str], device: torch.device, effort: Effort) -> dict[str, dict]:
    """The results of a case's implementations, which take turns."""
    subjects: dict[str, Subject] = {}
    results: dict[str, dict] = {}

    def fail(name: str, error: Exception) -> None:
        traceback.clear_frames(error.__traceback__)
        subjects.pop(name, None)
        results[name] = {**failed(error), "images_per_s": None, "ratio": None}
        free_memory()

    torch.compiler.reset()
    for name in names:
        try:
            subjects[name] = Subject(case, IMPLEMENTATIONS[name], device)
        except Exception as error:
            fail(name, error)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    while subjects and not all(effort.enough(times[name]) for name in subjects):
        for name in order:
            try:
                times[name].append(subjects[name].time())
            except Exception as error:
                fail(name, error)
        order = [name for name in [*order[1:], order[0]] if name in subjects]
    for name, subject in subjects.items():
        lat_ms = summarize(times[name], warmup=subject.warmup)
        results[name] = {
            "lat_ms": lat_ms,
            "images_per_s": 1e3 * case.batch / lat_ms["p50"],
            "ratio": _ratio(name, {name: times[name] for name in subjects}),
            "compile_ms": subject.first_ms,
            "peak_bytes": subject.peak_bytes,
            **subject.verdict.as_results(),
        }
    return results


def _ratio(name: str, times: dict[str, list[float]]) -> dict | None:
    """The baseline's time over this one's, round by round: quartiles."""
    baseline = IMPLEMENTATIONS[name].baseline
    if baseline not in times or baseline == name:
        return None
    ratios = [slow / fast for slow, fast in zip(times[baseline], times[name])]
    p25, p50, p75 = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {"to": baseline, "p25": p25, "p50": p50, "p75": p75, "rounds": len(ratios)}


def run(
    cases: list[Case], names: list[str], device: torch.device, effort: Effort, results: Results
) -> Iterator[dict]:
    """Yields a record for every implementation of the cases that ``results`` does not have yet."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "kernels")}
    env = {**environment.describe(device), **versions}
    record = recorder(env)
    for case in (progress := tqdm(cases, unit="case", dynamic_ncols=True)):
        wl = case.as_workload()
        progress.set_description(f"{wl['name']} {case.dtype} {case.mode}")
        if all(results.has(name, wl, env) for name in names):
            continue
        figures = measure(case, names, device, effort)
        free_memory()
        for name in names:
            yield record(name, IMPLEMENTATIONS[name].tags, wl, figures[name])


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; the exit status is 1 if a model on this project's kernel failed."""
    parser = command("models", __doc__)
    on_gpu = torch.cuda.is_available()
    add_names(parser, "--models", MODELS, ["deformable_detr", "rt_detr", "mask2former"])
    add_names(parser, "--impls", IMPLEMENTATIONS, [EAGER, FUSED])
    add_names(parser, "--dtypes", MODEL_DTYPES, MODEL_DTYPES if on_gpu else ["float32"])
    add_names(parser, "--modes", MODES, ["inference"])
    add_number(parser, "--batches", "images in a step", nargs="+", default=[1])
    add_run(parser, "rounds of steps; default: of 2 seconds each row")
    options = parser.parse_args(arguments)
    results = Results(options, "-models")
    cases = [
        # Half types train under autocast.
        Case(m, batch, f"{d}_autocast" if mode == "training" and d != "float32" else d, mode)
        for m, batch, mode, d in product(
            options.models, options.batches, options.modes, options.dtypes
        )
    ]
    effort = Effort(options.reps, budget_ms=2000, min_reps=10 if on_gpu else 3, max_reps=30)
    records = run(cases, options.impls, options.device, effort, results)
    return results.collect(records, build_table)
