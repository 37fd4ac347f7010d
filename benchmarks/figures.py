"""``python -m benchmarks figures FILE...``: pictures of records, as SVG and PNG, light and dark.

latency: median times of all implementations; speedup: over the fastest right eager one; roofline:
this kernel's times over the floor and the ceiling measured beside them; scaling: over queries and
over batch, from the scaling_* workloads; models: whole models' images per second. What the files
have no records for is not drawn. Wrong results are drawn hollow, and set no speed-up.
"""

import os
from collections.abc import Callable
from pathlib import Path

from . import environment
from .implementations import BASELINE, FUSED, IMPLEMENTATIONS, KERNEL
from .records import case_of, check_one_device, command_on_files, latest, read

THEMES = ("light", "dark")
# Colours that colour-blind people can tell apart, on white and on black (Okabe and Ito).
COLOURS = {
    KERNEL: "#0072B2",
    FUSED: "#56B4E9",
    "grid_sample": "#E69F00",
    "grid_sample_compiled": "#D55E00",
    BASELINE: "#999999",
    "eager": "#E69F00",
    "eager_compiled": "#D55E00",
    f"{KERNEL}_compiled": "#009E73",
    "kernels_community": "#CC79A7",
    "mmcv": "#F0E442",
    "dcnv4_flash": "#009E73",
    "msda_triton": "#882255",
}
MARKERS = {"float32": "o", "float16": "s", "bfloat16": "^", "float64": "D"}
EAGER = ("grid_sample", BASELINE)
STYLES = {
    "light": {"ink": "#24292f", "grid": "#d0d7de", "ground": "#ffffff"},
    "dark": {"ink": "#e6edf3", "grid": "#3d444d", "ground": "#0d1117"},
}


