"""``python -m benchmarks compare BEFORE AFTER``: has anything become slower, or wrong?

For each implementation and case that both files have, the ratio of the medians, after over before,
with its 95% confidence interval: both files' times are resampled with replacement. A case counts as
slower if the whole interval lies above the threshold, so that noise alone seldom fails a run.

Files of two machines, or of one machine under another load, are compared with --relative-to: each
time is then taken in units of that implementation's in the same file.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from .implementations import OURS
from .records import case_of, command, is_absent, latest, read, show

RESAMPLES = 2000
CONFIDENCE = 0.95


class Ratio(NamedTuple):
    """After over before: below 1 is faster."""

    estimate: float
    low: float
    high: float


def ratio_of_medians(before: list[np.ndarray], after: list[np.ndarray]) -> Ratio:
    """The ratio, with the interval that resampling gives it.

    Args:
        before, after: times, and, if the times are relative, those of what they are relative to.
    """
    generator = np.random.default_rng(0)

    def medians(times: np.ndarray) -> np.ndarray:
        return np.median(generator.choice(times, (RESAMPLES, len(times))), axis=1)

    def relative(numbers):
        return numbers[0] / numbers[1] if len(numbers) > 1 else numbers[0]

    estimate = relative([np.median(t) for t in after]) / relative([np.median(t) for t in before])
    resampled = relative([medians(t) for t in after]) / relative([medians(t) for t in before])
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(estimate), float(low), float(high))


class Comparison(NamedTuple):
    implementation: str
    case: tuple[str, str, str]
    ratio: Ratio | None  # None where one of the times does not count
    verdict: str  # "slower", "wrong", "faster" or ""

    @property
    def is_failure(self) -> bool:
        return self.verdict in ("slower", "wrong")


def compare(
    before: list[dict],
    after: list[dict],
    implementations: list[str],
    threshold: float,
    unit: str | None = None,
) -> list[Comparison]:
    """Compares what both have, of the implementations named, in the order of ``after``.

    Args:
        threshold: the ratio above which a case is slower, and below whose inverse it is faster.
        unit: the implementation that times are relative to.

    Raises:
        ValueError: there is nothing to compare.
    """
    old, new = (
        {(record["impl"], case_of(record)): record for record in latest(records)}
        for records in (before, after)
    )
    comparisons = []
    for key, record in new.items():
        name, case = key
        if name not in implementations or key not in old or is_absent(record):
            continue
        if not old[key]["ok"]:
            continue  # nothing to fall behind
        if not record["ok"]:
            comparisons.append(Comparison(name, case, None, "wrong"))
            continue
        units = [(unit, case)] if unit else []
        if any(not (key in file and file[key]["ok"]) for key in units for file in (old, new)):
            continue
        ratio = ratio_of_medians(*([_times(file[k]) for k in (key, *units)] for file in (old, new)))
        slower, faster = ratio.low > threshold, ratio.high < 1 / threshold
        comparisons.append(
            Comparison(name, case, ratio, "slower" if slower else "faster" if faster else "")
        )
    if not comparisons:
        raise ValueError(f"the files share no right result of {', '.join(implementations)}")
    return comparisons


def _times(record: dict) -> np.ndarray:
    return np.asarray(record["lat_ms"]["raw_times"])


def build_table(comparisons: list[Comparison], threshold: float, unit: str | None) -> Table:
    of = f"times over {unit}'s" if unit else "times"
    table = Table(
        title=f"after over before, of {of}; slower: above {threshold:g} with {CONFIDENCE:.0%}"
    )
    for column in ("workload", "dtype", "pass", "implementation"):
        table.add_column(column, no_wrap=True)
    table.add_column("ratio", justify="right")
    table.add_column("interval", justify="right")
    table.add_column("verdict")
    for name, case, ratio, verdict in comparisons:
        figures = ("-", "-")
        if ratio is not None:
            figures = f"{ratio.estimate:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"
        style = {"slower": "red", "wrong": "red", "faster": "green"}.get(verdict, "")
        table.add_row(*case, name, *figures, Text(verdict, style=style))
    ratios = [comparison.ratio.estimate for comparison in comparisons if comparison.ratio]
    if ratios:
        mean = float(np.exp(np.mean(np.log(ratios))))
        table.caption = f"geometric mean of {len(ratios)} ratios: {mean:.3f}"
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
        comparisons = compare(
            read([options.before]),
            read([options.after]),
            options.impls,
            options.threshold,
            options.relative_to,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    show(build_table(comparisons, options.threshold, options.relative_to))
    return int(any(comparison.is_failure for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main())
