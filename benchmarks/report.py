"""``python -m benchmarks report FILE... --out FOLDER``: a page for people, of records.

Writes report.html, which needs no other file and no network, report.md, and the pictures that
report.md shows. Where matplotlib is missing both come without pictures, and say so.
"""

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import environment, figures
from .implementations import KERNEL
from .records import case_of, check_one_device, command_on_files, is_absent, latest, read
from .table import format_ratio, format_us, model_figures

PASSES = ("forward", "backward", "forward_backward", "latency")
TITLES = {
    "latency": "Times",
    "speedup": "Speed-up",
    "roofline": "Against the limits",
    "scaling": "Scaling",
    "models": "Images per second",
}
ABOUT = {
    "latency": "Median time of each implementation. Hollow: the answer is wrong.",
    "speedup": (
        "This kernel over the fastest eager implementation whose answer is right. seed_eager waits "
        "for the GPU in the middle of a call and is charged that: where it alone is right, and the "
        "workload small, the ratio is mostly Python's time."
    ),
    "roofline": (
        "This kernel's time over two limits measured in the same run: every byte moved once at "
        "the rate of a copy, and the kernel's loads without its arithmetic (backward: twice)."
    ),
    "scaling": "A decoder at 800x1333, over queries and over batch.",
    "models": "Whole forwards and training steps of models of transformers.",
}


class Sheet(NamedTuple):
    """A table of text: the first cells of a row name it."""

    title: str
    about: str
    head: list[str]
    rows: list[list[str]]


def environments(records: list[dict]) -> Sheet:
    """What was measured on: a column per different environment."""
    found: dict[str, dict] = {}
    for record in records:
        env = record["env"]
        name = f"{environment.device_name(env) if 'cpu' in env else env['gpu'] or env['plat']}"
        title = f"{name}, torch {env['torch']}, {record['ts'][:10]}"
        found.setdefault(title, {}).update(env)
    rows = []
    keys = dict.fromkeys(key for env in found.values() for key in env)
    for key in keys:
        cells = []
        for env in found.values():
            cell = env.get(key, "")
            if isinstance(cell, dict):
                cell = ", ".join(f"{name} {number}" for name, number in cell.items())
            cells.append(f"{cell:.0f}" if isinstance(cell, float) else str(cell))
        rows.append([key, *cells])
    return Sheet("Environment", "", ["", *found], rows)


def operator_sheets(records: list[dict]) -> Iterable[Sheet]:
    """A table of times for each pass: a row per workload and dtype, a column per implementation."""
    for name in PASSES:
        some = [r for r in records if r["wl"].get("pass") == name and "queries" in r["wl"]]
        if not some:
            continue
        implementations = list(dict.fromkeys(record["impl"] for record in some))
        limits = any(r["impl"] == KERNEL and r.get("floor_ms") for r in some)
        head = ["workload", "dtype", *implementations]
        head += ["over floor", "over ceiling"] if limits else []
        by_case: dict[tuple, dict[str, dict]] = {}
        for record in some:
            by_case.setdefault(case_of(record), {})[record["impl"]] = record
        rows = []
        for case, by_name in by_case.items():
            row = [*case[:2], *(_time(by_name.get(impl)) for impl in implementations)]
            if limits:
                ours = by_name.get(KERNEL)
                right = ours is not None and ours["ok"]
                for limit in ("floor_ms", "ceiling_ms"):
                    ratio = format_ratio(ours["lat_ms"]["p50"], ours.get(limit)) if right else "-"
                    row.append(ratio)
            rows.append(row)
        about = "Median and inter-quartile range in µs; a wrong answer has no time."
        yield Sheet(name.replace("_", " and ").capitalize(), about, head, rows)


def _time(record: dict | None) -> str:
    if record is None:
        return ""
    if record["err"]:
        return "unsupported" if is_absent(record) else record["err"]["type"]
    if not record["ok"]:
        return "wrong"
    return f"{format_us(record['lat_ms']['p50'])} ± {format_us(record['lat_ms']['iqr'])}"


