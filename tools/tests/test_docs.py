"""The pages: their examples run, the tests they name exist, the card has every public name."""

import re
import subprocess
import sys

import pytest
from test_interface import INTERFACE

from tools import publish
from tools.tests.conftest import KERNEL, ROOT

PAGE = (ROOT / "docs/what-holds.md").read_text()


@pytest.mark.slow  # half a minute of torch.compile and ONNX
def test_the_examples_of_the_pages_run() -> None:
    """On this checkout, by the LOCAL_KERNELS that conftest.py has set."""
    command = [sys.executable, ROOT / "example.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for page in ("README.md", "CARD.md"):
        examples = re.findall("^```python$", (ROOT / page).read_text(), re.M)
        assert len(re.findall(rf"^{page}, example \d:", done.stdout, re.M)) == len(examples) > 0
    skipped = re.findall(r"^.*skipped.*$", done.stdout, re.M)
    if skipped:
        pytest.skip("; ".join(skipped))


def test_every_line_of_what_holds_names_a_test_that_exists() -> None:
    for file, name in re.findall(r"`(test_\w+)::(test_\w+)`", PAGE):
        source = (ROOT / "tests" / f"{file}.py").read_text()
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file}::{name}"
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 30
    for row in rows:
        assert "::test_" in row or "`tests/fuzz.py`" in row or "by its source" in row, row


def test_the_card_names_every_public_name() -> None:
    """As it is published: without what kernel-builder's variables stand for."""
    card = publish.render_card(KERNEL, KERNEL.repo_id)
    assert "{{" not in card and "{%" not in card and "\n\n\n" not in card
    names = {line.partition("(")[0] for line in INTERFACE.splitlines() if line[:1].strip()}
    names = {name for name in names if not name.endswith((".forward", ".reset_parameters"))}
    named = set(re.findall(r"^- `([\w.]+)", card, re.M))
    assert named == names, named ^ names
