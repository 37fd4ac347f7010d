"""The kernel under test, as users get it, and the devices to test it on."""

import os
import re
from pathlib import Path

import implementations
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
    config.addinivalue_line("markers", "slow: what make test leaves to make test-all")


def pytest_report_header(config):
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"kernel: {Path(KERNEL.__file__).parent.name}; torch {torch.__version__}; GPU: {gpu}"


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        which = implementations.of_test(metafunc.module.__name__, metafunc.function.__name__)
        if len(which) > 1:
            metafunc.parametrize("kernel", which, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Leaves out what implementations.py does not list."""

    def is_listed(item):
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if not parameters or "kernel" not in parameters:
            return True
        name = item.function.__name__
        which = parameters["kernel"]
        return implementations.takes_part(which, item.module.__name__, name, parameters)

    items[:] = filter(is_listed, items)


@pytest.fixture(scope="session")
def kernel(request):
    """The kernel, computed by the implementation that the test is for."""
    implementation = getattr(request, "param", "native")
    kernel = implementations.load(implementation, KERNEL)
    with pytest.MonkeyPatch.context() as environment:
        for name in ("triton", "grid_sample"):  # if neither, embedding_bag on every device
            environment.setenv(f"MSDA_{name.upper()}", str(int(implementation == name)))
        yield kernel


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=OPERATORS)
def operator(request):
    """The name of a public operator; see cases.OPERATORS."""
    return request.param