def draw(records: list[dict], folder: Path, formats=("svg", "png")) -> dict[str, dict[str, Path]]:
    """Draws every picture that the records give.

    Returns:
        Of each picture's name the file of each theme, in the first of the formats.

    Raises:
        ImportError: matplotlib is not there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    records = latest(records)
    pictures: dict[str, dict[str, Path]] = {}
    for name, chart in CHARTS.items():
        for theme in THEMES:
            with pyplot.rc_context(_style(theme)):
                figure = chart(records)
                if figure is None:
                    break
                for suffix in formats:
                    file = folder / f"{name}-{theme}.{suffix}"
                    # No date and no random ids: the same records give the same file.
                    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                    figure.savefig(file, metadata=metadata, bbox_inches="tight")
                pyplot.close(figure)
            pictures.setdefault(name, {})[theme] = folder / f"{name}-{theme}.{formats[0]}"
    return pictures


def _style(theme: str) -> dict:
    ink, grid, ground = (STYLES[theme][part] for part in ("ink", "grid", "ground"))
    return {
        "figure.facecolor": ground,
        "savefig.facecolor": ground,
        "axes.facecolor": ground,
        "axes.edgecolor": grid,
        "axes.labelcolor": ink,
        "axes.titlesize": 10,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "font.size": 9,
        "savefig.dpi": 144,
        "svg.hashsalt": "benchmarks",
        "svg.fonttype": "none",  # text stays text: smaller, and readable to a search
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    }


def _operator_records(records: list[dict], pass_name: str) -> list[dict]:
    """Those of canonical workloads in a pass, with a time."""
    return [
        record
        for record in records
        if record["wl"].get("pass") == pass_name
        and "queries" in record["wl"]
        and not record["wl"]["name"].startswith("scaling_")
        and record["lat_ms"]
    ]


def _device(records: list[dict]) -> str:
    env = records[-1]["env"]
    on = "device time" if env["gpu"] else f"{env.get('threads')} CPU threads"
    return f"{environment.device_name(env)}, torch {env['torch']}, {on}, {records[-1]['ts'][:10]}"


def _passes(records: list[dict]) -> list[str]:
    names = ("forward", "backward")
    return [name for name in names if _operator_records(records, name)]


def _best_dtype(records: list[dict]) -> str:
    """The dtype in which most implementations were measured."""
    implementations: dict[str, set] = {}
    for record in records:
        implementations.setdefault(record["wl"]["dtype"], set()).add(record["impl"])
    return max(implementations, key=lambda dtype: len(implementations[dtype]))


def _dots(axes, rows: list[str], points: list[tuple], label: str, colour: str, marker="o"):
    """points: (row, number, right or not). A wrong one is hollow."""
    for fill in (True, False):
        chosen = [(x, rows.index(row)) for row, x, ok in points if ok == fill]
        if chosen:
            x, y = zip(*chosen)
            axes.scatter(
                x,
                y,
                s=34,
                marker=marker,
                color=colour if fill else "none",
                edgecolors=colour,
                label=label if fill else f"{label}, wrong",
                zorder=3,
            )


def _rows_of(axes, rows: list[str]) -> None:
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _legend(figure, axes) -> None:
    """One for all axes, below them."""
    entries = {}
    for part in axes:
        handles, labels = part.get_legend_handles_labels()
        entries.update(zip(labels, handles))
    figure.legend(
        entries.values(), entries.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4
    )


def _panels(passes: list[str], rows: int):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1,
        len(passes),
        sharey=True,
        squeeze=False,
        figsize=(5 * len(passes), 1.2 + 0.27 * rows),
        layout="constrained",
    )
    return figure, axes[0]


def latency(records: list[dict]):
    """Median times by workload, in the dtype that most implementations have."""
    passes = _passes(records)
    if not passes:
        return None
    dtype = _best_dtype([r for name in passes for r in _operator_records(records, name)])
    shown = {
        name: [r for r in _operator_records(records, name) if r["wl"]["dtype"] == dtype]
        for name in passes
    }
    rows = list(dict.fromkeys(r["wl"]["name"] for name in passes for r in shown[name]))
    figure, axes = _panels(passes, len(rows))
    for panel, name in zip(axes, passes):
        for implementation in IMPLEMENTATIONS:
            points = [
                (r["wl"]["name"], r["lat_ms"]["p50"] * 1e3, r["ok"])
                for r in shown[name]
                if r["impl"] == implementation
            ]
            _dots(panel, rows, points, implementation, COLOURS[implementation])
        panel.set_xscale("log")
        panel.set_xlabel("median, µs")
        panel.set_title(f"{name}, {dtype}")
        _rows_of(panel, rows)
    figure.suptitle(_device(shown[passes[0]]), fontsize=9)
    _legend(figure, axes)
    return figure


def speedup(records: list[dict]):
    """This kernel over the fastest right eager implementation of the same dtype."""
    passes, bars = [], {}
    for name in _passes(records):
        times: dict[tuple, dict[str, float]] = {}
        for record in _operator_records(records, name):
            if record["ok"]:
                times.setdefault(case_of(record), {})[record["impl"]] = record["lat_ms"]["p50"]
        for (workload, dtype, _), by_name in times.items():
            eager = [by_name[rival] for rival in EAGER if rival in by_name]
            if KERNEL in by_name and eager:
                bars.setdefault(name, []).append((workload, dtype, min(eager) / by_name[KERNEL]))
        if name in bars:
            passes.append(name)
    if not passes:
        return None
    rows = list(dict.fromkeys(workload for name in passes for workload, *_ in bars[name]))
    dtypes = list(dict.fromkeys(dtype for name in passes for _, dtype, _ in bars[name]))
    figure, axes = _panels(passes, len(rows))
    for panel, name in zip(axes, passes):
        height = 0.8 / len(dtypes)
        for index, dtype in enumerate(dtypes):
            some = [(rows.index(w), x) for w, d, x in bars[name] if d == dtype]
            if not some:
                continue
            y, x = zip(*some)
            y = [row + (index - (len(dtypes) - 1) / 2) * height for row in y]
            colour = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")[index % 4]
            drawn = panel.barh(y, x, height, label=dtype, color=colour)
            panel.bar_label(drawn, fmt="%.1f", padding=2, fontsize=6 if len(dtypes) > 1 else 8)
        panel.axvline(1, linewidth=0.8, color="#888888")
        panel.set_xscale("log")
        ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        smallest, largest = min(x for *_, x in bars[name]), max(x for *_, x in bars[name])
        panel.set_xlim(min(0.8, smallest / 1.2), 1.6 * largest)
        panel.set_xlabel("times as fast as the fastest right eager one")
        panel.set_title(name)
        _rows_of(panel, rows)
    figure.suptitle(_device(_operator_records(records, passes[0])), fontsize=9)
    _legend(figure, axes)
    return figure


def roofline(records: list[dict]):
    """This kernel's times over the two limits measured in the same run."""
    passes = [
        name
        for name in _passes(records)
        if any(
            r["impl"] == KERNEL and r["ok"] and r.get("floor_ms")
            for r in _operator_records(records, name)
        )
    ]
    if not passes:
        return None
    shown = {
        name: [
            r
            for r in _operator_records(records, name)
            if r["impl"] == KERNEL and r["ok"] and r.get("floor_ms")
        ]
        for name in passes
    }
    rows = list(dict.fromkeys(r["wl"]["name"] for name in passes for r in shown[name]))
    figure, axes = _panels(passes, len(rows))
    limits = (("floor_ms", "bytes at the rate of a copy", "#E69F00"),)
    limits += (("ceiling_ms", "the same loads without arithmetic", "#0072B2"),)
    for panel, name in zip(axes, passes):
        for field, title, colour in limits:
            for dtype, marker in MARKERS.items():
                points = [
                    (r["wl"]["name"], r["lat_ms"]["p50"] / r[field], True)
                    for r in shown[name]
                    if r["wl"]["dtype"] == dtype and r.get(field)
                ]
                _dots(panel, rows, points, f"{title}, {dtype}", colour, marker)
        panel.set_xscale("log")
        ticks = [1, 2, 3, 5, 10, 20, 30]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlim(left=0.9)
        panel.axvline(1, linewidth=1, color="#888888")
        panel.set_xlabel("time over the limit (1: cannot be faster)")
        panel.set_title(name)
        _rows_of(panel, rows)
    figure.suptitle(_device(shown[passes[0]]), fontsize=9)
    _legend(figure, axes)
    return figure


