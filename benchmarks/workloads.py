"""The suite's workloads, read from workloads.json, and their inputs by name."""

import fnmatch
import json
from pathlib import Path

import torch

from . import benchmark
from .benchmark import Inputs, Workload

_ROWS = json.loads((Path(__file__).parent / "workloads.json").read_text())["workloads"]


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


CANONICAL = {
    name: Workload(**{field: _tuples(row[field]) for field in Workload._fields})
    for name, row in _ROWS.items()
}

# A decoder at 800x1333, over queries with batch 4, and over batch with 900 queries.
_DECODER = CANONICAL["ddetr_decoder_b4"]
SCALING = {
    f"scaling_b{batch}_q{queries}": _DECODER._replace(batch=batch, queries=queries)
    for batch, queries in (
        *((4, queries) for queries in (100, 300, 900, 2700, 8100, 24300)),
        *((batch, 900) for batch in (1, 2, 8, 16, 32)),
    )
}
WORKLOADS = CANONICAL | SCALING


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
