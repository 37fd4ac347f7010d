"""``python -m benchmarks compare BEFORE AFTER``: has anything become slower, or wrong?

For each implementation and case that both files have, the ratio of the medians, after over before,
with its 95% confidence interval: both files' times are resampled with replacement. A case counts as
slower if the whole interval lies above the threshold, so that noise alone seldom fails a run.

Files of two machines, or of one machine under another load, are compared with --relative-to: each
time is then taken in units of that implementation's in the same file.
"""

from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from .implementations import OURS
from .records import case_of, command, is_absent, read, show

CONFIDENCE = 0.95


def ratio_of_medians(before: list, after: list, *units: list) -> tuple[float, float, float]:
    """The ratio, and the interval that resampling gives it.

    Args:
        before, after: times.
        units: what they are relative to, if anything: the times of it, before and after.
    """
    from scipy.stats import bootstrap

    def ratio(before, after, *units, axis=-1):
        result = np.median(after, axis) / np.median(before, axis)
        return result * ratio(*units[::-1], axis=axis) if units else result

    times = (before, after, *units)
    found = bootstrap(
        times, ratio, n_resamples=2000, confidence_level=CONFIDENCE, method="percentile", rng=0
    )
    return float(ratio(*times)), *map(float, found.confidence_interval)


def compare(
    before: list[dict],
    after: list[dict],
    implementations: list[str],
    threshold: float,
    unit: str | None = None,
) -> list[tuple[tuple, str, tuple | None, str]]:
    """What both have, of the implementations named: (case, implementation, ratio, verdict).

    The verdict is "slower", "wrong", "faster" or ""; what is wrong has no ratio.

    Args:
        threshold: the ratio above which a case is slower, and below whose inverse it is faster.
        unit: the implementation that times are relative to.

    Raises:
        ValueError: there is nothing to compare.
    """
    old, new = ({(r["impl"], case_of(r)): r for r in file} for file in (before, after))
    found = []
    for (name, case), record in new.items():
        keys = [(name, case), *([(unit, case)] if unit else [])]
        if name not in implementations or is_absent(record) or not old.get(keys[0], {}).get("ok"):
            continue  # nothing to fall behind
        if not record["ok"]:
            found.append((case, name, None, "wrong"))
        elif all(file.get(key, {}).get("ok") for key in keys for file in (old, new)):
            ratio = ratio_of_medians(
                *(file[key]["lat_ms"]["raw_times"] for key in keys for file in (old, new))
            )
            faster = "faster" if ratio[2] < 1 / threshold else ""
            found.append((case, name, ratio, "slower" if ratio[1] > threshold else faster))
    if not found:
        raise ValueError(f"the files share no right result of {', '.join(implementations)}")
    return found


def build_table(comparisons: list, threshold: float, unit: str | None) -> Table:
    of = f"times over {unit}'s" if unit else "times"
    title = f"after over before, of {of}; slower: above {threshold:g} with {CONFIDENCE:.0%}"
    table = Table(title=title)
    for column in ("workload", "dtype", "pass", "implementation", "ratio", "interval", "verdict"):
        table.add_column(column, no_wrap=True)
    for case, name, ratio, verdict in comparisons:
        figures = ("{:.3f}".format(*ratio), "{1:.3f} to {2:.3f}".format(*ratio)) if ratio else "--"
        style = {"slower": "red", "wrong": "red", "faster": "green"}.get(verdict, "")
        table.add_row(*case, name, *figures, Text(verdict, style=style))
    return table


def main(arguments: list[str] | None = None) -> int:
    """Compares two files; the exit status is 1 if something is slower or wrong."""
    parser = command("compare", __doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="JSON lines")
    parser.add_argument("after", type=Path, metavar="AFTER", help="JSON lines")
    parser.add_argument("--impls", nargs="+", default=list(OURS), metavar="NAME")
    parser.add_argument("--threshold", type=float, default=1.1, help="default: %(default)s")
    parser.add_argument("--relative-to", metavar="NAME", help="an implementation in both files")
    options = parser.parse_args(arguments)
    if options.threshold < 1:
        parser.error(f"--threshold is {options.threshold}, expected at least 1")
    try:
        files = read([options.before]), read([options.after])
        found = compare(*files, options.impls, options.threshold, options.relative_to)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    show(build_table(found, options.threshold, options.relative_to))
    return int(any(verdict in ("slower", "wrong") for *_, verdict in found))
