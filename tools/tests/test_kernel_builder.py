"""What kernel-builder builds and tests: source set, variants, and ci-test on such a copy."""

import re
from pathlib import Path

from conftest import KERNEL as KERNEL_MODULE

from tools import build as builder
from tools import kernel_builder, release
from tools.tests.conftest import KERNEL, ROOT, commit_all


def test_what_more_than_the_source_set_has_is_told(checkout, tmp_path: Path) -> None:
    """A file that git does not track, a test that needs other files or packages.
    ``python tools/kernel_builder.py --run`` collects and runs the others, as .ci/run does."""
    assert kernel_builder.source_set(checkout) == kernel_builder.source_set(KERNEL)
    commit_all(checkout.root)
    assert kernel_builder.untracked(checkout) == []
    for test in set(checkout.root.glob("tests/test_*.py")):
        test.unlink()
    for name, line in (("more", "from tools import build"), ("others", "import scipy")):
        (checkout.root / "tests" / f"test_{name}.py").write_text(line)
    assert len(kernel_builder.untracked(checkout)) == 2
    (tmp_path / "ci").mkdir()
    variant = Path(KERNEL_MODULE.__file__).parent
    done = kernel_builder.ci_test(checkout, variant, tmp_path / "ci", "--collect-only", "-q")
    failed = re.findall(r"^ERROR source/tests/(\w+)\.py", done.stdout, re.M)
    assert failed == ["test_more", "test_others"], done.stdout


def test_the_variants_are_those_of_the_documentation() -> None:
    """Those that make release builds, too, are among them, but for the one without native code."""
    variants = kernel_builder.variants(KERNEL) | {builder.UNIVERSAL_VARIANT: ("", [])}
    for name, archs in release.matrix(KERNEL).items():
        assert variants[name][1] == archs
    documented = (ROOT / "docs" / "release.md").read_text()
    assert [name for name in variants if f"`{name}`" not in documented] == []
