"""The pages' examples run as they stand there."""

import re
import subprocess
import sys

import pytest

from tools.tests.releases import ROOT


def test_the_examples_of_the_pages_run() -> None:
    """On this checkout, by the LOCAL_KERNELS that conftest.py has set."""
    done = subprocess.run(
        [sys.executable, ROOT / "example.py"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^README.md, example \d:", done.stdout, re.M)) == 4, done.stdout
    assert len(re.findall(r"^CARD.md, example \d: ran", done.stdout, re.M)) == 1, done.stdout
    skipped = re.findall(r"^.*skipped.*$", done.stdout, re.M)
    if skipped:
        pytest.skip("; ".join(skipped))
