"""``python -m benchmarks seed``: the protocol of the kernels-benchmarks project, for its figures.

huggingface/kernels-benchmarks times Deformable DETR's operator in four small workloads; this
measures the same in the same way, so that the two ``deformable_detr.jsonl`` can stand side by side:
inputs are drawn on the device with seed 0, weights rand over their sum over a level's points;
torch.utils.benchmark.Timer times one call (``compile_ms``), then two to warm up, then five by
themselves, each waited for; quantiles are the sorted time at int(q * (n - 1)); ``peak_bytes`` is of
the process; an answer is right if finite and torch.allclose to the eager function in the same
dtype, with rtol and atol 1e-5 (half types 3e-3 and 5e-3); what is compiled has the tag "cuda",
whatever it runs on.

``kernels_benchmarks.md`` is the page that measures this kernel there: it goes to that project's
``benches/deformable_detr/impls``. The suite (``python -m benchmarks``) is the better measurement:
device time, a cold L2, float64.
"""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from . import environment
from .benchmark import Workload
from .implementations import BASELINE, IMPLEMENTATIONS, KERNEL, seed_eager
from .records import Results, command, failed, recorder
from .render import build_table
from .timing import summarize
from .workloads import WORKLOADS

REPS, WARMUP = 5, 2
ENV_FIELDS = ("torch", "cuda", "gpu", "sm", "py", "plat")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
# As there: its own two by their names there, and what this project adds.
NAMES = {
    "torch_eager": BASELINE,
    "hf_kernels_deformable_detr": "kernels_community",
    "grid_sample": "grid_sample",
    KERNEL: KERNEL,
}


def workloads(dtype: str, device: torch.device) -> Iterator[tuple[Workload, dict]]:
    """The four of them: the suite's, and the fields that their records have."""
    for batch, queries in product((1, 2), (100, 300)):
        sizes = WORKLOADS[f"seed_b{batch}_q{queries}"]
        heads, embed, levels = sizes.heads, sizes.heads * sizes.channels, len(sizes.shapes)
        name = f"{device.type}_B{batch}_Q{queries}_H{heads}_E{embed}_L{levels}_P{sizes.points}"
        fields = {"name": name, "batch_size": batch, "num_queries": queries, "num_heads": heads}
        fields |= {"embed_dim": embed, "num_levels": levels, "num_points": sizes.points}
        fields |= {"spatial_shapes": sizes.shapes, "dtype": dtype, "device": device.type, "seed": 0}
        yield sizes, fields


def make_inputs(sizes: Workload, dtype: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The five tensors, drawn in the order there: values, locations, weights."""
    torch.manual_seed(0)
    options = {"device": device, "dtype": DTYPES[dtype]}
    shapes = torch.tensor(sizes.shapes, device=device)
    pixels = shapes.prod(1)
    value = torch.randn(sizes.batch, int(pixels.sum()), sizes.heads, sizes.channels, **options)
    sampled = (sizes.batch, sizes.queries, sizes.heads, len(sizes.shapes), sizes.points)
    locations = torch.rand(*sampled, 2, **options)
    weights = torch.rand(*sampled, **options)
    weights = weights / weights.sum(-1, keepdim=True)
    return value, shapes, pixels.cumsum(0) - pixels, locations, weights


def compare(output: torch.Tensor, expected: torch.Tensor) -> dict:
    """The record's ``corr``."""
    half = output.dtype in (torch.float16, torch.bfloat16)
    rtol, atol = (3e-3, 5e-3) if half else (1e-5, 1e-5)
    difference = output - expected
    close = torch.allclose(output, expected, rtol=rtol, atol=atol)
    return {
        "ok": close and bool(output.isfinite().all()),
        **{"rtol": rtol, "atol": atol, "absmax": float(difference.abs().max())},
        "mae": float(difference.abs().mean()),
        "mse": float(difference.square().mean()),
        "ref": "deformable_detr_torch",
    }


def measure(function: Callable, inputs: tuple[torch.Tensor, ...], expected: torch.Tensor) -> dict:
    """A record's results."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    timer = Timer("function(*inputs)", globals={"function": function, "inputs": inputs})
    compile_ms = timer.timeit(1).mean * 1e3
    timer.timeit(WARMUP)
    times = [timer.timeit(1).mean * 1e3 for _ in range(REPS)]
    corr = compare(function(*inputs), expected)
    return {
        "lat_ms": summarize(times, WARMUP, "lower"),
        "compile_ms": compile_ms,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        **{"ok": corr["ok"], "absmax": corr["absmax"], "corr": corr, "err": None},
    }


def run(names: list[str], dtype: str, device: torch.device) -> Iterator[dict]:
    """Yields a record for every workload and implementation."""
    described = environment.describe(device)
    record = recorder({field: described[field] for field in ENV_FIELDS})
    for (sizes, fields), name in product(workloads(dtype, device), names):
        implementation = IMPLEMENTATIONS[NAMES[name]]
        inputs = make_inputs(sizes, dtype, device)
        try:  # a function of the five tensors; there is no graph, as there
            function = implementation.load(sizes).forward
            result = measure(function, inputs, seed_eager(*inputs))
        except Exception as error:
            result = failed(error)
        native = {"backend": "cuda"} if implementation.tags["backend"] == "native" else {}
        yield record(name, implementation.tags | native, fields, result)


def main(arguments: list[str] | None = None) -> int:
    """Runs the protocol; the exit status is 1 if this project's kernel failed or was wrong."""
    parser = command("seed", __doc__)
    default = [name for name in NAMES if name != "hf_kernels_deformable_detr"]
    parser.add_argument("--impls", nargs="+", default=default, choices=NAMES)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("deformable_detr.jsonl"))
    options = parser.parse_args(arguments)
    options.out.write_text("")
    records = run(options.impls, options.dtype, torch.device(options.device))
    return Results(options.out, []).collect(records, build_table, lambda r: r["impl"] == KERNEL)
