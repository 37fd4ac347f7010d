"""How far answers are from float64, and the page that says so.

    python -m benchmarks.accuracy measure --out benchmarks/results/accuracy-NAME.jsonl
    python -m benchmarks.accuracy measure --peers --out benchmarks/results/accuracy-peers-NAME.jsonl
    python -m benchmarks.accuracy write       # docs/accuracy.md, of benchmarks/results/accuracy-*

An error is the norm of the difference over the norm of the float64 result, computed from the
stored, rounded inputs: all that it holds is the operator's own.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from . import environment, peers, suite
from .checks import LOCATION_TOLERANCES, TOLERANCES
from .implementations import FUSED, IMPLEMENTATIONS, KERNEL, OURS, ROOT
from .operators import Unsupported
from .suite import InputSet
from .workloads import CANONICAL, WORKLOADS, draw_sets, select

DTYPES = ["float32", "float16", "bfloat16", "float64"]
COMPARED = [*OURS, "grid_sample"]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "accuracy.md"
# The tables' columns, where an implementation has them.
TENSORS = {
    "output": "output",
    "grad_value": "gradient of value",
    "grad_sampling_locations": "of locations",
    "grad_attention_weights": "of weights",
    "grad_sampling_offsets": "of offsets",
    "grad_attention_logits": "of logits",
    "grad_reference_points": "of reference points",
}
HEADINGS = {
    KERNEL: "`ms_deform_attn`:",
    FUSED: "`fused_ms_deform_attn`, with one reference point (x, y) a query:",
    "grid_sample": "grid_sample, eager, which transformers falls back to:",
}
PEER_TENSORS = {
    "output": "Output",
    "grad_value": "Gradient of value",
    "grad_sampling_locations": "Gradient of the locations",
    "grad_attention_weights": "Gradient of the weights (dcnv4_flash: of the logits)",
}


@lru_cache(maxsize=1)  # it holds the float64 results, for one implementation after the other
def _inputs(workload: str, dtype: str, device: str) -> InputSet:
    draw = draw_sets(workload, torch.device(device), 1)[0]
    return InputSet(WORKLOADS[workload], draw.cast(*suite.DTYPES[dtype]))


def measure(workload: str, dtype: str, device: str, name: str) -> dict:
    """The error of the output and of each gradient, and how many queries were compared.

    Of a peer that fails in a pass, ``failed`` says how, and that pass has no errors.
    """
    inputs = _inputs(workload, dtype, device)
    operator = IMPLEMENTATIONS[name].load(inputs.workload)
    result = {"queries": len(inputs.expected.queries), "error": {}}
    for pass_name in ("forward", "backward"):
        try:
            calls = inputs.prepare(pass_name, operator)
            result["error"] |= calls.judge(calls.checked()).errors
        except Exception as error:  # whatever a foreign operator may raise
            if name not in peers.PEERS or isinstance(error, Unsupported):
                raise
            first_line = str(error).strip().split("\n")[0]
            result["failed"] = f"{pass_name}: {type(error).__name__}: {first_line}"
            break
    return result


def present(names: list[str]) -> list[str]:
    """Those that this environment has; of the others it says why not."""
    found = []
    for name in names:
        try:
            IMPLEMENTATIONS[name].find()
            found.append(name)
        except Exception as error:  # whatever importing a foreign package may raise
            tqdm.write(f"{name} is not here: {error}")
    return found


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
    return "\n".join(_lines(records()))


def _lines(all_records: list[dict]) -> Iterator[str]:
    yield "# Accuracy\n"
    yield (
        "Errors against float64: the norm of the difference over the norm of the float64 result, "
        "computed from\nthe stored, rounded inputs (`benchmarks/benchmark.py`, seed 0). The "
        "least that a dtype allows is its rounding:\nabout 3e-8 (float32), 2e-4 (float16), 1.7e-3 "
        "(bfloat16). Written by `python -m benchmarks.accuracy write` from\n"
        "`benchmarks/results/accuracy-*.jsonl`; `benchmarks/tests/test_accuracy.py` measures some "
        "of them anew.\n"
    )
    groups: dict[tuple, list[dict]] = {}
    for record in all_records:
        groups.setdefault((record["gpu"] or record["cpu"], record["torch"]), []).append(record)
    for (device, version), of_device in sorted(groups.items(), key=lambda x: -len(x[1])):
        dates = sorted({record["date"] for record in of_device})
        yield f"## {device}\n\ntorch {version}, {' to '.join(dates)}.\n"
        for name in COMPARED:
            of_name = [record for record in of_device if record["impl"] == name]
            if of_name:
                yield f"{HEADINGS[name]}\n"
                yield from _table(of_name)
                yield ""
    yield "## Peers\n"
    of_peers = [record for record in all_records if record["impl"] in peers.PEERS]
    yield from _peers(all_records, of_peers)


def _peers(all_records: list[dict], of_peers: list[dict]) -> Iterator[str]:
    """Side by side, a table a tensor, on the device that the first of them was measured on."""
    device, version = of_peers[0]["gpu"], of_peers[0]["torch"]
    of_peers = [record for record in of_peers if record["gpu"] == device]
    names = [KERNEL, "grid_sample", *dict.fromkeys(record["impl"] for record in of_peers)]
    found = {
        (record["impl"], record["workload"], record["dtype"]): record
        for record in all_records
        if (record["gpu"], record["torch"]) == (device, version)
    }
    measured = [(record["workload"], record["dtype"]) for record in of_peers]
    workloads = dict.fromkeys(workload for workload, _ in measured)
    rows = [(name, dtype) for name in workloads for dtype in DTYPES if (name, dtype) in measured]
    yield (
        f"{device}, torch {version}, {of_peers[0]['date']}, every query compared. Bold: more than "
        "rounding, by the\ntolerances of `benchmarks/checks.py`. A dash: not offered. "
        "kernels_community: its deformable-detr;\nmsda_triton: rziga's; "
        "dcnv4_flash: flash_deform_attn, which takes the softmax, too.\n"
    )
    for tensor, title in PEER_TENSORS.items():
        yield f"{title}:\n"
        yield f"| workload | dtype | {' | '.join(names)} |"
        yield "|---" * (2 + len(names)) + "|"
        for row in rows:
            cells = [_cell(found.get((name, *row)), tensor, row[1]) for name in names]
            yield f"| {' | '.join([*row, *cells])} |"
        yield ""
    failures = dict.fromkeys(
        (r["impl"], r["dtype"], r["failed"]) for r in of_peers if "failed" in r
    )
    if failures:
        yield "What failed:\n"
        yield from (f"* {name}, {dtype}, {failure}" for name, dtype, failure in failures)
        yield ""


def _cell(record: dict | None, tensor: str, dtype: str) -> str:
    if record is None:
        return "-"
    errors = record["error"]
    if tensor == "grad_attention_weights":
        tensor = tensor if tensor in errors else "grad_attention_logits"
    if tensor not in errors:
        return "failed"
    tolerances = LOCATION_TOLERANCES if tensor == "grad_sampling_locations" else TOLERANCES
    text = f"{errors[tensor]:.1e}"
    # Written so that a NaN is bold.
    return text if errors[tensor] <= tolerances[getattr(torch, dtype)] else f"**{text}**"


def _table(of_name: list[dict]) -> Iterator[str]:
    tensors = [name for name in TENSORS if name in of_name[0]["error"]]
    yield f"| workload | dtype | {' | '.join(TENSORS[name] for name in tensors)} |"
    yield "|---" * (2 + len(tensors)) + "|"
    for record in of_name:
        cells = [f"{record['error'][name]:.1e}" for name in tensors]
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
    known = [*COMPARED, *peers.PEERS]
    command.add_argument("--implementations", nargs="+", default=COMPARED, choices=known)
    command.add_argument("--peers", action="store_true", help="only the peers that are here")
    commands.add_parser("write")
    args = parser.parse_args()
    if args.command == "write":
        PAGE.write_text(page())
        return
    workloads = select(args.workloads, list(CANONICAL))
    names = present([*peers.PEERS] if args.peers else args.implementations)
    measure_all(workloads, args.dtypes, args.device, names, args.out)


if __name__ == "__main__":
    main()
