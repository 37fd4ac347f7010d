"""Is the answer right? Every result is compared with float64 before its time counts."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property

import torch

from .benchmark import Inputs, Workload, gradients_in_chunks
from .implementations import ROOT
from .operators import Operator, for_points_of

# The relative error (norm of the difference over norm of the float64 result) up to which an answer
# counts as sound. These tell a wrong answer from rounding, of peers too; the project's own, tighter
# bounds are in its tests. For scale: coordinates in plain float32 cost up to 2e-5 on large maps.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 8e-3}
# A location's gradient jumps where it crosses a pixel, and rounding puts a few on the other side,
# where the derivative is as sound.
LOCATION_TOLERANCES = {**TOLERANCES, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 2e-2}

# What a check samples at most on a CPU (in interpolated channels); a GPU checks every query.
CPU_LIMIT = 2**22
CHUNK = 2**25  # what is computed at a time


def load_reference(name: str = "ms_deform_attn"):
    """The package's eager definition of an operator, from its source: no kernel need be built."""
    path = ROOT / "torch-ext" / "deformable_detr" / "reference.py"
    spec = importlib.util.spec_from_file_location("deformable_detr_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@dataclass(frozen=True)
class Verdict:
    """How far the tensors of one answer are from float64."""

    errors: dict[str, float]  # relative, by tensor
    tolerances: dict[str, float]
    absmax: float  # largest absolute difference of all tensors
    queries: int  # how many were checked

    @property
    def ok(self) -> bool:
        # Written so that a NaN is not ok.
        return all(self.errors[name] <= self.tolerances[name] for name in self.errors)

    def worse(self, other: "Verdict") -> "Verdict":
        """Of two answers of the same kind the larger errors; a NaN is larger than any number."""

        def larger(a: float, b: float) -> float:
            return a if a > b or a != a else b

        errors = {name: larger(error, other.errors[name]) for name, error in self.errors.items()}
        absmax = larger(self.absmax, other.absmax)
        return Verdict(errors, self.tolerances, absmax, self.queries)

    def as_record(self) -> dict:
        """The ``corr`` field of a record."""
        return {
            "ok": self.ok,
            "ref": "float64",
            "queries": self.queries,
            "error": self.errors,
            "tolerance": self.tolerances,
        }


class Expected:
    """The float64 results of one workload in one dtype, computed from the stored, rounded inputs.

    Where that would take too long, some queries stand for all, evenly spread over the batch item.
    A check of gradients then calls the backward with a grad_output that is zero for every other
    query, so that grad_value, too, is known.

    Args:
        grad_output: what is timed.
    """

    def __init__(self, workload: Workload, inputs: Inputs, grad_output: torch.Tensor):
        device = inputs.value.device
        count = workload.queries
        if device.type == "cpu":
            count = min(count, max(1, CPU_LIMIT // workload.samples_per_query))
        spread = torch.linspace(0, workload.queries - 1, count, dtype=torch.float64)
        self.queries = spread.round().long().unique().to(device)
        self.grad_output = grad_output
        if count == workload.queries:
            self.checked_grad_output = self.grad_output
        else:
            self.checked_grad_output = torch.zeros_like(self.grad_output)
            self.checked_grad_output[:, self.queries] = self.grad_output[:, self.queries]

        self._reference = for_points_of(workload, load_reference())
        self._inputs = inputs if count == workload.queries else inputs.at(self.queries)
        self._queries_per_chunk = max(1, CHUNK // workload.samples_per_query)

    def _inputs64(self) -> Inputs:
        """Not kept: with several sets of inputs there would be no room for all."""
        value, shapes, starts, locations, weights = self._inputs
        return Inputs(value.double(), shapes, starts, locations.double(), weights.double())

    @cached_property
    def output(self) -> torch.Tensor:
        step = self._queries_per_chunk
        starts = range(0, len(self.queries), step)
        inputs = self._inputs64()
        chunks = [inputs.at(slice(start, start + step)) for start in starts]
        return torch.cat([self._reference(*chunk) for chunk in chunks], dim=1)

    @cached_property
    def gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_output = self.grad_output[:, self.queries].double()
        return gradients_in_chunks(
            self._reference, self._inputs64(), grad_output, self._queries_per_chunk
        )

    def check_output(self, output: torch.Tensor) -> Verdict:
        return self._compare({"output": (output[:, self.queries], self.output)})

    def check_gradients(self, operator: Operator, grads: tuple[torch.Tensor, ...]) -> Verdict:
        """Compares what the operator's backward made of ``checked_grad_output``."""
        grad_value, *grads = operator.gradients(grads)
        expected_value, of_locations, of_weights = self.gradients
        names = ["grad_sampling_locations", "grad_attention_weights", "grad_reference_points"]
        # A reference point moves all locations of its query: those of a (query, head, point).
        expected = [of_locations, of_weights, of_locations.flatten(2, -2).sum(2)[:, :, None]]
        if operator.of_offsets is not None:
            names[0], expected[0] = "grad_sampling_offsets", operator.of_offsets(of_locations)
        if operator.takes_logits:
            names[1], expected[1] = "grad_attention_logits", self._of_logits(of_weights)
        pairs = {"grad_value": (grad_value, expected_value)}
        for name, actual, wanted in zip(names, grads, expected):
            pairs[name] = (actual[:, self.queries], wanted)
        return self._compare(pairs)

    def _of_logits(self, grad_weights: torch.Tensor) -> torch.Tensor:
        """The gradient of the softmax's input, given that of its result."""
        weights = self._inputs.attention_weights.double().flatten(3)
        grad = grad_weights.flatten(3)
        mean = (weights * grad).sum(-1, keepdim=True)
        return (weights * (grad - mean)).view_as(grad_weights)

    def _compare(self, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Verdict:
        errors, tolerances, absmax = {}, {}, 0.0
        for name, (actual, expected) in pairs.items():
            if actual.shape != expected.shape:
                raise ValueError(
                    f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
                )
            difference = actual.double() - expected
            errors[name] = float(difference.norm() / expected.norm())
            is_location = name.startswith(("grad_sampling", "grad_reference"))
            tolerances[name] = (LOCATION_TOLERANCES if is_location else TOLERANCES)[actual.dtype]
            absmax = max(absmax, float(difference.abs().max()))
        return Verdict(errors, tolerances, absmax, len(self.queries))