def accuracy(records: list[dict]) -> Sheet | None:
    """The largest error of each implementation's tensors over all workloads, by dtype."""
    worst: dict[tuple[str, str], dict[str, float]] = {}
    wrong: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if "queries" not in record["wl"] or not record["corr"]:
            continue
        key = (record["impl"], record["wl"]["dtype"])
        for tensor, error in record["corr"]["error"].items():
            tensor = tensor.replace("attention_logits", "attention_weights")
            before = worst.setdefault(key, {}).get(tensor, 0.0)
            # Written so that a NaN stays.
            worst[key][tensor] = before if error <= before else error
        wrong.setdefault(key, [])
        if not record["ok"] and record["wl"]["name"] not in wrong[key]:
            wrong[key].append(record["wl"]["name"])
    if not worst:
        return None
    tensors = list(dict.fromkeys(tensor for errors in worst.values() for tensor in errors))
    rows = [
        [*key, *(f"{errors[t]:.0e}" if t in errors else "" for t in tensors), ", ".join(wrong[key])]
        for key, errors in worst.items()
    ]
    head = ["implementation", "dtype", *(t.replace("_", " ") for t in tensors), "wrong in"]
    about = "The largest relative error (norm of the difference over norm) against float64."
    return Sheet("Accuracy", about, head, rows)


def memory(records: list[dict]) -> Sheet | None:
    """Peak memory by workload and implementation, of forward and backward."""
    some = [r for r in records if r.get("peak_bytes") and "queries" in r["wl"] and r["ok"]]
    some = [r for r in some if r["wl"]["pass"] in ("forward", "forward_backward")]
    if not some:
        return None
    implementations = list(dict.fromkeys(record["impl"] for record in some))
    by_case: dict[tuple, dict[str, dict]] = {}
    for record in some:
        by_case.setdefault(case_of(record), {})[record["impl"]] = record
    rows = [
        [*case, *(f"{r[i]['peak_bytes'] / 1e6:.1f}" if i in r else "" for i in implementations)]
        for case, r in by_case.items()
    ]
    about = "Peak memory in MB: inputs, a kept graph, temporaries and results."
    return Sheet("Memory", about, ["workload", "dtype", "pass", *implementations], rows)


def model_sheet(records: list[dict]) -> Sheet | None:
    """Whole models, a row per record."""
    some = sorted((r for r in records if "images_per_s" in r), key=figures.model_order)
    if not some:
        return None
    baselines = {case_of(r): r for r in some if r["impl"] == "eager"}
    rows = [
        [*case_of(r), r["impl"], *map(str, model_figures(r, baselines.get(case_of(r))))]
        for r in some
    ]
    head = ["model", "dtype", "mode", "implementation", "time", "IQR", "images/s", "speed-up"]
    about = (
        "Medians of whole forwards or training steps; the error is the sampling operator's inside "
        "the model, against float64, its largest. Speed-ups are over transformers as it is."
    )
    return Sheet("Whole models", about, [*head, "peak memory", "error"], rows)


def seed_sheet(records: list[dict]) -> Sheet | None:
    """The kernels-benchmarks protocol's records: those without a pass."""
    some = [r for r in records if "pass" not in r["wl"]]
    if not some:
        return None
    implementations = list(dict.fromkeys(record["impl"] for record in some))
    by_name: dict[tuple, dict[str, dict]] = {}
    for record in some:
        key = (record["wl"]["name"], record["wl"]["dtype"])
        by_name.setdefault(key, {})[record["impl"]] = record
    rows = [[*key, *(_time(r.get(i)) for i in implementations)] for key, r in by_name.items()]
    about = "Call latency as kernels-benchmarks measures it, µs; torch_eager is its eager function."
    head = ["workload", "dtype", *implementations]
    return Sheet("The kernels-benchmarks protocol", about, head, rows)


def sheets(records: list[dict]) -> list[Sheet]:
    """All tables that the records give."""
    seed = [record for record in records if "pass" not in record["wl"]]
    suite = latest(record for record in records if "pass" in record["wl"])
    found = [environments(records), model_sheet(suite), *operator_sheets(suite)]
    found += [accuracy(suite), memory(suite), seed_sheet(seed)]
    return [sheet for sheet in found if sheet is not None]


