"""Files of records, one JSON object a line: written as they come, so that an end loses nothing."""

import argparse
import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console, RenderableType

from . import environment

RESULTS = Path(__file__).parent / "results"
# What is not there is neither wrong nor worth another try in the same run.
ABSENT = ("Unavailable", "Unsupported")


def read(files: Iterable[Path]) -> list[dict]:
    """The records of all files, in their order.

    A record without ``env`` has that of the one before it.

    Raises:
        ValueError: a line is no JSON object.
    """
    records = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
            if records and "env" in records[-1]:
                record.setdefault("env", records[-1]["env"])
            records.append(record)
    return records


# Of a published record; None: as it is. Times of single calls are for ``compare`` alone.
_PUBLISHED = {
    "ts": None,
    "impl": None,
    "wl": dict.fromkeys(("name", "dtype", "pass")),
    "env": dict.fromkeys(
        "torch cuda gpu cpu device threads nvidia_smi copy_gb_per_s transformers triton commit"
        "".split()
    ),
    "lat_ms": dict.fromkeys(("p50", "iqr", "sets")),
    **dict.fromkeys("peak_bytes ok err floor_ms ceiling_ms images_per_s ratio".split()),
    "corr": dict.fromkeys(("error", "tolerance", "not_finite")),
}


def publish(file: Path, check: bool = False) -> bool:
    """Takes from a file in results/ what no page and no command needs; True if there was some.

    Files that ``compare`` reads (guard-*), of this machine (.local) and of a script of its own are
    left as they are. Numbers keep five digits.
    """
    records = read([file])
    if file.name.startswith("guard-") or ".local" in file.name or "impl" not in records[0]:
        return False
    lines, env = [], None
    for record in records:
        kept = _published(record, _PUBLISHED)
        if kept["env"] == env:
            del kept["env"]
        env = kept.get("env", env)
        lines.append(json.dumps(kept) + "\n")
    stale = "".join(lines) != file.read_text(encoding="utf-8")
    if stale and not check:
        file.write_text("".join(lines), encoding="utf-8")
    return stale


def _published(value, names: dict | None):
    if isinstance(value, dict):
        kept = [name for name in names or value if name in value]
        return {name: _published(value[name], names and names[name]) for name in kept}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def case_of(record: dict) -> tuple[str, str, str]:
    """(workload, dtype, pass): records of the same case can be compared."""
    workload = record["wl"]
    return workload["name"], workload["dtype"], workload.get("pass", "call")


def is_absent(record: dict) -> bool:
    return (record["err"] or {}).get("type") in ABSENT


def latest(records: Iterable[dict]) -> list[dict]:
    """Of records of the same implementation and case the last, in the order of the first."""
    return list({(record["impl"], case_of(record)): record for record in records}.values())


def by_case(records: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """The records of each (workload, dtype, pass) by implementation; of the same, the last."""
    cases: dict[tuple, dict[str, dict]] = {}
    for record in records:
        cases.setdefault(case_of(record), {})[record["impl"]] = record
    return cases


def error_of(record: dict) -> str:
    """Of the tensor furthest from its tolerance, a NaN being furthest; or what was in the way."""
    if record["err"] is not None:
        reason = f"{record['err']['type']}: {record['err']['msg']}".splitlines()[0]
        return reason[0].lower() + reason[1:] if is_absent(record) else f"failed: {reason}"
    corr, worst = record["corr"], (-1.0, f"off by {record.get('absmax') or 0:.0e}")
    for name, error in corr.get("error", {}).items():
        share = error / corr["tolerance"][name]
        worst = max(worst, (math.inf if share != share else share, f"{error:.0e} in {name}"))
    text = f"{corr['not_finite'][0]} is not finite" if corr.get("not_finite") else worst[1]
    return text if record["ok"] else f"WRONG: {text}"


def failed(error: Exception, kind: str | None = None) -> dict:
    """The fields of a record's results where there are none, and why."""
    reason = {"type": kind or type(error).__name__, "msg": str(error)}
    none = dict.fromkeys(("lat_ms", "compile_ms", "peak_bytes", "absmax"))
    return {**none, "ok": False, "corr": {}, "err": reason}


def recorder(env: dict) -> Callable[[str, dict, dict, dict], dict]:
    """A function that makes a run's records, of (implementation, its tags, workload, results)."""
    run = uuid.uuid4().hex

    def record(implementation: str, tags: dict, workload: dict, results: dict) -> dict:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        head = {"ts": now, "run": run, "impl": implementation, "tags": tags}
        return {**head, "wl": workload, "env": env, **results}

    return record


def command(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command of the suite, which shows its module's docstring as it is."""
    return argparse.ArgumentParser(
        f"python -m benchmarks {name}".strip(),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_names(parser: argparse.ArgumentParser, option: str, known: Iterable[str], default: str):
    """An option that takes names of ``known``; ``default`` is what its help says."""
    text = f"names, globs or all; default: {default}; known: {', '.join(known)}"
    parser.add_argument(option, nargs="+", metavar="NAME", help=text)


def add_run(parser: argparse.ArgumentParser, reps: str) -> None:
    """The options that each command has that measures; ``reps``: what it counts, for how long."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument("--reps", type=int, help=reps)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--resume", action="store_true", help="skip what --out has measured")


class Results:
    """The file that a command appends its records to, and what it has of an earlier run."""

    def __init__(self, path: Path, earlier: list[dict]):
        self.path = path
        self.earlier = earlier
        done = [record for record in earlier if record["err"] is None or is_absent(record)]
        self._done = {_identity(record["impl"], record["wl"], record["env"]) for record in done}

    @classmethod
    def open(cls, path: Path | None, kind: str, device: torch.device, resume: bool) -> "Results":
        """Opens ``path``, or a new file in results/ that is named for the device, kind and time.

        Raises:
            ValueError: a run is to be resumed and ``path`` is None, or no file of records.
        """
        if path is None:
            if resume:
                raise ValueError("--resume needs --out FILE, the file to go on with")
            slug = environment.slug(environment.describe(device))
            path = RESULTS / time.strftime(f"{slug}{kind}-%Y%m%d-%H%M%S.local.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (resume and path.exists()):
            return cls(path, [])
        text = path.read_text(encoding="utf-8")
        # A run that was killed may have left half a record.
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        return cls(path, read([path]))

    def has(self, implementation: str, workload: dict, env: dict) -> bool:
        """Whether an earlier run measured this, on this device with this torch."""
        return _identity(implementation, workload, env) in self._done

    def collect(
        self,
        records: Iterator[dict],
        build_table: Callable[[list[dict]], RenderableType],
        is_ours: Callable[[dict], bool],
    ) -> int:
        """Writes the records as they come, then shows them with the earlier ones.

        Returns:
            The command's exit status: 1 if a record of this project's own failed or was wrong.
        """
        collected = list(self.earlier)
        try:
            with self.path.open("a", encoding="utf-8") as lines:
                for record in records:
                    collected.append(record)
                    print(json.dumps(record), file=lines, flush=True)
        finally:  # an interrupted run has measured something, too
            if collected:
                collected = latest(collected)
                show(build_table(collected))
                Console().print(f"Written to {self.path}", highlight=False, soft_wrap=True)
        wrong = [r for r in collected if is_ours(r) and not r["ok"] and not is_absent(r)]
        return int(bool(wrong))


def show(renderable: RenderableType) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(renderable)


def _identity(implementation: str, workload: dict, env: dict) -> tuple:
    names = (workload[field] for field in ("name", "dtype", "pass"))
    return (implementation, *names, environment.device_name(env), env["torch"], env["threads"])
