"""The kernel under test and the fixtures are those of tests/."""

import json
import sys

import pytest

from benchmarks.__main__ import main
from benchmarks.operators import ROOT

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

from conftest import device, kernel, operator  # noqa: E402, F401


@pytest.fixture
def command(tmp_path):
    """Runs python -m benchmarks; returns its exit status and the records it has written so far."""
    out = tmp_path / "records.jsonl"

    def command(*options):
        status = main([*options, "--device", "cpu", "--out", str(out)])
        return status, [json.loads(line) for line in out.read_text().splitlines()]

    return command
