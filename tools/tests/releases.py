"""What a release is made of, copied to be changed at will."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import build as builder

ROOT = builder.ROOT
KERNEL = builder.Kernel.open(ROOT)
BACKENDS = [*KERNEL.backends, builder.UNIVERSAL]
INPUTS = {name for backend in BACKENDS for name in KERNEL.inputs(backend)} | {"build.toml"}
VARIANTS = sorted(path.parent for path in ROOT.glob("build/*/metadata.json"))


def copy_checkout(to: Path) -> builder.Kernel:
    """All that goes into a build, with its times, by which ninja knows what changed."""
    for name in INPUTS:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)
    return builder.Kernel.open(to)


def commit_all(root: Path) -> None:
    """Makes the folder a git repository with one commit of all that is in it."""
    if shutil.which("git") is None:
        pytest.skip("git is missing")
    git = ["git", "-C", root, "-c", "user.name=Test", "-c", "user.email=test@localhost"]
    for arguments in (["init"], ["add", "."], ["commit", "--no-verify", "--message", "all"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)


def edit(kernel: builder.Kernel, name: str) -> None:
    with open(kernel.root / name, "a") as file:
        file.write("\n")


def edit_metadata(variant: Path, **changes) -> None:
    """Replaces keys of metadata.json; None removes one."""
    file = variant / "metadata.json"
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def copy_release(to: Path) -> builder.Kernel:
    """The checkout, its variants as if built from a commit, and what is published beside them."""
    kernel = copy_checkout(to)
    for name in ("CARD.md", "benchmarks/benchmark.py"):
        (to / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, to / name)
    git = {"commit": "1" * 40, "dirty": False}
    for variant in VARIANTS:
        copy = Path(shutil.copytree(variant, to / "build" / variant.name))
        (copy / "__pycache__").mkdir(exist_ok=True)  # as where a variant was loaded from
        (copy / "__pycache__" / "layers.pyc").touch()
        edit_metadata(copy, provenance=builder.provenance(git))
    return kernel


def skip_without_abi_tools() -> None:
    pytest.importorskip("kernel_abi_check")
    for tool in ("nm", "readelf", "c++filt"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing (binutils)")


def skip_if_the_compiler_is_newer(violations: "list[str]") -> None:
    """A release is built with g++ 12; what newer ones need of the system is no fault of ours."""
    version = builder.output_of([builder.find_compiler(), "-dumpversion"]).split(".")[0].strip()
    newer = [v for v in violations if re.search(r"of manylinux|^std::", v)]
    if violations and violations == newer and int(version) > 12:
        pytest.skip(f"g++ is {version}, a release is built with 12: {'; '.join(violations)}")
