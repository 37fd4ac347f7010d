"""Records as a table for people."""

from rich.table import Table
from rich.text import Text

from . import environment
from .implementations import BASELINE


def build_table(records: list[dict]) -> Table:
    """One row per record; speed-ups are over the baseline's row of the same workload and pass."""
    baselines = {_case(record): record for record in records if record["impl"] == BASELINE}
    env = records[0]["env"]
    table = Table(
        title=f"{environment.device_name(env)}, torch {env['torch']}, {env['threads']} CPU threads",
        caption="Times are medians. Errors are relative norms against float64, of the tensor that "
        "is furthest from what it may be.",
    )
    for column in ("workload", "dtype", "pass", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("time", "IQR", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("error", overflow="fold")

    previous = None
    for record in sorted(records, key=_case_order(records)):
        case = _case(record)
        if previous not in (None, case):
            table.add_section()
        names = case if case != previous else ("", "", "")
        table.add_row(*names, record["impl"], *_figures(record, baselines.get(case)))
        previous = case
    return table


def _case(record: dict) -> tuple[str, str, str]:
    return tuple(record["wl"][field] for field in ("name", "dtype", "pass"))


def _case_order(records: list[dict]):
    """Rows to be compared stand together, in the order their cases were first measured."""
    order = {}
    for record in records:
        order.setdefault(_case(record), len(order))
    return lambda record: order[_case(record)]


def _figures(record: dict, baseline: dict | None) -> tuple[str, str, str, Text]:
    """Time, IQR, speed-up and error; a wrong answer gets no speed-up, and sets none."""
    if record["err"] is not None:
        reason = f"{record['err']['type']}: {record['err']['msg']}".splitlines()[0]
        if record["err"]["type"] == "Unsupported":
            return "-", "-", "-", Text(f"unsupported: {record['err']['msg']}")
        return "-", "-", "-", Text(f"failed: {reason}", style="red")
    corr = record["corr"]
    # The tensor furthest from its tolerance; a NaN is further than any number.
    worst = max(
        corr["error"], key=lambda name: _nan_last(corr["error"][name] / corr["tolerance"][name])
    )
    error = Text(f"{corr['error'][worst]:.0e}")
    speed_up = "-"
    if not record["ok"]:
        error = Text(f"WRONG: {error} in {worst}", style="red")
    elif baseline is not None and baseline["ok"]:
        speed_up = f"{baseline['lat_ms']['p50'] / record['lat_ms']['p50']:.2f}x"
    median, iqr = record["lat_ms"]["p50"], record["lat_ms"]["iqr"]
    return format_ms(median), format_ms(iqr), speed_up, error


def _nan_last(number: float) -> float:
    return float("inf") if number != number else number


def format_ms(milliseconds: float) -> str:
    """Three digits, in the unit that suits: 12.3 us, 4.56 ms, 7.89 s."""
    for unit, factor in (("us", 1e3), ("ms", 1.0)):
        # Below 999.5, three digits do not round up to 1000.
        if milliseconds * factor < 999.5:
            return f"{milliseconds * factor:#.3g} {unit}".replace(". ", " ")
    return f"{milliseconds / 1e3:#.3g} s".replace(". ", " ")
