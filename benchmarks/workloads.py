"""The workloads of benchmark.py and their inputs by name."""

import fnmatch
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from . import benchmark
from .benchmark import Inputs

WORKLOADS = dict(benchmark.WORKLOADS)


class Draw(NamedTuple):
    """A set of inputs in float32, and the gradient of their output."""

    inputs: Inputs
    grad_output: torch.Tensor

    def cast(self, value_dtype: torch.dtype, other_dtype: torch.dtype) -> "Draw":
        """The second dtype is that of locations and weights."""
        value, shapes, starts, locations, weights = self.inputs
        inputs = (value.to(value_dtype), shapes, starts)
        inputs = Inputs(*inputs, locations.to(other_dtype), weights.to(other_dtype))
        return Draw(inputs, self.grad_output.to(value_dtype))


def draw_sets(name: str, device: str | torch.device, count: int) -> list[Draw]:
    """The named workload's inputs, and ``count`` - 1 sets more, of other seeds."""
    what = (WORKLOADS[name], torch.float32, device)

    def draw(index: int) -> Draw:
        # Inputs of the first set are drawn with seed 0, its gradient with 1.
        inputs = benchmark.make_inputs(*what, seed=2 * index)
        return Draw(inputs, benchmark.make_grad_output(*what, seed=2 * index + 1))

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
