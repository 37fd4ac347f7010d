"""``python -m benchmarks report | readme``: records as text and pictures.

``report FILE...`` prints a run's table again. ``readme`` writes the measured figures of README.md
and docs/*.md: between ``<!-- NAME: made by ... -->`` and ``<!-- end of NAME -->`` stands what
``BLOCKS`` makes of the newest file of each kind, results/MACHINE-DATE-KIND.jsonl. So a run is
published by putting its file there and calling ``readme``, which takes from the files what no page
needs and draws pictures whose records have changed. ``--check`` writes nothing and exits with 1
if a page, a picture or a file is not what it would write; the tests ask that of every commit.
"""

import difflib
import hashlib
import html
import json
import re
import statistics
import textwrap
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from .benchmark import WORKLOADS
from .checks import tolerance_of
from .environment import machine
from .implementations import BASELINE, FUSED, KERNEL
from .operators import ROOT
from .records import RESULTS, by_case, command, error_of, is_absent, latest, publish, read, show
from .suite import PASSES
from .timing import format_ms, format_us

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
COMMUNITY, EAGER, COMPILED = "kernels_community", "grid_sample", "grid_sample_compiled"
FIVE = "seed_b2_q300 ddetr_encoder_b4 ddetr_decoder_b4 mask2former_b2 rtdetr_decoder_b16".split()
# Of whole models, in the order of columns and bars; of several that a case has, the first.
MODEL_COLUMNS = {"eager": ("eager",), "compiled": ("eager_compiled",)}
MODEL_COLUMNS["this kernel"] = (FUSED, KERNEL)
MODEL_COLUMNS["this kernel, compiled"] = (f"{FUSED}_compiled", f"{KERNEL}_compiled")
# Okabe and Ito's colours, which colour-blind people can tell apart on white and on black.
COLOURS = {COMMUNITY: "#CC79A7", "dcnv4_flash": "#F0E442", "msda_triton": "#009E73"}
COLOURS |= {"deformops": "#D55E00", "deformops_fp32_sums": "#56B4E9", EAGER: "#999999"}
COLOURS |= dict(zip([*MODEL_COLUMNS][1:], ("#E69F00", "#0072B2", "#009E73")))
MARKERS = {"float32": ("#0072B2", "o"), "float16": ("#D55E00", "s"), "bfloat16": ("#009E73", "^")}
THEMES = {"light": ("#24292f", "#d0d7de", "#ffffff"), "dark": ("#e6edf3", "#3d444d", "#0d1117")}
PICTURES = ROOT / "docs" / "figures"
ABOUT = {
    "operator": "Times of other kernels and of eager grid_sample over this kernel's, in fp16. "
    "Right of 1: slower than this kernel. Hollow: the answer is wrong.",
    "limits": "This kernel's time over two limits of the same run: its loads without arithmetic "
    "(backward: twice), and, hollow, every byte moved once at the rate of a copy.",
    "models": "Whole models of transformers, times as fast as they are eager: compiled without "
    "this kernel, on this kernel, and both. Hollow: the answer is wrong.",
}


def time_of(record: dict | None, form: Callable[[float], str] = format_us) -> str:
    """The median; in brackets if the answer is wrong, a dash if there is none."""
    if record is None or record["err"]:
        return "-" if record is None or is_absent(record) else "failed"
    text = form(record["lat_ms"]["p50"])
    return text if record["ok"] else f"({text})"


def speed_up(record: dict | None, baseline: dict | None = None) -> str:
    """Over the baseline: with quartiles where steps were taken in turn, else of the medians.

    Wrong answers have none and set none, but for whole models: eager ones are wrong in half types.
    """
    if record is not None and record.get("ratio"):
        return "{p50:.2f}x ({p25:.2f} to {p75:.2f})".format(**record["ratio"])
    if any(x is None or x["err"] for x in (record, baseline)) or "ratio" in record:
        return "-"
    if "images_per_s" not in record and not (record["ok"] and baseline["ok"]):
        return "-"
    return f"{baseline['lat_ms']['p50'] / record['lat_ms']['p50']:.2f}x"


