"""``python -m benchmarks seed``: the protocol of the kernels-benchmarks project, for its figures.

huggingface/kernels-benchmarks times Deformable DETR's operator in four small workloads; this
measures the same in the same way, so that the two ``deformable_detr.jsonl`` can stand side by side:

* inputs are drawn on the device, with seed 0, weights rand divided by their sum over the points of
  a level, the dtype float32;
* torch.utils.benchmark.Timer times one call (``compile_ms``), then two to warm up, then five calls
  by themselves, each waited for (and each preceded by what the Timer calls first; on one thread of
  a CPU);
* quantiles are the sorted time at int(q * (n - 1)); ``peak_bytes`` is of the process;
* an answer is right if torch.allclose to the eager function in the same dtype, with rtol and atol
  1e-5 (half types 3e-3 and 5e-3), and finite;
* an implementation that raises has a record that says so;
* what is compiled has the tag "cuda", whatever it runs on.

``kernels_benchmarks.md`` is the page that measures this kernel there: it goes to that project's
``benches/deformable_detr/impls``.

The suite (``python -m benchmarks``) is the better measurement: device time, a cold L2, float64.
"""

import json
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from rich.table import Table
from torch.utils.benchmark import Timer
from tqdm import tqdm

from . import environment
from .implementations import BASELINE, IMPLEMENTATIONS, KERNEL, seed_eager
from .peers import COMMUNITY
from .records import command, failed, read, show
from .table import format_ms
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
        levels = len(sizes.shapes)
        embed = sizes.heads * sizes.channels
        described.append(
            {
                "name": f"{device.type}_B{batch}_Q{queries}_H{sizes.heads}_E{embed}_L{levels}"
                f"_P{sizes.points}",
                "batch_size": batch,
                "num_queries": queries,
                "num_heads": sizes.heads,
                "embed_dim": embed,
                "num_levels": levels,
                "num_points": sizes.points,
                "spatial_shapes": [list(shape) for shape in sizes.shapes],
                "dtype": dtype,
                "device": device.type,
                "seed": 0,
            }
        )
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
        "rtol": rtol,
        "atol": atol,
        "absmax": float(difference.abs().max()),
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
    return {
        "lat_ms": {
            "p10": p10,
            "p50": p50,
            "p90": p90,
            "mean": statistics.fmean(times),
            "iqr": p75 - p25,
            "raw_times": times,
            "has_warnings": p75 - p25 > 0.1 * p50,
            "reps": REPS,
            "warmup": WARMUP,
        },
        "compile_ms": compile_ms,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "ok": corr["ok"],
        "absmax": corr["absmax"],
        "corr": corr,
        "err": None,
    }


def run(names: list[str], dtype: str, device: torch.device) -> Iterator[dict]:
    """Yields a record for every workload and implementation."""
    run_id = uuid.uuid4().hex
    described = environment.describe(device)
    env = {field: described[field] for field in ENV_FIELDS}
    with tqdm(total=4 * len(names), unit="row", dynamic_ncols=True) as progress:
        for workload in workloads(dtype, device):
            inputs = make_inputs(workload)
            expected = seed_eager(*inputs)
            for name in names:
                progress.set_description(f"{workload['name']}: {name}")
                try:
                    result = measure(_load(name, workload), inputs, expected)
                except Exception as error:
                    result = failed(error)
                yield {
                    "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "run": run_id,
                    "impl": name,
                    "tags": tags(name),
                    "wl": workload,
                    "env": env,
                    **result,
                }
                progress.update()


def tags(name: str) -> dict:
    """The record's ``tags``."""
    own = IMPLEMENTATIONS[NAMES[name]].tags
    return {**own, "backend": "cuda"} if own["backend"] == "native" else own


def _load(name: str, workload: dict) -> Callable:
    """A function of the five tensors; there is no graph, as there."""
    sizes = WORKLOADS[f"seed_b{workload['batch_size']}_q{workload['num_queries']}"]
    return IMPLEMENTATIONS[NAMES[name]].load(sizes).forward


def build_table(records: list[dict]) -> Table:
    """A row per workload and implementation; speed-ups are over torch_eager's row."""
    env = records[0]["env"]
    table = Table(title=f"{env['gpu'] or env['plat']}, torch {env['torch']}: call latency")
    table.add_column("workload", no_wrap=True)
    table.add_column("implementation", no_wrap=True)
    for column in ("p50", "IQR", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("ok")
    eager = {r["wl"]["name"]: r for r in records if r["impl"] == "torch_eager"}
    for record in records:
        figures = ["-"] * 3
        if record["err"]:
            ok = f"{record['err']['type']}: {record['err']['msg']}".splitlines()[0]
        else:
            ok = "yes" if record["ok"] else f"WRONG: off by {record['absmax']:.0e}"
            median = record["lat_ms"]["p50"]
            figures[:2] = format_ms(median), format_ms(record["lat_ms"]["iqr"])
            baseline = eager.get(record["wl"]["name"])
            if record["ok"] and baseline and baseline["ok"]:
                figures[2] = f"{baseline['lat_ms']['p50'] / median:.2f}x"
        table.add_row(record["wl"]["name"], record["impl"], *figures, ok)
    return table


def gpu_info() -> str:
    """What nvidia-smi prints, or why it does not."""
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the protocol; the exit status is 1 if this project's kernel failed or was wrong."""
    parser = command("seed", __doc__)
    default = [name for name in NAMES if name != "hf_kernels_deformable_detr"]
    parser.add_argument(
        "--impls",
        nargs="+",
        default=default,
        metavar="NAME",
        help=f"default: {' '.join(default)}; known: {', '.join(NAMES)} ({COMMUNITY})",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("deformable_detr.jsonl"))
    options = parser.parse_args(arguments)
    try:
        names = select(options.impls, list(NAMES))
    except ValueError as error:
        parser.error(str(error))
    print(gpu_info())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as lines:
        for record in run(names, options.dtype, torch.device(options.device)):
            print(json.dumps(record), file=lines, flush=True)
    records = read([options.out])
    show(build_table(records))
    print(f"Written to {options.out}")
    return int(any(r["impl"] == KERNEL and not r["ok"] for r in records))
