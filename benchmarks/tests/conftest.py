"""The kernel under test and the fixtures are those of tests/."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from conftest import device, kernel, operator  # noqa: E402, F401


@pytest.fixture
def command(tmp_path):
    """Runs python -m benchmarks; returns its exit status and the records it has written so far."""
    from benchmarks.__main__ import main

    def command(*options):
        out = tmp_path / "records.jsonl"
        first = options[:1] if options[0] == "models" else ()
        more = ("--device", "cpu", "--out", str(out))
        status = main([*first, *more, *options[len(first) :]])
        return status, [json.loads(line) for line in out.read_text().splitlines()]

    return command