def over(limit: str, record: dict | None) -> float | None:
    """How many times a limit a right answer took; None where that is not known."""
    known = record is not None and record["ok"] and record.get(limit)
    return record["lat_ms"]["p50"] / record[limit] if known else None


def _two_digits(number: float | None) -> str:
    return f"{number:.2f}" if number else "-"


def peak_of(record: dict | None) -> str:
    # What CUDA graphs hold is not in the allocator's count.
    if record is None or not record["peak_bytes"] or record["impl"].endswith("_compiled"):
        return "-"
    return f"{record['peak_bytes'] / 1e9:.2f} GB"


def build_table(records: list[dict]) -> Table:
    """A run for a terminal: a row per record, those of a case together."""
    of_models = any("images_per_s" in record for record in records)
    limits = ("floor_ms", "ceiling_ms") if any(r.get("floor_ms") for r in records) else ()
    caption = "Medians; in brackets: the answer is wrong. Errors are against float64."
    table = Table(title=machine(records), caption=caption)
    for name in ("workload", "dtype", "pass", "implementation"):
        table.add_column(name, no_wrap=True)
    numbers = ["time", "IQR", "speed-up", *(f"/{limit[:-3]}" for limit in limits)]
    for name in [*numbers, *(["images/s", "peak memory"] if of_models else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("error", overflow="fold")
    for case, by_name in by_case(records).items():
        baseline = [by_name[n] for n in (BASELINE, "eager") if n in by_name]
        names = case
        table.add_section()
        for name, record in by_name.items():
            spread = format_ms(record["lat_ms"]["iqr"]) if record["lat_ms"] else "-"
            row = [time_of(record, format_ms), spread, speed_up(record, *baseline[:1])]
            row += [_two_digits(over(limit, record)) for limit in limits]
            if of_models:
                rate = record["images_per_s"]
                row += [f"{rate:#.3g}".rstrip(".") if rate else "-", peak_of(record)]
            error = error_of(record)
            style = "red" if error.startswith(("WRONG", "failed")) else ""
            table.add_row(*names, name, *row, Text(error, style=style))
            names = ("", "", "")
    return table


def markdown(lines: list[list[str]]) -> list[str]:
    """A table whose first line is its head."""
    return [f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]]


def by_workload(records: list[dict], columns: dict[str, Callable], dtypes=DTYPES) -> list[str]:
    """A row per workload; ``columns`` make a case's records by implementation into a cell."""
    cases = by_case(records)
    lines = [["workload", *(f"{name}: {title}" for name in PASSES for title in columns)]]
    for workload in dict.fromkeys(record["wl"]["name"] for record in records):
        line = [workload]
        for name in PASSES:
            for column in columns.values():
                cells = [column(cases.get((workload, dtype, name), {})) for dtype in dtypes]
                line.append(" / ".join(cells) if set(cells) != {"-"} else "-")
        lines.append(line)
    return markdown(lines)


def of(name: str, show: Callable[[dict | None], str] = time_of) -> Callable[[dict], str]:
    """A column for ``by_workload``."""
    return lambda by_name: show(by_name.get(name))


def draw(name: str, chart: Callable[[list[dict]], object], records: list[dict]) -> None:
    """A picture in both themes, with what ``digest`` says of its records."""
    from matplotlib import pyplot

    for theme, (ink, grid, ground) in THEMES.items():
        style = {
            **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), ground),
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
            **dict.fromkeys(("axes.edgecolor", "grid.color"), grid),
            **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
            **{"axes.grid": True, "axes.axisbelow": True, "font.size": 9, "axes.titlesize": 10},
            "svg.fonttype": "none",  # text stays text: smaller, and readable to a search
            "svg.hashsalt": "benchmarks",  # no random ids: the same records give the same file
            "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
        }
        with pyplot.rc_context(style):
            figure = chart(records)
            options = {"metadata": {"Date": None, "Description": digest(records)}}
            figure.savefig(PICTURES / f"{name}-{theme}.svg", bbox_inches="tight", **options)
            pyplot.close(figure)


