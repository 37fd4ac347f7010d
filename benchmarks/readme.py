"""``python -m benchmarks readme``: writes README.md's figures, from the results they are of.

A block of README.md between ``<!-- NAME: ... -->`` and ``<!-- end of NAME -->`` is what ``BLOCKS``
makes of the files named there; docs/benchmarks.md is the report of the same files, docs/figures/
has the pictures. ``--check`` writes nothing and exits with 1 if one of the two pages is not what it
would write; the tests ask that of every commit.
"""

import difflib
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from . import environment, figures
from .implementations import FUSED, KERNEL, ROOT
from .records import RESULTS, case_of, command, latest, read
from .report import ABOUT, build_markdown, markdown_table, picture, sheets
from .table import format_ms, format_us, model_figures
from .workloads import WORKLOADS

README = ROOT / "README.md"
REPORT = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "figures"
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# The results that are quoted: of the operator, by dtype, over its sizes, of whole models, and
# kernels-benchmarks' protocol.
RUN = "h100-2026-11-25"
SUITE = [RESULTS / f"{RUN}-{dtype}.jsonl" for dtype in DTYPES]
SCALING = RESULTS / f"{RUN}-scaling.jsonl"
MODELS = RESULTS / f"{RUN}-models.jsonl"
SEED = RESULTS / f"{RUN}-deformable_detr.jsonl"
CPU = RESULTS / "epyc-2-cores-2026-11-25.jsonl"
CPU_MODELS = RESULTS / "epyc-2-cores-2026-11-25-models.jsonl"

QUOTED_WORKLOADS = (
    "seed_b2_q300",
    "hub_b8_q900",
    "ddetr_encoder_b4",
    "ddetr_decoder_b4",
    "mask2former_b2",
    "rtdetr_decoder_b16",
)
# Models with their batch; of RT-DETR the half type in which it was compiled.
QUOTED_MODELS = {
    "deformable_detr_b8": ("float32", "float16", "bfloat16"),
    "deformable_detr_b4": ("float32", "bfloat16_autocast"),
    "mask2former_b1": ("float32", "float16", "bfloat16"),
    "mask2former_b2": ("float32", "bfloat16_autocast"),
    "rt_detr_b1": ("float16",),
}
RIVALS = {"grid_sample": "grid_sample fp32", "grid_sample_compiled": "compiled"}
PICTURED = ("speedup", "roofline", "models")


def suite() -> list[dict]:
    """The operator's records, a workload's dtypes side by side."""
    names = list(WORKLOADS)
    return sorted(latest(read(SUITE)), key=lambda record: names.index(record["wl"]["name"]))


def every_record() -> list[dict]:
    """What docs/benchmarks.md is of."""
    return [*suite(), *read([SCALING, MODELS, SEED])]


def machine(records: list[dict]) -> str:
    """Device, versions and date in a line."""
    env = records[0]["env"]
    about = [environment.device_name(env)]
    smi = env.get("nvidia_smi", {})
    details = [f"driver {smi['driver_version']}"] if "driver_version" in smi else []
    # What it may go up to: a GPU that has nothing to do yet, as when it is asked, goes slower.
    details += [f"SM clock up to {smi['clocks.max.sm']}"] if "clocks.max.sm" in smi else []
    details += [f"copies at {env['copy_gb_per_s']:.0f} GB/s"] if "copy_gb_per_s" in env else []
    about[0] += f" ({', '.join(details)})" if details else ""
    if env["device"] == "cpu":
        about.append(f"{env['threads']} threads")
    about.append(f"torch {env['torch']}")
    about += [f"{name} {env[name]}" for name in ("transformers", "kernels") if name in env]
    dates = sorted({record["ts"][:10] for record in records})
    about.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    return ", ".join(about)


