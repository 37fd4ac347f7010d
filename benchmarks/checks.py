"""Is the answer right? Every result is compared with float64 before its time counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .benchmark import Workload, gradients_in_chunks, of_queries
from .operators import Forward, Operator, Tensors

# The relative error (norm of the difference over norm of the float64 result) up to which an answer
# counts as sound. These tell a wrong answer from rounding, of peers too; the project's own, tighter
# bounds are in its tests. For scale: coordinates in plain float32 cost up to 2e-5 on large maps.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 8e-3}
# A location's gradient jumps where it crosses a pixel, and rounding puts a few on the other side,
# where the derivative is as sound.
_OF_LOCATIONS = {**TOLERANCES, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 2e-2}

# What a check samples at most on a CPU (in interpolated channels); a GPU checks every query.
CPU_LIMIT = 2**22
CHUNK = 2**25  # what is computed at a time


def tolerance_of(tensor: str, dtype: torch.dtype) -> float:
    """By the name that it has in records."""
    is_location = tensor.startswith(("grad_sampling", "grad_reference"))
    return (_OF_LOCATIONS if is_location else TOLERANCES)[dtype]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The relative error, and the largest absolute difference."""
    difference = actual.double() - expected
    return float(difference.norm() / expected.norm()), float(difference.abs().max())


@dataclass(frozen=True)
class Verdict:
    """How far the tensors of one answer are from float64."""

    errors: dict[str, float]  # relative, by tensor
    tolerances: dict[str, float]
    absmax: float  # largest absolute difference of all tensors
    queries: int  # how many were checked
    not_finite: Sequence[str] = ()  # what else, of a whole model, has a NaN or an inf

    @property
    def ok(self) -> bool:
        # Written so that a NaN is not ok.
        right = all(self.errors[name] <= self.tolerances[name] for name in self.errors)
        return right and not self.not_finite

    def worse(self, other: "Verdict") -> "Verdict":
        """Of two answers of the same kind the larger errors; a NaN is larger than any number."""
        names, errors = list(self.errors), [[*x.errors.values(), x.absmax] for x in (self, other)]
        *larger, absmax = np.maximum(*errors).tolist()
        return Verdict(dict(zip(names, larger)), self.tolerances, absmax, self.queries)

    def as_results(self) -> dict:
        """The fields of a record."""
        corr = {
            "ok": self.ok,
            "ref": "float64",
            "queries": self.queries,
            "error": self.errors,
            "tolerance": self.tolerances,
            "not_finite": self.not_finite,
        }
        return {"ok": self.ok, "absmax": self.absmax, "corr": corr, "err": None}


class Expected:
    """The float64 results of one operator, computed from the stored, rounded tensors it is given.

    Where that would take too long, some queries stand for all, evenly spread over the batch item.
    A check of gradients then calls the backward with a grad_output that is zero for every other
    query, so that grad_value, too, is known.

    Args:
        arguments: value, shapes, starts, and then tensors of queries, as the operator takes them.
        grad_output: what is timed.
    """

    def __init__(
        self, workload: Workload, reference: Forward, arguments: Tensors, grad_output: torch.Tensor
    ):
        device = grad_output.device
        count = workload.queries
        if device.type == "cpu":
            count = min(count, max(1, CPU_LIMIT // workload.samples_per_query))
        spread = torch.linspace(0, workload.queries - 1, count, dtype=torch.float64)
        self.queries = spread.round().long().unique().to(device)
        self.grad_output = self.checked_grad_output = grad_output
        if count < workload.queries:
            self.checked_grad_output = torch.zeros_like(grad_output)
            self.checked_grad_output[:, self.queries] = grad_output[:, self.queries]
        self.reference, self._arguments = reference, arguments
        self._queries_per_chunk = max(1, CHUNK // workload.samples_per_query)

    def _arguments64(self) -> Tensors:
        """Not kept: with several sets of inputs there would be no room for all."""
        some = of_queries(self._arguments, self.queries)
        return [x.double() if x.is_floating_point() else x for x in some]

    @cached_property
    def output(self) -> torch.Tensor:
        step, arguments = self._queries_per_chunk, self._arguments64()
        chunks = [slice(start, start + step) for start in range(0, len(self.queries), step)]
        return torch.cat([self.reference(*of_queries(arguments, x)) for x in chunks], dim=1)

    @cached_property
    def gradients(self) -> Tensors:
        grad_output = self.grad_output[:, self.queries].double()
        return gradients_in_chunks(
            self.reference, self._arguments64(), grad_output, self._queries_per_chunk
        )

    def check_output(self, output: torch.Tensor) -> Verdict:
        return self._compare({"output": (output[:, self.queries], self.output)})

    def check_gradients(self, operator: Operator, grads: Tensors) -> Verdict:
        """Compares what the operator's backward made of ``checked_grad_output``."""
        value, *others = operator.gradients(grads)
        actual = (value, *(grad[:, self.queries] for grad in others))
        return self._compare(
            dict(zip(operator.names, zip(actual, operator.gradients(self.gradients))))
        )

    def _compare(self, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Verdict:
        errors, tolerances, absmax = {}, {}, 0.0
        for name, (actual, expected) in pairs.items():
            if actual.shape != expected.shape:
                raise ValueError(
                    f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
                )
            errors[name], largest = distance(actual, expected)
            absmax = max(absmax, largest)
            tolerances[name] = tolerance_of(name, actual.dtype)
        return Verdict(errors, tolerances, absmax, len(self.queries))
