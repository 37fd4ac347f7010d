"""What a release is made of, copied to be changed at will. The kernel under test is tests/'s."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import build as builder
from tools import kernel_builder

ROOT = builder.ROOT
sys.path.insert(0, str(ROOT / "tests"))

from conftest import device, kernel, operator, pytest_configure  # noqa: E402, F401

KERNEL = builder.Kernel.open(ROOT)
BACKENDS = [*KERNEL.backends, builder.UNIVERSAL]


@pytest.fixture
def checkout(tmp_path: Path) -> builder.Kernel:
    """What is built, tested and published. Ninja knows by the times of files what changed."""
    files = {name for backend in BACKENDS for name in KERNEL.inputs(backend)}
    files |= {*kernel_builder.source_set(KERNEL), "CARD.md", "benchmarks/benchmark.py"}
    for name in files:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "checkout" / name)
    return builder.Kernel.open(tmp_path / "checkout")


def commit_all(root: Path) -> str:
    """Makes the folder a git repository; commits all that is in it."""
    git = ["git", "-C", root, "-c", "user.name=Test", "-c", "user.email=test@localhost"]
    for arguments in (["init"], ["add", "."], ["commit", "--no-verify", "--message", "all"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    return builder.git_status(root)["commit"]


def edit(root: Path, name: str, line: str = "") -> None:
    with open(root / name, "a") as file:
        file.write(line + "\n")


def edit_metadata(variant: Path, **changes) -> None:
    """Replaces keys of metadata.json; None removes one."""
    data = {**json.loads((variant / "metadata.json").read_text()), **changes}
    text = json.dumps({key: value for key, value in data.items() if value is not None})
    (variant / "metadata.json").write_text(text)


def violations_of_releases(violations: list[str]) -> list[str]:
    """Skips where all that is wrong is that g++ is newer than 12, with which releases are built."""
    version = builder.output_of([builder.find_compiler(), "-dumpversion"]).split(".")[0].strip()
    newer = [v for v in violations if re.search(r"of manylinux|std::", v)]
    if violations and violations == newer and int(version) > 12:
        pytest.skip(f"g++ is {version}, a release is built with 12: {'; '.join(violations)}")
    return violations
