"""What kernel-builder builds and tests: source set, variants, and ci-test on such a copy."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KERNEL as KERNEL_MODULE

from tools import build as builder
from tools import kernel_builder, release
from tools.tests.releases import KERNEL, commit_all

VARIANT = Path(KERNEL_MODULE.__file__).parent


@pytest.fixture
def checkout(tmp_path: Path) -> builder.Kernel:
    """The source set, to be changed."""
    root = tmp_path / "checkout"
    for name in kernel_builder.source_set(KERNEL):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(KERNEL.root / name, root / name)
    return builder.Kernel.open(root)


def test_ci_test_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine with other work, threads wait for each other: 85 s in place of 18.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = kernel_builder.ci_test(KERNEL, VARIANT, tmp_path, "-q", "-m", "kernels_ci")
    passed = re.search(r"^(\d+) passed", done.stdout, re.M)
    assert done.returncode == 0 and int(passed[1]) > 400, done.stdout


def test_every_test_is_collected(tmp_path: Path) -> None:
    done = kernel_builder.ci_test(KERNEL, VARIANT, tmp_path, "--collect-only", "-q", "-rs")
    assert done.returncode == 0, done.stdout
    assert "could not import 'hypothesis'" in done.stdout
    assert "test_transformers.py::test_model" in done.stdout


def test_a_test_that_needs_more_is_told(checkout: builder.Kernel, tmp_path: Path) -> None:
    (checkout.root / "tests" / "test_more.py").write_text("from tools import build\n")
    (checkout.root / "tests" / "test_others.py").write_text("import scipy\n")
    folder = tmp_path / "ci"
    done = kernel_builder.ci_test(checkout, VARIANT, folder, "--collect-only", "-q")
    assert done.returncode != 0
    for name in ("test_more", "test_others"):
        assert f"ERROR source/tests/{name}.py" in done.stdout, done.stdout


def test_a_file_that_git_does_not_track_is_named(checkout: builder.Kernel) -> None:
    """What kernel-builder generates is no part of the source set."""
    package = f"torch-ext/{KERNEL.package}"
    (checkout.root / package / "_ops.py").touch()
    (checkout.root / "torch-ext" / "registration.h").touch()
    assert kernel_builder.source_set(checkout) == kernel_builder.source_set(KERNEL)
    assert kernel_builder.untracked(checkout) == []  # without git
    commit_all(checkout.root)
    assert kernel_builder.untracked(checkout) == []
    (checkout.root / package / "new.py").touch()
    assert kernel_builder.untracked(checkout) == [f"{package}/new.py"]


def test_the_variants_are_those_of_the_documentation() -> None:
    """Those that make release builds, too, are among them, but for the one without native code."""
    variants = kernel_builder.variants(KERNEL)
    released = release.matrix(KERNEL)
    assert released.pop(builder.UNIVERSAL_VARIANT) == []
    for name, archs in released.items():
        assert variants[name][1] == archs
    documented = (KERNEL.root / "docs" / "release.md").read_text()
    for name in (*variants, builder.UNIVERSAL_VARIANT):
        assert f"`{name}`" in documented, name


def test_a_cuda_variant_alone_serves_torch_with_cuda_and_no_gpu(tmp_path: Path) -> None:
    """ci-test gives no other; here the CPU variant poses as it."""
    if "-cpu-" not in VARIANT.name:
        pytest.skip(f"{VARIANT.name} is what suits this machine")
    only = tmp_path / VARIANT.name.replace("-cpu-", "-cu130-")
    shutil.copytree(VARIANT, only)
    script = f"""
import os, sys
os.environ["LOCAL_KERNELS"] = "{KERNEL.repo_id}={tmp_path}"
sys.path.insert(0, {str(KERNEL.root / "tests")!r})
import torch
torch.version.cuda = "13.0"
from conftest import BACKEND, KERNEL
print(BACKEND, KERNEL.__file__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["None", str(only / "__init__.py")], done.stderr