def digest(records: list[dict]) -> str:
    text = json.dumps(records, sort_keys=True)
    return f"records {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _panels(titles: list[str], labels: list[str], ticks: tuple, size: tuple, about: str, x: str):
    """Panels with a logarithmic axis side by side, with a row of each for every label."""
    from matplotlib import pyplot

    options = {"sharey": True, "squeeze": False, "figsize": size, "layout": "constrained"}
    figure, axes = pyplot.subplots(1, len(titles), **options)
    for panel, title in zip(axes[0], titles):
        panel.set(title=title, xlabel=x, xscale="log", ylim=(len(labels) - 0.5, -0.5))
        panel.set_yticks(range(len(labels)), labels)
        panel.axvline(1, linewidth=1, color="#888888")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    figure.suptitle(about, fontsize=9)
    return figure, axes[0]


def _legend(figure, panels) -> None:
    found = [panel.get_legend_handles_labels() for panel in panels]
    entries = {label: handle for pair in found[::-1] for handle, label in [*zip(*pair)][::-1]}
    where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": 4}
    figure.legend([*entries.values()][::-1], [*entries][::-1], **where)


def _dots(records: list[dict], series: list[tuple], ticks: tuple, x: str):
    """A panel for each pass, a row for each workload, marks of each of the series.

    These are (label, colour, marker, dtype, function of a case's records by implementation that
    returns a number and whether to fill its mark, or None).
    """
    cases = by_case(records)
    labels = [name for name in WORKLOADS if any(name == case[0] for case in cases)]
    size = (10, 1.3 + 0.27 * len(labels))
    figure, panels = _panels([*PASSES], labels, ticks, size, machine(records), x)
    for panel, name in zip(panels, PASSES):
        for label, colour, marker, dtype, number in series:
            found = [number(cases.get((workload, dtype, name), {})) for workload in labels]
            for fill in (True, False):
                marks = [(p[0], row) for row, p in enumerate(found) if p and p[1] == fill]
                style = {"facecolors": colour if fill else "none", "edgecolors": colour, "s": 34}
                if marks:
                    panel.scatter(*zip(*marks), marker=marker, label=label, zorder=3, **style)
                    label = "_nolegend_"  # filled or not, an entry is enough
    _legend(figure, panels)
    return figure


def _over_ours(name: str, by_name: dict[str, dict]) -> tuple[float, bool] | None:
    rival, ours = by_name.get(name), by_name.get(KERNEL)
    known = rival and rival["lat_ms"] and ours and ours["ok"]
    return (rival["lat_ms"]["p50"] / ours["lat_ms"]["p50"], rival["ok"]) if known else None


def operator_chart(records: list[dict]):
    """Every rival's time over this kernel's, in fp16."""
    series = [(name, COLOURS[name], "o", "float16", partial(_over_ours, name)) for name in COLOURS]
    ticks = (0.5, 1, 2, 5, 10, 20, 50)
    return _dots(records, series, ticks, "time over this kernel's, fp16 (right of 1: slower)")


def _over_limit(limit: str, by_name: dict[str, dict]) -> tuple[float, bool] | None:
    number = over(limit, by_name.get(KERNEL))
    return number and (number, limit == "ceiling_ms")


def limits_chart(records: list[dict]):
    """This kernel's times over the two limits."""
    series = [
        (f"{title}, {DTYPES[dtype]}", *style, dtype, partial(_over_limit, limit))
        for limit, title in (("ceiling_ms", "loads alone"), ("floor_ms", "bytes once"))
        for dtype, style in MARKERS.items()
    ]
    return _dots(records, series, (1, 2, 3, 5, 10, 20, 30), "time over the limit (1: no faster)")


def model_cases(records: list[dict]) -> dict[tuple, dict[str, dict]]:
    """By (model, dtype, mode) the records of ``MODEL_COLUMNS`` that it has."""

    def order(case: tuple) -> tuple:
        name, dtype, mode = case
        return mode, name, [*DTYPES].index(dtype.removesuffix("_autocast"))

    cases = by_case(records)
    found = {case: {} for case in sorted(cases, key=order)}
    for case, columns in found.items():
        for column, names in MODEL_COLUMNS.items():
            some = [cases[case][name] for name in names if name in cases[case]]
            columns.update({column: some[0]} if some else {})
    return found


