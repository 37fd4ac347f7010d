"""docs/what-holds.md names tests: each of them is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/what-holds.md").read_text()


def test_every_test_named_exists():
    named = re.findall(r"`(test_\w+)::(test_\w+)`", PAGE)
    assert len(named) > 40
    for file, name in named:
        source = (ROOT / "tests" / f"{file}.py").read_text()
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file}::{name}"


def test_every_line_names_one():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 30
    for row in rows:
        assert "::test_" in row or "`tests/fuzz.py`" in row or "by its source" in row, row
