"""The kernel under test, as users get it, and the devices to test it on."""

import os
import re
from pathlib import Path

import kernels
import pytest
import torch
from cases import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
# Python has no reader of TOML before 3.11.
REPO_ID = re.search(r'^repo-id = "(.+)"', (ROOT / "build.toml").read_text(), re.M)[1]
os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")


def load():
    """The kernel, and the backend that was asked for: None is the loader's choice.

    The loader chooses by the build of torch. With CUDA that is the CUDA variant, which serves CPU
    tensors too. A machine without a GPU may have built the CPU variant alone; where kernel-builder
    runs the tests, it has the CUDA variant alone.
    """
    if torch.version.cuda and not torch.cuda.is_available():
        try:
            return kernels.get_kernel(REPO_ID, version=1, backend="cpu"), "cpu"
        except FileNotFoundError:
            pass
    return kernels.get_kernel(REPO_ID, version=1), None


KERNEL, BACKEND = load()

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: the subset kernel-builder runs; under a minute")


def pytest_report_header(config):
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"kernel: {Path(KERNEL.__file__).parent.name}; torch {torch.__version__}; GPU: {gpu}"


@pytest.fixture(scope="session")
def kernel():
    return KERNEL


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=OPERATORS)
def operator(request):
    """The name of a public operator; see cases.OPERATORS."""
    return request.param