def models_chart(records: list[dict]):
    """Whole models, times as fast as transformers as it is."""
    cases = model_cases(records)
    labels = [f"{n}, {DTYPES[d.removesuffix('_autocast')]}, {mode}" for n, d, mode in cases]
    x, ticks = "times as fast as transformers as it is, eager", (0.5, 1, 2, 3, 5, 10, 20)
    about, size = machine(records), (9, 1.3 + 0.42 * len(cases))
    figure, (panel,) = _panels([""], labels, ticks, size, about, x)
    for index, column in enumerate([*MODEL_COLUMNS][1:]):
        for row, columns in enumerate(cases.values()):
            record, eager = columns.get(column), columns.get("eager")
            if not (record and record["lat_ms"] and eager and eager["lat_ms"]):
                continue
            ratio = eager["lat_ms"]["p50"] / record["lat_ms"]["p50"]
            style = {"color": COLOURS[column], "edgecolor": COLOURS[column], "fill": record["ok"]}
            bar = panel.barh(row + 0.27 * (index - 1), ratio - 1, 0.25, 1, label=column, **style)
            panel.bar_label(bar, [f"{ratio:.2f}"], padding=2, fontsize=7)
    panel.set_xlim(right=1.25 * panel.get_xlim()[1])
    _legend(figure, [panel])
    return figure


@cache
def newest(kind: str, on_gpu: bool = True) -> list[dict]:
    """The records of the newest file of a kind, those of the operator by workload."""
    found = []
    for file in RESULTS.glob(f"*-{kind}.jsonl"):
        records = latest(read([file]))
        if bool(records[0]["env"]["gpu"]) == on_gpu:
            found.append((re.search(r"\d{4}-\d\d-\d\d", file.name)[0], file.name, records))
    if not found:
        raise ValueError(f"{RESULTS.name}/ has no {kind} of a {'GPU' if on_gpu else 'CPU'}")
    order = {name: index for index, name in enumerate(WORKLOADS)}
    return sorted(max(found)[2], key=lambda record: order.get(record["wl"]["name"], 0))


def beside_peers() -> list[dict]:
    """The newest run with peers; eager, where it is not in it, from that of the operator."""
    records = newest("peers")
    if any(record["impl"] == EAGER for record in records):
        return records
    return [*records, *(record for record in newest("operator") if record["impl"] == EAGER)]


def best_peer(by_name: dict[str, dict]) -> dict | None:
    """The fastest right kernel of those that are neither this one nor the community's."""
    own = (KERNEL, FUSED, COMMUNITY, BASELINE, EAGER, COMPILED)
    right = [record for name, record in by_name.items() if name not in own and record["ok"]]
    return min(right, key=lambda record: record["lat_ms"]["p50"], default=None)


def claim() -> list[str]:
    """One sentence: how many times as fast as others, and where those are wrong."""
    cases = by_case(newest("peers"))
    cases = {case: by_name for case, by_name in cases.items() if COMMUNITY in by_name}
    figures = []
    for rival_of in (lambda by_name: by_name[COMMUNITY], best_peer):
        for name in PASSES:
            pairs = [(rival_of(x), x[KERNEL]) for case, x in cases.items() if case[2] == name]
            ratios = [a["lat_ms"]["p50"] / b["lat_ms"]["p50"] for a, b in pairs if a is not None]
            figures.append(statistics.geometric_mean(ratios))
    halves = [by_name for case, by_name in cases.items() if case[1] != "float32"]
    figures += [len({case[0] for case in cases}), sum(x[KERNEL]["ok"] for x in halves)]
    figures += [len(halves), sum(x[COMMUNITY]["ok"] for x in halves)]
    text = (
        "On an {} forward and backward are {:.1f} and {:.1f} times as fast as the community "
        "kernel's, and {:.2f} and {:.2f} times as fast as those of the fastest other kernel that "
        "is right (geometric means over {} workloads in fp32, fp16 and bf16); in half types {} of "
        "{} answers are right, and {} of the community kernel's."
    )
    return _filled(text.format(newest("peers")[0]["env"]["gpu"], *figures))


