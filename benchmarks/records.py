"""Files of records, one JSON object a line: written as they come, so that an end loses nothing."""

import argparse
import json
import time
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

    Raises:
        ValueError: a line is no JSON object.
    """
    records = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
    return records


def case_of(record: dict) -> tuple[str, str, str]:
    """(workload, dtype, pass): records of the same case can be compared."""
    return tuple(record["wl"][field] for field in ("name", "dtype", "pass"))


def is_absent(record: dict) -> bool:
    return (record["err"] or {}).get("type") in ABSENT


def latest(records: Iterable[dict]) -> list[dict]:
    """Of records of the same implementation and case the last, in the order of the first."""
    return list({(record["impl"], case_of(record)): record for record in records}.values())


def failed(error: Exception, kind: str | None = None) -> dict:
    """The fields of a record's results where there are none, and why."""
    return {
        "lat_ms": None,
        "compile_ms": None,
        "peak_bytes": None,
        "ok": False,
        "absmax": None,
        "corr": {},
        "err": {"type": kind or type(error).__name__, "msg": str(error)},
    }


def command(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command of the suite, which shows its module's docstring as it is."""
    return argparse.ArgumentParser(
        f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def command_on_files(name: str, description: str) -> argparse.ArgumentParser:
    """A command that makes a folder's files of records."""
    parser = command(name, description)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    return parser


def check_one_device(records: Iterable[dict]) -> None:
    """Raises ValueError where records are of several devices, and so not to be compared."""
    devices = sorted({environment.device_name(r["env"]) for r in records if "cpu" in r["env"]})
    if len(devices) > 1:
        raise ValueError(f"the records are of {', '.join(devices)}, expected one device")


class Results:
    """The file that a command appends its records to, and what it has of an earlier run."""

    def __init__(self, path: Path, earlier: list[dict]):
        self.path = path
        self.earlier = earlier
        self._done = {
            _identity(record["impl"], record["wl"], record["env"])
            for record in earlier
            if record["err"] is None or is_absent(record)
        }

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
            words = [slug, *([kind] if kind else []), time.strftime("%Y%m%d-%H%M%S")]
            path = RESULTS / f"{'-'.join(words)}.local.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = []
        if resume and path.exists():
            _drop_unfinished_line(path)
            earlier = read([path])
        return cls(path, earlier)

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


def _drop_unfinished_line(path: Path) -> None:
    """A run that was killed may have left half a record."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
