"""tools/abi.py: what it finds in a library, and what it lets a kernel-builder link."""

import re
import subprocess
from pathlib import Path

import pytest

from tools import abi
from tools import build as builder

LINK_ALL = "-Wl,--no-as-needed"


def link(source: str, library: Path, *options: str | Path) -> Path:
    command = [builder.find_compiler(), "-shared", "-fPIC", "-xc++", "-", *options, "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    return library


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("namespace c10 { void f(); } void g() { c10::f(); }", [], r"c10::f\(\) has no version"),
        # Torch has it, but not yet in 2.10.
        ('extern "C" void torch_from_blob(); void g() { torch_from_blob(); }', [],
         "torch_from_blob has no version and is not of the stable ABI of torch 2.10"),
        ("namespace std { void f(); } void g() { std::f(); }", [], r"std::f\(\) has no version"),
        ('extern "C" void _Py_Secret(); void g() { _Py_Secret(); }', [], "_Py_Secret"),
        ('extern "C" int PyUnicode_AsUTF8(); int g() { return PyUnicode_AsUTF8(); }', [],
         "not of Python 3.9's limited API: .*PyUnicode_AsUTF8"),
        ("void g() {}", [LINK_ALL, "-lresolv"], "libresolv.so.2 is not of torch"),
        ("void g() {}", ["-Wl,-rpath,/opt"], "searches /opt for libraries"),
    ],
)  # fmt: skip
def test_what_is_found(source: str, options: list[str], message: str, tmp_path: Path) -> None:
    (violation,) = abi.violations(link(source, tmp_path / "x.so", *options), (2, 10), None)
    assert re.search(message, violation), violation


@pytest.mark.parametrize(("cuda", "found"), [(13, []), (None, ["libtorch_cuda.so"])])
def test_what_kernel_builder_links_is_taken(cuda: int | None, found: list, tmp_path) -> None:
    """torch's CUDA library in a CUDA variant, and the path that patchelf empties."""
    link("", tmp_path / "libtorch_cuda.so")
    options = [f"{LINK_ALL},-rpath,/opt", f"-L{tmp_path}", "-ltorch_cuda"]
    library = link("", tmp_path / "x.so", *options)
    library.write_bytes(library.read_bytes().replace(b"\0/opt\0", b"\0\0opt\0"))
    violations = abi.violations(library, (2, 10), cuda)
    assert [violation.split()[0] for violation in violations] == found
