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

import json
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from . import environment
from .implementations import BASELINE, IMPLEMENTATIONS, KERNEL, seed_eager
from .records import command, failed, read, show
from .render import build_table
from .workloads import WORKLOADS, select

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


def workloads(dtype: str, device: torch.device) -> list[dict]:
    """The four of them, with the fields that their records have."""
    described = []
    for batch, queries in product((1, 2), (100, 300)):
        sizes = WORKLOADS[f"seed_b{batch}_q{queries}"]
        heads, embed, levels = sizes.heads, sizes.heads * sizes.channels, len(sizes.shapes)
        name = f"{device.type}_B{batch}_Q{queries}_H{heads}_E{embed}_L{levels}_P{sizes.points}"
        fields = {"name": name, "batch_size": batch, "num_queries": queries, "num_heads": heads}
        fields |= {"embed_dim": embed, "num_levels": levels, "num_points": sizes.points}
        fields |= {"spatial_shapes": [list(shape) for shape in sizes.shapes]}
        described.append(fields | {"dtype": dtype, "device": device.type, "seed": 0})
    return described


def make_inputs(workload: dict) -> tuple[torch.Tensor, ...]:
    """The five tensors, drawn in the order there: values, locations, weights."""
    torch.manual_seed(workload["seed"])
    options = {"device": workload["device"], "dtype": DTYPES[workload["dtype"]]}
    shapes = torch.tensor(workload["spatial_shapes"], device=options["device"])
    pixels = shapes.prod(1)
    batch, heads = workload["batch_size"], workload["num_heads"]
    value = torch.randn(batch, int(pixels.sum()), heads, workload["embed_dim"] // heads, **options)
    sampled = (batch, workload["num_queries"], heads, workload["num_levels"])
    sampled = (*sampled, workload["num_points"])
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
    p10, p25, p50, p75, p90 = (
        sorted(times)[int(q * (REPS - 1))] for q in (0.10, 0.25, 0.50, 0.75, 0.90)
    )
    spread = {"mean": statistics.fmean(times), "iqr": p75 - p25, "raw_times": times}
    counts = {"has_warnings": p75 - p25 > 0.1 * p50, "reps": REPS, "warmup": WARMUP}
    return {
        "lat_ms": {"p10": p10, "p50": p50, "p90": p90, **spread, **counts},
        "compile_ms": compile_ms,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        **{"ok": corr["ok"], "absmax": corr["absmax"], "corr": corr, "err": None},
    }


def run(names: list[str], dtype: str, device: torch.device) -> Iterator[dict]:
    """Yields a record for every workload and implementation."""
    run_id, described = uuid.uuid4().hex, environment.describe(device)
    env = {field: described[field] for field in ENV_FIELDS}
    for workload, name in tqdm([*product(workloads(dtype, device), names)], dynamic_ncols=True):
        inputs = make_inputs(workload)
        sizes = WORKLOADS[f"seed_b{workload['batch_size']}_q{workload['num_queries']}"]
        try:  # a function of the five tensors; there is no graph, as there
            function = IMPLEMENTATIONS[NAMES[name]].load(sizes).forward
            result = measure(function, inputs, seed_eager(*inputs))
        except Exception as error:
            result = failed(error)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        head = {"ts": now, "run": run_id, "impl": name, "tags": tags(name)}
        yield {**head, "wl": workload, "env": env, **result}


def tags(name: str) -> dict:
    """The record's ``tags``."""
    own = IMPLEMENTATIONS[NAMES[name]].tags
    return {**own, "backend": "cuda"} if own["backend"] == "native" else own


def main(arguments: list[str] | None = None) -> int:
    """Runs the protocol; the exit status is 1 if this project's kernel failed or was wrong."""
    parser = command("seed", __doc__)
    default = [name for name in NAMES if name != "hf_kernels_deformable_detr"]
    parser.add_argument("--impls", nargs="+", default=default, help=f"of {', '.join(NAMES)}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("deformable_detr.jsonl"))
    options = parser.parse_args(arguments)
    try:
        names = select(options.impls, list(NAMES))
    except ValueError as error:
        parser.error(str(error))
    with options.out.open("w", encoding="utf-8") as lines:
        for record in run(names, options.dtype, torch.device(options.device)):
            print(json.dumps(record), file=lines, flush=True)
    records = read([options.out])
    show(build_table(records))
    return int(any(r["impl"] == KERNEL and not r["ok"] for r in records))