def operator() -> list[str]:
    """This kernel's device times, with the spread of their ratios to the ceiling."""
    records = suite()
    times = {(record["impl"], *case_of(record)): record for record in records}
    passes = ("forward", "backward")
    rivals = [
        name for name in RIVALS if any(name == implementation for implementation, *_ in times)
    ]
    head = ["workload"]
    for name in passes:
        head += [f"{name}: fp32", "fp16", "bf16", "of ceiling"]
        head += [RIVALS[rival] for rival in rivals]
    rows = []
    for workload in QUOTED_WORKLOADS:
        row = [workload]
        for name in passes:
            ours = [times.get((KERNEL, workload, dtype, name)) for dtype in DTYPES]
            row += [_time(record) for record in ours]
            right = [r for r in ours if r is not None and r["ok"] and r["ceiling_ms"]]
            row.append(_range([r["lat_ms"]["p50"] / r["ceiling_ms"] for r in right]))
            row += [_time(times.get((rival, workload, "float32", name))) for rival in rivals]
        rows.append(row)
    about = (
        f"{machine(records)}; median device time in µs, L2 flushed before each call"
        f"{_sets(records)}, backward with its allocation, clearing and conversion; each result "
        "checked against float64. Ceiling: the time over that of the forward's loads alone, "
        "backward over twice that. Compiled: grid_sample under torch.compile, in fp32. Every "
        f"workload: `{RESULTS.relative_to(ROOT)}/{RUN}-{{{','.join(DTYPES)}}}.jsonl`."
    )
    return [*_filled(about), "", *markdown_table(head, rows), "", *_filled(_fused(times))]


def _sets(records: list[dict]) -> str:
    """How many sets of inputs took turns, where records say so."""
    sets = max(record["lat_ms"].get("sets", 1) for record in records if record["lat_ms"])
    return f", {sets} sets of inputs in turn" if sets > 1 else ""


def _fused(times: dict[tuple, dict]) -> str:
    workload, dtype = "ddetr_encoder_b4", "float16"
    fused, plain = (times.get((name, workload, dtype, "forward")) for name in (FUSED, KERNEL))
    return (
        f"The fused operator, which takes softmax and locations on itself, takes {_time(fused)} µs "
        f"on {workload} in {DTYPES[dtype]}, where `ms_deform_attn` alone takes {_time(plain)}. "
        "Beside eager steps before it: [docs/performance.md](docs/performance.md)."
    )


def cpu() -> list[str]:
    """The operator and whole models on a CPU, this kernel beside eager ones."""
    records = latest(read([CPU]))
    times = {(record["impl"], *case_of(record)): record for record in records}
    rivals = [name for name in dict.fromkeys(r["impl"] for r in records) if name != KERNEL]
    passes = [name for name in ("forward", "backward") if any(name in key for key in times)]
    head = ["workload", "dtype"]
    for name in passes:
        head += [f"{name}: this kernel", *rivals]
    rows = []
    for workload, dtype in dict.fromkeys(case_of(record)[:2] for record in records):
        row = [workload, DTYPES.get(dtype, dtype)]
        for name in passes:
            for implementation in (KERNEL, *rivals):
                row.append(_time(times.get((implementation, workload, dtype, name)), format_ms))
        rows.append(row)
    about = (
        f"{machine(records)}; median time of a call, each result checked against float64 "
        f"(`{CPU.relative_to(ROOT)}`)."
    )
    model_head, model_rows = _models(CPU_MODELS, lambda record: True)
    model_about = f"{machine(read([CPU_MODELS]))}; whole models (`{CPU_MODELS.relative_to(ROOT)}`)."
    # Without columns of memory, which only a GPU's allocator tells.
    kept = [i for i, title in enumerate(model_head) if "peak" not in title]
    model_rows = [[row[i] for i in kept] for row in [model_head, *model_rows]]
    lines = [*_filled(about), "", *markdown_table(head, rows), ""]
    return [*lines, *_filled(model_about), "", *markdown_table(model_rows[0], model_rows[1:])]


def models() -> list[str]:
    """Whole models: a row per case, eager beside this kernel."""

    def is_quoted(record: dict) -> bool:
        return record["wl"]["dtype"] in QUOTED_MODELS.get(record["wl"]["name"], ())

    about = (
        f"{machine(read([MODELS]))}; random weights, median wall time of a whole forward or "
        "training step (forward, loss, backward, AdamW). Wrong: the operator inside the model is "
        "further from float64 than rounding explains, or a result is not finite. Compiled: "
        "torch.compile with CUDA graphs, beside eager without. More in "
        f"[docs/benchmarks.md](docs/benchmarks.md), of `{MODELS.relative_to(ROOT)}`."
    )
    return [*_filled(about), "", *markdown_table(*_models(MODELS, is_quoted))]