# --------------------------------------------------------------------------------------- the pages

_STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --ground: #fff; --line: #d0d7de; --soft: #57606a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --ground: #0d1117; --line: #3d444d; --soft: #9198a1 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 72rem; margin: 0 auto; padding: 1rem }
h1, h2 { line-height: 1.2 }
p { color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem }
a { color: inherit }
img { max-width: 100%; height: auto }
.wide { overflow-x: auto }
.wide img { min-width: 40rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--ground) }
.bad { color: #cf222e }
"""


def build_html(title: str, tables: list[Sheet], pictures: dict[str, dict[str, Path]]) -> str:
    """One page that holds all it shows."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    names = [TITLES[name] for name in pictures] + [table.title for table in tables]
    links = [f'<a href="#s{i}">{html.escape(name)}</a>' for i, name in enumerate(names)]
    parts.append(f"<nav>{''.join(links)}</nav>")
    if not pictures:
        parts.append("<p>Without pictures: matplotlib is missing, or there is nothing to draw.</p>")
    for index, (name, themes) in enumerate(pictures.items()):
        light, dark = (_data_uri(themes[theme]) for theme in figures.THEMES)
        parts += [
            f'<h2 id="s{index}">{TITLES[name]}</h2><p>{html.escape(ABOUT[name])}</p>',
            '<div class="wide"><picture>',
            f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">',
            f'<img src="{light}" alt="{html.escape(ABOUT[name])}"></picture></div>',
        ]
    for index, table in enumerate(tables, len(pictures)):
        parts.append(f'<h2 id="s{index}">{html.escape(table.title)}</h2>')
        parts.append(f"<p>{html.escape(table.about)}</p>" if table.about else "")
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
        parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>')
        for row in table.rows:
            cells = "".join(
                f'<td class="bad">{html.escape(cell)}</td>'
                if cell.lower().startswith(("wrong", "failed"))
                else f"<td>{html.escape(cell)}</td>"
                for cell in row
            )
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</tbody></table></div>")
    return "\n".join([*parts, "</body></html>", ""])


def _data_uri(file: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"


def build_markdown(
    title: str, tables: list[Sheet], pictures: dict[str, dict[str, Path]], folder: str = ""
) -> str:
    """The same for a repository's page; pictures are files beside it, or in ``folder``."""
    lines = [f"# {title}", ""]
    if not pictures:
        lines += ["Without pictures: matplotlib is missing, or there is nothing to draw.", ""]
    for name, themes in pictures.items():
        lines += [f"## {TITLES[name]}", "", ABOUT[name], ""]
        lines += [picture(themes, ABOUT[name], folder), ""]
    for table in tables:
        lines += [f"## {table.title}", ""]
        lines += [table.about, ""] if table.about else []
        lines += markdown_table(table.head, table.rows)
        lines.append("")
    return "\n".join(lines)


def picture(themes: dict[str, Path], alt: str, folder: str = "") -> str:
    """HTML for a picture in both themes, as GitHub and the Hub show it."""
    light, dark = (f"{folder}{themes[theme].name}" for theme in figures.THEMES)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{html.escape(alt)}" src="{light}"></picture>'
    )


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    body = [[cell.replace("|", "\\|") or " " for cell in row] for row in [head, *rows]]
    body.insert(1, ["---"] * len(head))
    return [f"| {' | '.join(row)} |" for row in body]


def main(arguments: list[str] | None = None) -> int:
    parser = command_on_files("report", __doc__)
    parser.add_argument("--title", default="Multi-scale deformable attention: benchmarks")
    options = parser.parse_args(arguments)
    try:
        records = read(options.files)
        check_one_device(records)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not records:
        parser.error("the files have no records")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        pictures = figures.draw([r for r in records if "pass" in r["wl"]], options.out)
    except ImportError:
        pictures = {}
    tables = sheets(records)
    for name, build in (("report.html", build_html), ("report.md", build_markdown)):
        page = build(options.title, tables, pictures)
        (options.out / name).write_text(page, encoding="utf-8")
        print(options.out / name)
    return 0