def operator() -> list[str]:
    """Five workloads in fp16 beside the others."""
    columns = {"this kernel": of(KERNEL), "community kernel": of(COMMUNITY)}
    columns["fastest other that is right"] = lambda x: (
        f"{time_of(best_peer(x))} {(best_peer(x) or {}).get('impl', '')}"
    )
    columns["eager"] = of(EAGER)
    records = beside_peers()
    cases = by_case(records)
    lines = [["workload", *columns]]
    for workload in FIVE:
        both = [cases[workload, "float16", name] for name in PASSES]
        lines.append([workload, *(" / ".join(map(show, both)) for show in columns.values())])
    about = "forward / backward, fp16, median device time in µs, cold L2; in brackets: wrong."
    return [*markdown(lines), "", *_filled(f"{machine(records)}; {about}")]


def workloads() -> list[str]:
    """Every workload beside its limits, eager implementations and the fused operator."""
    records = newest("operator")
    columns = {"this kernel": of(KERNEL)}
    for limit in ("floor", "ceiling"):
        columns[f"over {limit}"] = of(KERNEL, lambda r, x=f"{limit}_ms": _two_digits(over(x, r)))
    columns |= {"fused": of(FUSED), EAGER: of(EAGER), "compiled": of(COMPILED)}
    return [*_filled(machine(records)), "", *by_workload(records, columns)]


def peers() -> list[str]:
    """Every workload beside the other kernels."""
    records = newest("peers")
    columns = {name: of(name) for name in dict.fromkeys(record["impl"] for record in records)}
    return [*_filled(machine(records)), "", *by_workload(records, columns)]


def models(on_gpu: bool = True) -> list[str]:
    """Whole models: eager, compiled, on this kernel, and both."""
    records = newest("models", on_gpu)
    head = ["model", "dtype", "mode", *MODEL_COLUMNS, "over eager", "compiled, over compiled"]
    lines, gains = [[*head, "peak: eager", "peak: this kernel"]], []
    for (name, dtype, mode), columns in model_cases(records).items():
        eager, compiled, ours, both = (columns.get(column) for column in MODEL_COLUMNS)
        line = [name, dtype.replace("_autocast", " autocast"), mode]
        line += [time_of(record, format_ms) for record in (eager, compiled, ours, both)]
        line += [speed_up(ours, eager), speed_up(both, compiled)]
        lines.append([*line, peak_of(eager), peak_of(ours)])
        if name.startswith("deformable_detr_b") and mode == "inference" and both and compiled:
            gains.append(compiled["lat_ms"]["p50"] / both["lat_ms"]["p50"])
    kept = [i for i in range(len(lines[0])) if any(line[i] != "-" for line in lines[1:])]
    about = f"{machine(records)}."
    if gains:
        about += f" What to expect: compiled, {min(gains):.1f} to {max(gains):.1f} times for "
        about += "Deformable DETR's inference; where the host is the limit, compile first."
    return [*_filled(about), "", *markdown([[line[i] for i in kept] for line in lines])]


def cpu() -> list[str]:
    """The operator and whole models on a CPU."""
    records = newest("operator", on_gpu=False)
    names = dict.fromkeys([KERNEL, *(record["impl"] for record in records)])
    columns = {name: of(name, partial(time_of, form=format_ms)) for name in names}
    table = by_workload(records, columns, dtypes=["float32"])
    return [*_filled(f"{machine(records)}, fp32."), "", *table, "", *models(on_gpu=False)]


