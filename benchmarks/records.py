"""Files of records, one JSON object a line: written as they come, so that an end loses nothing."""

import argparse
import fnmatch
import json
import math
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console, RenderableType

from . import environment
from .implementations import KERNEL

RESULTS = Path(__file__).parent / "results"


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
    return workload["name"], workload["dtype"], workload["pass"]


def is_absent(record: dict) -> bool:
    """What is not offered is neither wrong nor worth another try."""
    return (record["err"] or {}).get("type") == "Unsupported"


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
    corr, worst = record["corr"], (-1.0, "")
    for name, error in corr["error"].items():
        share = error / corr["tolerance"][name]
        worst = max(worst, (math.inf if share != share else share, f"{error:.0e} in {name}"))
    text = f"{corr['not_finite'][0]} is not finite" if corr.get("not_finite") else worst[1]
    return text if record["ok"] else f"WRONG: {text}"


def failed(error: Exception) -> dict:
    """The fields of a record's results where there are none, and why."""
    reason = {"type": type(error).__name__, "msg": str(error)}
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


def add_names(
    parser: argparse.ArgumentParser, option: str, known: Iterable[str], default: list[str] | str
) -> None:
    """An option that takes names of ``known`` or globs, and gives the names, in their order.

    ``default`` may be text for the help; without names there is None then.
    """
    known = list(known)

    class Select(argparse.Action):
        def __call__(self, parser, options, patterns, _):
            chosen = set()
            for pattern in patterns:
                matches = fnmatch.filter(known, "*" if pattern == "all" else pattern)
                if not matches:
                    parser.error(f"{option}: {pattern!r} matches none of: {', '.join(known)}")
                chosen.update(matches)
            setattr(options, self.dest, [name for name in known if name in chosen])

    names, shown = (None, default) if isinstance(default, str) else (default, " ".join(default))
    text = f"names, globs or all; default: {shown}; known: {', '.join(known)}"
    parser.add_argument(option, nargs="+", metavar="NAME", action=Select, default=names, help=text)


def add_number(parser: argparse.ArgumentParser, option: str, about: str, **settings) -> None:
    """An option that takes whole numbers from 1 on."""

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text}, expected at least 1")
        return int(text)

    parser.add_argument(option, type=positive, metavar="N", help=about, **settings)


def add_run(parser: argparse.ArgumentParser, reps: str) -> None:
    """The options that each command has that measures; ``reps``: what it counts, for how long."""

    def device(name: str) -> torch.device:
        if not name.startswith("cuda"):
            return torch.device(name)
        # Named with its index: what is measured is always the current device.
        torch.cuda.set_device(index := torch.device(name).index or 0)
        return torch.device("cuda", index)

    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="default: %(default)s")
    add_number(parser, "--reps", reps)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--resume", action="store_true", help="skip what --out has measured")


class Results:
    """The file that a command appends its records to, and what it has of an earlier run.

    Args:
        options: those of ``add_run``. Without --out, a new file in results/ is named for the
            device, the kind and the time.
    """

    def __init__(self, options: argparse.Namespace, kind: str = ""):
        self.path = options.out
        if self.path is None:
            if options.resume:
                sys.exit("error: --resume needs --out FILE, the file to go on with")
            device = environment.device_name(environment.describe(options.device))
            slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
            self.path = RESULTS / time.strftime(f"{slug}{kind}-%Y%m%d-%H%M%S.local.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        resumes = options.resume and self.path.exists()
        if resumes:
            text = self.path.read_text(encoding="utf-8")
            # A run that was killed may have left half a record.
            self.path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        try:
            self.earlier = read([self.path]) if resumes else []
            done = [record for record in self.earlier if record["err"] is None or is_absent(record)]
            self._done = {_identity(record["impl"], record["wl"], record["env"]) for record in done}
        except (ValueError, KeyError) as error:
            sys.exit(f"error: {self.path} is no file of records: {error!r}")

    def has(self, implementation: str, workload: dict, env: dict) -> bool:
        """Whether an earlier run measured this, on this device with this torch."""
        return _identity(implementation, workload, env) in self._done

    def collect(
        self, records: Iterator[dict], build_table: Callable[[list[dict]], RenderableType]
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
        ours = [record for record in collected if record["impl"].startswith(KERNEL)]
        return int(not all(record["ok"] or is_absent(record) for record in ours))


def show(renderable: RenderableType) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(renderable)


def _identity(implementation: str, workload: dict, env: dict) -> tuple:
    names = (workload[field] for field in ("name", "dtype", "pass"))
    return (implementation, *names, environment.device_name(env), env["torch"], env["threads"])