def scaling(records: list[dict]):
    """Times over queries (batch 4) and over batch (900 queries): see workloads.SCALING."""
    from matplotlib import pyplot

    points = [
        r for r in records if r["wl"]["name"].startswith("scaling_") and r["lat_ms"] and r["ok"]
    ]
    if not points:
        return None
    dtype = _best_dtype(points)
    passes = [p for p in ("forward", "backward") if any(r["wl"]["pass"] == p for r in points)]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    axis = (
        ("queries", "batch", 4, "queries, batch 4"),
        ("batch", "queries", 900, "batch, 900 queries"),
    )
    for panel, (over, fixed, at, title) in zip(axes, axis):
        for implementation in IMPLEMENTATIONS:
            for name in passes:
                line = sorted(
                    (r["wl"][over], r["lat_ms"]["p50"] * 1e3)
                    for r in points
                    if r["impl"] == implementation
                    and r["wl"]["pass"] == name
                    and r["wl"]["dtype"] == dtype
                    and r["wl"][fixed] == at
                )
                if line:
                    panel.plot(
                        *zip(*line),
                        marker="o",
                        markersize=4,
                        linestyle="-" if name == "forward" else "--",
                        color=COLOURS[implementation],
                        label=f"{implementation}, {name}",
                    )
        panel.set_xscale("log")
        panel.set_yscale("log")
        sizes = sorted({r["wl"][over] for r in points if r["wl"][fixed] == at})
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel(title)
    axes[0].set_ylabel(f"median, µs, {dtype}")
    figure.suptitle(_device(points), fontsize=9)
    _legend(figure, axes)
    return figure


def model_order(record: dict) -> tuple:
    """Sorts records of whole models: by model, batch, and precision."""
    wl = record["wl"]
    precision = ("float32", "float16", "bfloat16").index(wl["dtype"].removesuffix("_autocast"))
    return (wl["model"], wl["batch"], wl["pass"], precision)


def models(records: list[dict]):
    """Images per second of whole models; a bar of a wrong model is hollow."""
    from matplotlib import pyplot

    shown = sorted((r for r in records if r.get("images_per_s")), key=model_order)
    if not shown:
        return None
    modes = [m for m in ("inference", "training") if any(r["wl"]["pass"] == m for r in shown)]
    rows = {
        mode: list(
            dict.fromkeys(
                f"{r['wl']['name']}, {r['wl']['dtype'].replace('_autocast', ' autocast')}"
                for r in shown
                if r["wl"]["pass"] == mode
            )
        )
        for mode in modes
    }
    most = max(len(names) for names in rows.values())
    figure, axes = pyplot.subplots(
        1,
        len(modes),
        squeeze=False,
        figsize=(6 * len(modes), 1.2 + 0.42 * most),
        layout="constrained",
    )
    names = list(dict.fromkeys(r["impl"] for r in shown))  # in the order they ran
    height = 0.85 / len(names)
    for panel, mode in zip(axes[0], modes):
        for index, name in enumerate(names):
            for record in shown:
                if record["impl"] != name or record["wl"]["pass"] != mode:
                    continue
                row = f"{record['wl']['name']}, {record['wl']['dtype']}"
                row = rows[mode].index(row.replace("_autocast", " autocast"))
                drawn = panel.barh(
                    row + (index - (len(names) - 1) / 2) * height,
                    record["images_per_s"],
                    height,
                    color=COLOURS[name] if record["ok"] else "none",
                    edgecolor=COLOURS[name],
                    label=name if record["ok"] else f"{name}, wrong",
                )
                panel.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
        panel.margins(x=0.12)
        panel.set_xlabel("images per second")
        panel.set_title(mode)
        _rows_of(panel, rows[mode])
    env = shown[-1]["env"]
    figure.suptitle(
        f"{environment.device_name(env)}, torch {env['torch']}, transformers "
        f"{env['transformers']}, {shown[-1]['ts'][:10]}",
        fontsize=9,
    )
    _legend(figure, axes[0])
    return figure


CHARTS: dict[str, Callable] = {
    "latency": latency,
    "speedup": speedup,
    "roofline": roofline,
    "scaling": scaling,
    "models": models,
}


def main(arguments: list[str] | None = None) -> int:
    parser = command_on_files("figures", __doc__)
    options = parser.parse_args(arguments)
    try:
        records = read(options.files)
        check_one_device(records)
        pictures = draw(records, options.out)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    if not pictures:
        parser.error("the files have no records to draw")
    for themes in pictures.values():
        print(" ".join(os.path.relpath(file) for file in themes.values()))
    return 0
