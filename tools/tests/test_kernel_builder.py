"""What kernel-builder builds and tests: source set, variants, and ci-test on such a copy."""

import re
import shutil
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


def test_what_more_than_the_source_set_has_is_told(checkout, tmp_path: Path) -> None:
    """A file that git does not track, a test that needs other files or packages. What is there
    without them is collected. ``python tools/kernel_builder.py --run`` runs it, as .ci/run does."""
    package = f"torch-ext/{KERNEL.package}"
    (checkout.root / package / "_ops.py").touch()  # as kernel-builder generates it
    assert kernel_builder.source_set(checkout) == kernel_builder.source_set(KERNEL)
    commit_all(checkout.root)
    assert kernel_builder.untracked(checkout) == []
    for name, line in (("more", "from tools import build"), ("others", "import scipy")):
        (checkout.root / "tests" / f"test_{name}.py").write_text(line)
    assert len(kernel_builder.untracked(checkout)) == 2
    (tmp_path / "ci").mkdir()
    done = kernel_builder.ci_test(
        checkout, VARIANT, tmp_path / "ci", "--collect-only", "-q", "-rsE"
    )
    assert "could not import 'hypothesis'" in done.stdout
    failed = re.findall(r"^ERROR source/tests/(\w+)\.py", done.stdout, re.M)
    assert failed == ["test_more", "test_others"], done.stdout


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
