"""``python -m benchmarks``: this kernel against eager ones and its peers, on this machine."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from . import environment
from .implementations import BASELINE, IMPLEMENTATIONS, KERNEL
from .peers import PEERS
from .suite import DTYPES, PASSES, Plan, run
from .table import build_table
from .timing import Effort
from .workloads import WORKLOADS, select

RESULTS = Path(__file__).parent / "results"
DEFAULT_WORKLOADS = ["seed_*", "ddetr_encoder_b1", "rtdetr_decoder_b16", "mask2former_b2"]
QUICK_WORKLOADS = ["seed_*", "rtdetr_decoder_b16"]
DEFAULT_IMPLEMENTATIONS = [BASELINE, "grid_sample", KERNEL]
# Compiling takes up to half a minute a workload: not for a first look.
CPU_IMPLEMENTATIONS = [BASELINE, "grid_sample", "grid_sample_compiled", KERNEL]


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; the exit status is 1 if this project's kernel was wrong or failed."""
    plan, out = _parse(arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    try:
        with out.open("a", encoding="utf-8") as lines:
            for record in run(plan):
                records.append(record)
                print(json.dumps(record), file=lines, flush=True)
    finally:  # an interrupted run has measured something, too
        if records:
            console = Console()
            if not console.is_terminal:
                console.width = 160
            console.print(build_table(records))
            console.print(f"Written to {out}", highlight=False, soft_wrap=True)
    return int(any(record["impl"] == KERNEL and _is_wrong(record) for record in records))


def _list(names) -> str:
    return ", ".join(names)


def _is_wrong(record: dict) -> bool:
    return not record["ok"] and (record["err"] or {}).get("type") != "Unsupported"


def _parse(arguments: list[str] | None) -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    cuda = torch.cuda.is_available()

    def names(option: str, known, default: str):
        parser.add_argument(
            option,
            nargs="+",
            metavar="NAME",
            help=f"names, globs or all; default: {default}; known: {_list(known)}",
        )

    names("--workloads", WORKLOADS, " ".join(DEFAULT_WORKLOADS))
    names("--impls", IMPLEMENTATIONS, " ".join(DEFAULT_IMPLEMENTATIONS) + "; on a CPU all")
    parser.add_argument("--peers", action="store_true", help=f"and what is there of {_list(PEERS)}")
    names("--dtypes", DTYPES, "float32; on a GPU float16 and bfloat16, too")
    names("--passes", PASSES, "forward and backward; on a GPU latency, too")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--reps", type=int, help="calls per row; default: what fits in a second")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--quick", action="store_true", help="a first look: small, fewer calls")
    options = parser.parse_args(arguments)
    if options.reps is not None and options.reps < 1:
        parser.error(f"--reps is {options.reps}, expected at least 1")

    device = torch.device(options.device)
    if device.type == "cuda":
        # Named with its index: what is measured is always the current device.
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    default_dtypes = ["float32", "float16", "bfloat16"] if on_gpu else ["float32"]
    default_passes = ["all"] if on_gpu else ["forward", "backward"]
    workloads = QUICK_WORKLOADS if options.quick else DEFAULT_WORKLOADS
    full_cpu = not on_gpu and not options.quick
    implementations = options.impls or (
        CPU_IMPLEMENTATIONS if full_cpu else DEFAULT_IMPLEMENTATIONS
    )
    if options.peers:
        implementations = [*implementations, *PEERS]
    effort = Effort(
        reps=options.reps,
        budget_ms=200 if options.quick else 1000,
        min_reps=10 if on_gpu else 3,
        max_reps=200 if on_gpu else 50,
    )
    try:
        plan = Plan(
            select(options.workloads or workloads, list(WORKLOADS)),
            select(implementations, list(IMPLEMENTATIONS)),
            select(options.dtypes or default_dtypes, list(DTYPES)),
            select(options.passes or default_passes, PASSES),
            device,
            effort,
        )
    except ValueError as error:
        parser.error(str(error))
    name = f"{environment.slug(environment.describe(device))}-{time.strftime('%Y%m%d-%H%M%S')}"
    return plan, options.out or RESULTS / f"{name}.local.jsonl"


if __name__ == "__main__":
    sys.exit(main())
