"""tools/release.py: what is checked out, counted and compared. `make release` does the building."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tools import build as builder
from tools import release
from tools.tests.releases import KERNEL, copy_checkout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit and a change that is not committed."""
    if shutil.which("git") is None:
        pytest.skip("git is missing")
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.setattr(release, "ROOT", root)
    git(root, "init")
    commit(root, "first")
    (root / "file").write_text("not committed")
    return root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(root: Path, text: str) -> str:
    (root / "file").write_text(text)
    git(root, "add", "file")
    git(root, "commit", "--no-verify", "--message", text)
    return git(root, "rev-parse", "HEAD")


def test_a_release_is_of_the_last_commit(repository: Path, tmp_path: Path) -> None:
    """Also the second time, whatever was changed in its checkout."""
    folder = tmp_path / "release"
    assert release.check_out(folder) == git(repository, "rev-parse", "HEAD")
    assert (folder / "file").read_text() == "first"
    (folder / "file").write_text("changed in the checkout")
    last = commit(repository, "second")
    assert release.check_out(folder) == last
    assert (folder / "file").read_text() == "second"
    assert builder.git_status(folder) == {"commit": last, "dirty": False}


def test_differences_are_found(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "inner").mkdir(parents=True)
        (folder / "same").write_text("same")
        (folder / "inner" / "changed").write_text(folder.name[:5].ljust(5))  # of one size
    (first / "gone").touch()
    (second / "inner" / "new").touch()
    assert release.differences(first, second) == ["gone", "inner/changed", "inner/new"]
    assert release.differences(first, first) == []


@pytest.mark.parametrize("backend", KERNEL.backends)
def test_the_bar_counts_the_steps_of_ninja(backend: str, tmp_path: Path) -> None:
    kernel = copy_checkout(tmp_path)
    toolkit = None
    if backend == "cuda":
        try:
            toolkit = builder.CudaToolkit.find()
        except builder.NvccMissing as error:
            pytest.skip(str(error))
    variant = builder.Variant(kernel, backend, "variant", ["9.0"], toolkit, "id")
    builder.write_ninja(variant, verbose=False)
    steps = (kernel.root / variant.work / "build.ninja").read_text().count("\nbuild ")
    assert release.Task(backend, "", []).steps(kernel) == steps
