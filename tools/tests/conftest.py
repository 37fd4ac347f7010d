"""The kernel under test and the fixtures are those of tests/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from conftest import device, kernel, operator  # noqa: E402, F401