def _models(file: Path, is_quoted: Callable[[dict], bool]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of whole models."""
    records = sorted(latest(read([file])), key=figures.model_order)
    baselines = {case_of(r): r for r in records if r["impl"] == "eager"}
    rows = []
    for record in records:
        if record["impl"] == "eager" or not is_quoted(record):
            continue
        baseline = baselines.get(case_of(record))
        eager, *_, eager_peak = _model(baseline, None)
        name, dtype, mode = case_of(record)
        name += ", compiled" if record["impl"].endswith("_compiled") else ""
        time, ratio, rate, peak = _model(record, baseline)
        dtype = dtype.replace("_autocast", " autocast")
        rows.append([name, dtype, mode, eager, time, ratio, rate, eager_peak, peak])
    head = ["model", "dtype", "mode", "eager", "this kernel", "speed-up", "images/s"]
    return [*head, "eager peak", "peak"], rows


def _model(record: dict | None, baseline: dict | None) -> tuple[str, str, str, str]:
    """(time, speed-up, images/s, peak memory) of a whole model."""
    if record is None or record["err"]:
        return "-" if record is None else "failed", "-", "-", "-"
    time, _, rate, ratio, peak, error = map(str, model_figures(record, baseline))
    return f"{time} (wrong)" if "WRONG" in error else time, ratio, rate, peak


def pictures() -> list[str]:
    """Those that are drawn: see --pictures."""
    names = [name for name in PICTURED if _files(name)["light"].exists()]
    return [picture(_files(name), ABOUT[name], "docs/figures/") for name in names]


def report() -> str:
    """docs/benchmarks.md."""
    drawn = {name: _files(name) for name in figures.CHARTS if _files(name)["light"].exists()}
    tables = sheets(every_record())
    return build_markdown("Benchmarks", tables, drawn, f"{PICTURES.name}/")


def _files(name: str) -> dict[str, Path]:
    return {theme: PICTURES / f"{name}-{theme}.svg" for theme in figures.THEMES}


# In the order of README.md.
BLOCKS: dict[str, Callable[[], list[str]]] = {
    "operator": operator,
    "models": models,
    "cpu": cpu,
    "pictures": pictures,
}


def _time(record: dict | None, format_time: Callable[[float], str] = format_us) -> str:
    if record is None or record["err"]:
        return "-"
    return format_time(record["lat_ms"]["p50"]) if record["ok"] else "wrong"


def _range(ratios: list[float]) -> str:
    """Two digits: 1.1, or 1.5 to 1.9; "-" of none."""
    if not ratios:
        return "-"
    low, high = (f"{ratio:.1f}" for ratio in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


def _filled(text: str) -> list[str]:
    """Lines as wide as README.md's."""
    return textwrap.wrap(text, 124, break_long_words=False, break_on_hyphens=False)


def write(text: str) -> str:
    """README.md's text with every block made anew.

    Raises:
        ValueError: a block's marks are not there, once and in order.
    """
    for name, build in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        body = "\n".join(["", *build(), "", ""])
        text, count = pattern.subn(lambda m, body=body: m[1] + body + m[2], text)
        if count != 1:
            raise ValueError(f"{README.name} has {count} blocks named {name}, expected one")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = command("readme", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, tell what is stale")
    parser.add_argument("--pictures", action="store_true", help=f"draw {PICTURES.name}/ anew, too")
    options = parser.parse_args(arguments)
    if options.pictures:
        for records in ([*suite(), *read([SCALING])], read([MODELS])):
            figures.draw(records, PICTURES, ("svg",))
    stale = []
    for file, after in ((README, write(README.read_text("utf-8"))), (REPORT, report())):
        before = file.read_text("utf-8") if file.exists() else ""
        if not options.check:
            file.write_text(after, encoding="utf-8")
            continue
        name = str(file.relative_to(ROOT))
        lines = before.splitlines(), after.splitlines()
        stale += difflib.unified_diff(*lines, name, f"{name} as of its results", "", "", 0, "")
    if options.check:
        print("\n".join(stale) or "the figures are those of the results")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
