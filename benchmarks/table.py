"""Records as tables for people.

    python -m benchmarks.table results.jsonl                 # as ``python -m benchmarks`` prints it
    python -m benchmarks.table results.jsonl --markdown      # this kernel's figures

README.md's table is made by the second.
"""

import argparse
from pathlib import Path

from rich.table import Table
from rich.text import Text

from . import environment
from .implementations import BASELINE, KERNEL
from .records import case_of, is_absent, read, show
from .workloads import WORKLOADS, select

LIMITS = ("floor_ms", "ceiling_ms")


def build_table(records: list[dict]) -> Table:
    """One row per record; speed-ups are over the baseline's row of the same workload and pass."""
    has_limits = any(record.get("floor_ms") for record in records)
    baselines = {case_of(record): record for record in records if record["impl"] == BASELINE}
    env = records[0]["env"]
    caption = (
        "Times are medians. Errors are relative norms against float64, of the tensor that is "
        "furthest from what it may be."
    )
    if has_limits:
        caption += (
            " /floor and /ceiling: the time over that of moving every byte once, and over that of "
            "this kernel's loads alone."
        )
    table = Table(
        title=f"{environment.device_name(env)}, torch {env['torch']}, {env['threads']} CPU threads",
        caption=caption,
    )
    for column in ("workload", "dtype", "pass", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("time", "IQR", "speed-up", *(["/floor", "/ceiling"] if has_limits else [])):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("error", overflow="fold")

    previous = None
    for record in sorted(records, key=_case_order(records)):
        case = case_of(record)
        if previous not in (None, case):
            table.add_section()
        names = case if case != previous else ("", "", "")
        *figures, note = _figures(record, baselines.get(case))
        table.add_row(*names, record["impl"], *figures[: 5 if has_limits else 3], note)
        previous = case
    return table


def build_models_table(records: list[dict]) -> Table:
    """One row per record of models.py; see ``model_figures`` for what speed-ups are over."""
    env = records[0]["env"]
    table = Table(
        title=f"{environment.device_name(env)}, torch {env['torch']}, "
        f"transformers {env['transformers']}, {env['threads']} CPU threads",
        caption=(
            "Times are medians of whole forwards, or of whole training steps. Speed-ups are over "
            "transformers without a kernel, compiled beside what is compiled with one: medians of "
            "the ratios of steps taken in turn (quartiles). The error is the sampling operator's "
            "against float64 inside the model, its largest."
        ),
    )
    for column in ("model", "dtype", "mode", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("time", "IQR", "images/s", "speed-up", "peak memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("error", overflow="fold")
    baselines = {case_of(record): record for record in records if record["impl"] == "eager"}
    previous = None
    for record in sorted(records, key=_case_order(records)):
        if previous not in (None, case_of(record)):
            table.add_section()
        names = case_of(record) if case_of(record) != previous else ("", "", "")
        table.add_row(
            *names, record["impl"], *model_figures(record, baselines.get(case_of(record)))
        )
        previous = case_of(record)
    return table


def model_figures(record: dict, baseline: dict | None) -> tuple[str | Text, ...]:
    """(time, IQR, images/s, speed-up, peak memory, error) of a record of models.py.

    The speed-up is that of the record's ``ratio``; a record without one was not measured in turn
    with its baseline, and then it is that of the medians.

    Eager models are wrong in half types on large maps, which is what they are compared for: their
    time stands, and the error says so.
    """
    if record["err"] is not None:
        return *["-"] * 5, _failure(record)
    median, iqr = record["lat_ms"]["p50"], record["lat_ms"]["iqr"]
    ratio = "-"
    if record.get("ratio"):
        ratio = "{p50:.2f}x ({p25:.2f} to {p75:.2f})".format(**record["ratio"])
    elif "ratio" not in record and baseline is not None and baseline["err"] is None:
        ratio = f"{baseline['lat_ms']['p50'] / median:.2f}x"
    # What CUDA graphs hold is not in the allocator's count.
    counted = record["peak_bytes"] is not None and record["tags"]["backend"] != "compiled"
    peak = f"{record['peak_bytes'] / 1e9:.2f} GB" if counted else "-"
    error = Text(f"{record['corr']['error']['operator']:.0e}")
    if record["corr"]["not_finite"]:
        error = Text(f"{record['corr']['not_finite'][0]} is not finite")
    if not record["ok"]:
        error = Text(f"WRONG: {error}", style="red")
    rate = f"{record['images_per_s']:#.3g}".rstrip(".")
    return format_ms(median), format_ms(iqr), rate, ratio, peak, error


def _failure(record: dict) -> Text:
    reason = f"{record['err']['type']}: {record['err']['msg']}".splitlines()[0]
    if is_absent(record):
        return Text(reason[0].lower() + reason[1:])
    return Text(f"failed: {reason}", style="red")


def build_markdown(records: list[dict]) -> str:
    """This kernel's device times in us beside its limits and the fastest right other one.

    Of records of the same case, the last counts.
    """
    latest = {(case_of(record), record["impl"]): record for record in records}
    ours = [record for (_, name), record in latest.items() if name == KERNEL]
    env = ours[0]["env"]
    details = [f"torch {env['torch']}", ours[0]["ts"][:10]]
    if "copy_gb_per_s" in env:
        details.append(f"copies at {env['copy_gb_per_s']:.0f} GB/s")
    for name, title in (("driver_version", "driver"), ("clocks.max.sm", "SM clock up to")):
        if name in env.get("nvidia_smi", {}):
            details.append(f"{title} {env['nvidia_smi'][name]}")
    lines = [f"{environment.device_name(env)}: {', '.join(details)}.", ""]
    passes = [
        name
        for name in ("forward", "backward", "latency")
        if any(record["wl"]["pass"] == name for record in ours)
    ]
    head = ["workload", "dtype"]
    for name in passes:
        head += [f"{name}, us", "fastest other"]
        head += [] if name == "latency" else ["/floor", "/ceiling"]
    lines += [_markdown_row(head), _markdown_row(["---"] * len(head))]
    for workload, dtype in dict.fromkeys(case_of(record)[:2] for record in ours):
        row = [workload, dtype]
        for name in passes:
            record = latest.get(((workload, dtype, name), KERNEL))
            rivals = [
                other
                for (case, implementation), other in latest.items()
                if case == (workload, dtype, name) and implementation != KERNEL and other["ok"]
            ]
            row += _markdown_figures(record, rivals, limits=name != "latency")
        lines.append(_markdown_row(row))
    return "\n".join(lines)


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_figures(record: dict | None, rivals: list[dict], limits: bool) -> list[str]:
    fastest = min(rivals, key=lambda rival: rival["lat_ms"]["p50"], default=None)
    other = "-"
    if fastest is not None:
        other = f"{format_us(fastest['lat_ms']['p50'])} {fastest['impl']}"
    if record is None or not record["ok"]:
        ours, ratios = "-" if record is None or record["err"] else "wrong", ["-", "-"]
    else:
        median = record["lat_ms"]["p50"]
        ours = format_us(median)
        ratios = [format_ratio(median, record.get(limit)) for limit in LIMITS]
    return [ours, other, *(ratios if limits else [])]


def _case_order(records: list[dict]):
    """Rows to be compared stand together, in the order their cases were first measured."""
    order = {}
    for record in records:
        order.setdefault(case_of(record), len(order))
    return lambda record: order[case_of(record)]


def _figures(record: dict, baseline: dict | None) -> tuple[str | Text, ...]:
    """What follows the implementation's name; a wrong answer gets no ratio, and sets none."""
    if record["err"] is not None:
        return *["-"] * 5, _failure(record)
    corr = record["corr"]
    # The tensor furthest from its tolerance; a NaN is further than any number.
    worst = max(
        corr["error"], key=lambda name: _nan_last(corr["error"][name] / corr["tolerance"][name])
    )
    error = Text(f"{corr['error'][worst]:.0e}")
    median, iqr = record["lat_ms"]["p50"], record["lat_ms"]["iqr"]
    ratios = ["-"] * 3
    if not record["ok"]:
        error = Text(f"WRONG: {error} in {worst}", style="red")
    else:
        if baseline is not None and baseline["ok"]:
            ratios[0] = f"{baseline['lat_ms']['p50'] / median:.2f}x"
        ratios[1:] = (format_ratio(median, record.get(limit)) for limit in LIMITS)
    return format_ms(median), format_ms(iqr), *ratios, error


def format_ratio(milliseconds: float, limit_ms: float | None) -> str:
    """How many times the limit; "-" where that is not known, as in records before it was."""
    return "-" if limit_ms is None else f"{milliseconds / limit_ms:.2f}"


def _nan_last(number: float) -> float:
    return float("inf") if number != number else number


def format_us(milliseconds: float) -> str:
    """Three digits in microseconds: 9.87, 12.3, 1234."""
    microseconds = milliseconds * 1e3
    return f"{microseconds:.0f}" if microseconds >= 99.95 else f"{microseconds:#.3g}"


def format_ms(milliseconds: float) -> str:
    """Three digits, in the unit that suits: 12.3 us, 4.56 ms, 7.89 s."""
    for unit, factor in (("us", 1e3), ("ms", 1.0)):
        # Below 999.5, three digits do not round up to 1000.
        if milliseconds * factor < 999.5:
            return f"{milliseconds * factor:#.3g} {unit}".replace(". ", " ")
    return f"{milliseconds / 1e3:#.3g} s".replace(". ", " ")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--markdown", action="store_true", help="this kernel's figures only")
    parser.add_argument("--workloads", nargs="+", default=["all"], metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        workloads = select(options.workloads, list(WORKLOADS))
    except ValueError as error:
        parser.error(str(error))
    records = [record for record in read(options.files) if record["wl"]["name"] in workloads]
    if not any(record["impl"] == KERNEL for record in records):
        parser.error(f"no record of {KERNEL} for these workloads")
    if options.markdown:
        print(build_markdown(records))
    else:
        show(build_table(records))


if __name__ == "__main__":
    main()