def accuracy() -> list[str]:
    """The largest error of each implementation, dtype and device; bold if beyond rounding."""
    tensors = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
    tensors += ("grad_reference_points",)
    dtypes = [*DTYPES, "float64"]
    worst: dict[tuple, dict[str, float]] = {}
    for record in read(sorted(RESULTS.glob("*-accuracy.jsonl"))):
        name, dtype = record["impl"], dtypes.index(record["wl"]["dtype"])
        device = record["env"]["gpu"] or record["env"]["cpu"]
        errors = worst.setdefault((name not in (KERNEL, FUSED), dtype, name, device), {})
        for tensor, error in record["corr"].get("error", {}).items():
            tensor = tensor.replace("_offsets", "_locations").replace("_logits", "_weights")
            before = errors.get(tensor, 0.0)
            errors[tensor] = before if error <= before else error  # written so that a NaN stays
    lines = [["implementation", "dtype", "device", "output", "gradient of value"]]
    lines[0] += ["of locations or offsets", "of weights or logits", "of reference points"]
    for (_, dtype, name, device), errors in sorted(worst.items()):
        lines.append([name, dtypes[dtype], device])
        for tensor in tensors:
            error = errors.get(tensor, 0.0)
            right = error <= tolerance_of(tensor, getattr(torch, dtypes[dtype]))
            text = f"{error:.1e}" if right else f"**{error:.1e}**"
            lines[-1].append(text if tensor in errors else "-")
    return markdown(lines)


BLOCKS = {f.__name__: f for f in (claim, operator, workloads, peers, models, cpu, accuracy)}
# How each picture is drawn, and what it is of.
PICTURED = {"operator": (operator_chart, beside_peers)}
PICTURED["limits"] = (limits_chart, partial(newest, "operator"))
PICTURED["models"] = (models_chart, partial(newest, "models"))


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, 124, break_long_words=False, break_on_hyphens=False)


def rendered(text: str, page: Path) -> str:
    """A page's text with every block made anew; ValueError if one is unknown or has no end."""

    def block(match: re.Match) -> str:
        start, name, end = match.groups()
        shown = name.removeprefix("picture-")
        if end is None or shown not in (BLOCKS if shown == name else PICTURED):
            raise ValueError(f"{page.name}: the block {name} is none of {[*BLOCKS]}, or has no end")
        if shown == name:
            return "\n".join([start, "", *BLOCKS[name](), "", end])
        # For GitHub and the Hub, which show the one for the reader's theme.
        folder = "figures/" if page.parent.name == "docs" else "docs/figures/"
        light, dark = (f"{folder}{shown}-{theme}.svg" for theme in THEMES)
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        image = f'<img alt="{html.escape(ABOUT[shown])}" src="{light}">'
        return "\n".join([start, "", f"<picture>{source}{image}</picture>", "", end])

    pattern = r"(<!-- ([\w-]+): made by [^\n]*-->)(?:\n.*?(<!-- end of \2 -->))?"
    return re.sub(pattern, block, text, flags=re.DOTALL)


def update(check: bool) -> list[str]:
    """Writes files of records, pages and pictures; or, to check, tells what it would change."""
    files = sorted(RESULTS.glob("*.jsonl"))
    stale = [f"{file.name} has what no page needs" for file in files if publish(file, check)]
    newest.cache_clear()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text("utf-8")
        after, title = rendered(before, page), str(page.relative_to(ROOT))
        lines = before.splitlines(), after.splitlines()
        stale += difflib.unified_diff(*lines, title, f"{title} as of its results", "", "", 0, "")
        if after != before and not check:
            page.write_text(after, encoding="utf-8")
    for name, (chart, records) in PICTURED.items():
        files = [PICTURES / f"{name}-{theme}.svg" for theme in THEMES]
        if not all(f.exists() and digest(records()) in f.read_text("utf-8") for f in files):
            stale.append(f"{name}-*.svg are not of their records")
            if not check:
                draw(name, chart, records())
    return stale


def main(name: str, arguments: list[str]) -> int:
    """The two commands; see the module."""
    parser = command(name, __doc__)
    if name == "report":
        parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines")
    else:
        parser.add_argument("--check", action="store_true", help="only tell what is stale")
    options = parser.parse_args(arguments)
    try:
        if name == "report":
            show(build_table(latest(read(options.files))))
            return 0
        stale = update(options.check)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(stale) or "the figures are those of the results")
    return int(options.check and bool(stale))
