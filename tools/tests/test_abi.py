"""tools/abi.py: what it finds in a library, and what it lets a kernel-builder link."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tools import abi
from tools import build as builder

LINK_ALL = "-Wl,--no-as-needed"


@pytest.fixture(autouse=True)
def tools() -> None:
    pytest.importorskip("kernel_abi_check")
    for tool in ("nm", "readelf", "c++filt"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing (binutils)")


def link(source: str, library: Path, *options: "str | Path") -> Path:
    command = [builder.find_compiler(), "-shared", "-fPIC", "-xc++", "-", *options, "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    return library


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("namespace c10 { void f(); } void g() { c10::f(); }", [], r"c10::f\(\) has no version"),
        ('extern "C" void aoti_torch_new(); void g() { aoti_torch_new(); }', [], "aoti_torch_new"),
        ("namespace std { void f(); } void g() { std::f(); }", [], r"std::f\(\) has no version"),
        ('extern "C" void _Py_Secret(); void g() { _Py_Secret(); }', [], "_Py_Secret"),
        ('extern "C" int PyUnicode_AsUTF8(); int g() { return PyUnicode_AsUTF8(); }', [],
         "not of Python 3.9's limited API: .*PyUnicode_AsUTF8"),
        ("void g() {}", [LINK_ALL, "-lresolv"], "libresolv.so.2 is not of torch"),
        ("void g() {}", ["-Wl,-rpath,/opt"], "searches /opt for libraries"),
    ],
)  # fmt: skip
def test_what_is_found(source: str, options: "list[str]", message: str, tmp_path: Path) -> None:
    (violation,) = abi.violations(link(source, tmp_path / "x.so", *options), (2, 10), None)
    assert re.search(message, violation), violation


@pytest.mark.parametrize(("cuda", "found"), [(13, []), (None, ["libtorch_cuda.so"])])
def test_what_kernel_builder_links_is_taken(cuda: "int | None", found: list, tmp_path) -> None:
    """torch's CUDA library in a CUDA variant, and the path that patchelf empties."""
    link("", tmp_path / "libtorch_cuda.so")
    options = [f"{LINK_ALL},-rpath,/opt", f"-L{tmp_path}", "-ltorch_cuda"]
    library = link("", tmp_path / "x.so", *options)
    library.write_bytes(library.read_bytes().replace(b"\0/opt\0", b"\0\0opt\0"))
    violations = abi.violations(library, (2, 10), cuda)
    assert [violation.split()[0] for violation in violations] == found


def test_the_stable_shims_are_those_of_the_release() -> None:
    """2.13 has more functions than 2.10, and both have what every kernel needs."""
    if torch.__version__ < (2, 13):
        pytest.skip(f"torch {torch.__version__} knows no later release than its own")
    shims = abi.stable_shims((2, 10))
    assert {"aoti_torch_library_init_impl", "torch_parallel_for"} <= shims
    assert shims < abi.stable_shims((2, 13))
