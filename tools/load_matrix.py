"""Load what was built under other releases of torch and Python, and run the kernels_ci tests there.

    python tools/load_matrix.py                                   # all that can be had here
    python tools/load_matrix.py --torch 2.11 --python python3.12

The variants in build/ keep to torch's stable ABI and Python's limited API, so the very files that
were built under one release have to work under the others. Each combination gets an environment of
its own, which is removed afterwards: a CUDA build of torch with what it needs is some 3 GB. Prints
the table of docs/release.md.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = ["2.10", "2.11", "2.12", "2.13", "2.14"]
PYTHON = ["python3.10", "python3.11", "python3.12", "python3.13"]
NEEDED = ("kernels", "pytest")  # of requirements.txt, beside torch
HEADER = """\
| torch | Python | variant | GPU | kernels_ci |
|---|---|---|---|---|"""


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.split("==")[0] in NEEDED]


def call(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def test(python: str, torch: str) -> tuple[str, bool]:
    """A row of the table, and whether all tests passed."""
    with tempfile.TemporaryDirectory(prefix="load-matrix-") as folder:
        environment = Path(folder) / "environment"
        made = call([python, "-m", "venv", environment])
        if made.returncode == 0:
            pip = [environment / "bin" / "python", "-m", "pip", "install", "--no-cache-dir"]
            made = call([*pip, f"torch=={torch}.*", *requirements()])
        if made.returncode != 0:
            return f"| {torch} | {python} | | | not installed: {last_line(made.stdout)} |", False
        pytest = [environment / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider"]
        done = call(
            [*pytest, "-m", "kernels_ci", "tests"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "LOCAL_KERNELS"},
        )
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
    found = re.search(r"kernel: (\S+); torch (\S+); GPU: (.*)", done.stdout)
    variant, version, gpu = found.groups() if found else ("", torch, "")
    python = re.search(r"Python (\d+\.\d+\.\d+)", done.stdout)
    result = re.sub(r" in .*|=| ?\d+ (deselected|warnings?),?", "", last_line(done.stdout)).strip()
    row = [version, python[1] if python else "", variant, gpu, result.rstrip(",")]
    return f"| {' | '.join(row)} |", done.returncode == 0


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=TORCH, help="releases (%(default)s)")
    parser.add_argument("--python", nargs="+", default=PYTHON, help="interpreters (%(default)s)")
    args = parser.parse_args()
    print(HEADER, flush=True)
    failed, missing = False, []
    for python in args.python:
        if shutil.which(python) is None:
            missing.append(python)
            continue
        for torch in args.torch:
            row, passed = test(python, torch)
            failed |= not passed
            print(row, flush=True)
    if missing:
        print(f"not here: {', '.join(missing)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
