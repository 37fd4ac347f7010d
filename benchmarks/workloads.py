"""The workloads of benchmark.py and their inputs by name."""

import fnmatch
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from . import benchmark
from .benchmark import Inputs

WORKLOADS = dict(benchmark.WORKLOADS)


def make_inputs(
    name: str,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int = 0,
    locations_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
) -> Inputs:
    """The named workload's inputs; see ``benchmark.make_inputs`` for what is drawn."""
    workload = WORKLOADS[name]
    return benchmark.make_inputs(workload, dtype, device, seed, locations_dtype, weights_dtype)


class Draw(NamedTuple):
    """A set of inputs in float32, and the gradient of their output."""

    inputs: Inputs
    grad_output: torch.Tensor

    def cast(self, value_dtype: torch.dtype, other_dtype: torch.dtype) -> "Draw":
        """As ``make_inputs`` casts: the second dtype is that of locations and weights."""
        value, shapes, starts, locations, weights = self.inputs
        inputs = (value.to(value_dtype), shapes, starts)
        inputs = Inputs(*inputs, locations.to(other_dtype), weights.to(other_dtype))
        return Draw(inputs, self.grad_output.to(value_dtype))


def draw_sets(name: str, device: str | torch.device, count: int) -> list[Draw]:
    """The named workload's inputs, and ``count`` - 1 sets more, of other seeds."""

    def draw(index: int) -> Draw:
        seed = 2 * index  # inputs of the first set are drawn with seed 0, its gradient with 1
        return Draw(
            make_inputs(name, torch.float32, device, seed),
            benchmark.make_grad_output(WORKLOADS[name], torch.float32, device, seed + 1),
        )

    with ThreadPoolExecutor() as threads:  # the generators are what takes long, a thread each
        return list(threads.map(draw, range(count)))


def select(patterns: list[str], names: list[str]) -> list[str]:
    """The names that match any of the patterns (globs, or "all"), in the order of ``names``.

    Raises:
        ValueError: a pattern matches none of them.
    """
    chosen = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, "*" if pattern == "all" else pattern)
        if not matches:
            raise ValueError(f"{pattern!r} matches none of: {', '.join(names)}")
        chosen.update(matches)
    return [name for name in names if name in chosen]
