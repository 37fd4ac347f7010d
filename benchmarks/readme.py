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
from .implementations import KERNEL, ROOT
from .records import RESULTS, case_of, command, latest, read
from .report import ABOUT, build_markdown, markdown_table, picture, sheets
from .table import format_us, model_figures
from .workloads import WORKLOADS

README = ROOT / "README.md"
REPORT = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "figures"
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# The results that are quoted: of the operator, by dtype, over its sizes, of whole models, and
# kernels-benchmarks' protocol.
RUN = "h200-2026-11-25"
SUITE = [RESULTS / f"{RUN}-{dtype}.jsonl" for dtype in DTYPES]
SCALING = RESULTS / f"{RUN}-scaling.jsonl"
MODELS = RESULTS / f"{RUN}-models.jsonl"
SEED = RESULTS / f"{RUN}-deformable_detr.jsonl"

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
RIVAL = "grid_sample"
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
    details += [f"SM clock {smi['clocks.sm']}"] if "clocks.sm" in smi else []
    details += [f"copies at {env['copy_gb_per_s']:.0f} GB/s"] if "copy_gb_per_s" in env else []
    about[0] += f" ({', '.join(details)})" if details else ""
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
    rival = any(implementation == RIVAL for implementation, *_ in times)
    head = ["workload"]
    for name in passes:
        head += [f"{name}: fp32", "fp16", "bf16", "of ceiling"]
        head += [f"{RIVAL} fp32"] if rival else []
    rows = []
    for workload in QUOTED_WORKLOADS:
        row = [workload]
        for name in passes:
            ours = [times.get((KERNEL, workload, dtype, name)) for dtype in DTYPES]
            row += [_time(record) for record in ours]
            right = [r for r in ours if r is not None and r["ok"] and r["ceiling_ms"]]
            row.append(_range([r["lat_ms"]["p50"] / r["ceiling_ms"] for r in right]))
            if rival:
                row.append(_time(times.get((RIVAL, workload, "float32", name))))
        rows.append(row)
    about = (
        f"{machine(records)}; median device time in µs, L2 flushed before each call, backward with "
        "its allocation, clearing and conversion; each result checked against float64. Ceiling: "
        "the time over that of the forward's loads alone, backward over twice that. Every "
        f"workload: `{RESULTS.relative_to(ROOT)}/{RUN}-{{{','.join(DTYPES)}}}.jsonl`."
    )
    return [*_filled(about), "", *markdown_table(head, rows)]


def models() -> list[str]:
    """Whole models: a row per case, eager beside this kernel."""
    records = sorted(latest(read([MODELS])), key=figures.model_order)
    baselines = {case_of(r): r for r in records if r["impl"] == "eager"}
    rows = []
    for record in records:
        if record["impl"] == "eager" or record["err"]:
            continue
        if record["wl"]["dtype"] not in QUOTED_MODELS.get(record["wl"]["name"], ()):
            continue
        baseline = baselines.get(case_of(record))
        time, _, rate, ratio, peak, _ = model_figures(record, baseline)
        eager = ["-", "-"]
        if baseline is not None and baseline["err"] is None:
            eager_time, *_, eager_peak, error = map(str, model_figures(baseline, baseline))
            eager = [f"{eager_time}{' (wrong)' if 'WRONG' in error else ''}", eager_peak]
        name, dtype, mode = case_of(record)
        name += ", compiled" if record["impl"].endswith("_compiled") else ""
        dtype = dtype.replace("_autocast", " autocast")
        rows.append([name, dtype, mode, eager[0], time, ratio, rate, eager[1], peak])
    head = ["model", "dtype", "mode", "eager", "this kernel", "speed-up", "images/s"]
    head += ["eager peak", "peak"]
    about = (
        f"{machine(records)}; random weights, median wall time of a whole forward or training step "
        "(forward, loss, backward, AdamW). Wrong: the operator inside the eager model is further "
        "from float64 than rounding explains. Compiled: torch.compile with CUDA graphs, beside "
        f"eager without. More in [docs/benchmarks.md](docs/benchmarks.md), of "
        f"`{MODELS.relative_to(ROOT)}`."
    )
    return [*_filled(about), "", *markdown_table(head, rows)]


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
    "pictures": pictures,
}


def _time(record: dict | None) -> str:
    if record is None or record["err"]:
        return "-"
    return format_us(record["lat_ms"]["p50"]) if record["ok"] else "wrong"


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
