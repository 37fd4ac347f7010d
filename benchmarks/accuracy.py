"""How far answers are from float64, and the page that says so.

    python -m benchmarks.accuracy measure --out benchmarks/results/accuracy-NAME.jsonl
    python -m benchmarks.accuracy write       # docs/accuracy.md, of benchmarks/results/accuracy-*

An error is the norm of the difference over the norm of the float64 result, computed from the
stored, rounded inputs: all that it holds is the operator's own.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import environment
from .checks import Expected
from .implementations import IMPLEMENTATIONS, KERNEL, ROOT
from .operators import Unsupported
from .workloads import WORKLOADS, make_inputs, select

DTYPES = ["float32", "float16", "bfloat16", "float64"]
COMPARED = [KERNEL, "grid_sample"]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = RESULTS / "h200-2026-11-23-peers-accuracy.json"
PAGE = ROOT / "docs" / "accuracy.md"
TENSORS = {
    "output": "output",
    "grad_value": "gradient of value",
    "grad_sampling_locations": "of locations",
    "grad_attention_weights": "of weights",
}


def measure(workload: str, dtype: str, device: str, name: str) -> dict:
    """The error of the output and of each gradient, and how many queries were compared."""
    sizes = WORKLOADS[workload]
    inputs = make_inputs(workload, getattr(torch, dtype), device)
    expected = Expected(sizes, inputs)
    operator = IMPLEMENTATIONS[name].load(sizes)
    verdict = expected.check_output(operator.forward(*operator.arrange(inputs)))
    errors = dict(verdict.errors)
    backward = operator.prepare_backward(inputs)
    gradients = operator.gradients(backward(expected.checked_grad_output))
    errors |= expected.check_gradients(gradients).errors
    return {"queries": verdict.queries, "error": errors}


def measure_all(workloads: list[str], dtypes: list[str], device: str, names: list[str], out: Path):
    env = environment.describe(torch.device(device))
    kept = ("torch", "cuda", "gpu", "cpu", "device")
    common = {"date": time.strftime("%Y-%m-%d"), **{name: env[name] for name in kept}}
    runs = [(w, d, n) for w in workloads for d in dtypes for n in names]
    with open(out, "w") as file:
        for workload, dtype, name in tqdm(runs):
            try:
                result = measure(workload, dtype, device, name)
            except Unsupported:
                continue
            record = {"impl": name, "workload": workload, "dtype": dtype, **result, **common}
            file.write(json.dumps(record) + "\n")
            file.flush()


def records() -> list[dict]:
    """Of all files."""
    files = sorted(RESULTS.glob("accuracy-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def page() -> str:
    """The text of docs/accuracy.md."""
    return "\n".join(_lines(records(), json.loads(PEERS.read_text())))


def _lines(all_records: list[dict], peers: dict) -> Iterator[str]:
    yield "# Accuracy\n"
    yield (
        "Errors against float64: the norm of the difference over the norm of the float64 result, "
        "computed from\nthe stored, rounded inputs (`benchmarks/benchmark.py`, seed 0). The "
        "least that a dtype allows is its rounding:\nabout 3e-8 (float32), 2e-4 (float16), 1.7e-3 "
        "(bfloat16). Written by `python -m benchmarks.accuracy write` from\n"
        "`benchmarks/results/accuracy-*.jsonl`; `tests/test_accuracy.py` measures some of them "
        "anew.\n"
    )
    groups: dict[tuple, list[dict]] = {}
    for record in all_records:
        groups.setdefault((record["gpu"] or record["cpu"], record["torch"]), []).append(record)
    for (device, version), of_device in sorted(groups.items(), key=lambda x: -len(x[1])):
        dates = sorted({record["date"] for record in of_device})
        yield f"## {device}\n\ntorch {version}, {' to '.join(dates)}.\n"
        for name in COMPARED:
            of_name = [record for record in of_device if record["impl"] == name]
            if not of_name:
                continue
            if name != KERNEL:
                yield f"\nThe same of {name}, eager, which transformers falls back to:\n"
            yield from _table(of_name)
        yield ""
    yield "## Peers\n"
    yield f"{peers['conditions']} Output, forward:\n"
    names = peers["names"]
    ours = {
        (r["workload"], r["dtype"]): r["error"]["output"]
        for r in all_records
        if r["impl"] == KERNEL and r["device"] == "cuda"
    }
    yield f"| workload | dtype | this kernel | {' | '.join(names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for workload, dtype, errors in peers["errors"]:
        own = ours.get((workload, dtype))
        cells = [f"{own:.0e}" if own else "-", *(e or "-" for e in errors)]
        yield f"| {workload} | {dtype} | {' | '.join(cells)} |"
    yield ""


def _table(of_name: list[dict]) -> Iterator[str]:
    yield f"| workload | dtype | {' | '.join(TENSORS.values())} |"
    yield "|---" * (2 + len(TENSORS)) + "|"
    for record in of_name:
        cells = [f"{record['error'][tensor]:.1e}" for tensor in TENSORS]
        yield f"| {record['workload']} | {record['dtype']} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure")
    gpu = torch.cuda.is_available()
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--device", default="cuda" if gpu else "cpu")
    command.add_argument("--workloads", nargs="+", default=["all"])
    command.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    command.add_argument("--implementations", nargs="+", default=COMPARED, choices=COMPARED)
    commands.add_parser("write")
    args = parser.parse_args()
    if args.command == "write":
        PAGE.write_text(page())
        return
    workloads = select(args.workloads, list(WORKLOADS))
    measure_all(workloads, args.dtypes, args.device, args.implementations, args.out)


if __name__ == "__main__":
    main()
