"""torch-universal's Triton kernels are compiled for GPUs on which nobody here can run them: both,
plain and fused."""

import os
import subprocess
import sys

import pytest

from tools import build as builder

COMPILE = """
import importlib, sys
from pathlib import Path
import kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

package = kernels.get_local_kernel(Path(sys.argv[1]))
module = importlib.import_module(package.__name__ + ".universal.triton_kernels")
types = dict.fromkeys(["shapes", "starts"], "*i64")
types |= dict.fromkeys(["grad_value", "grad_references"], "*fp32")
for name in ("pixels", "queries", "heads", "channels", "reference_levels", "blocks"):
    types[name] = "i32"
for fused in (False, True):
    constants = dict(
        COUNTS=(2, 1), UNITS=(0.5, 1.0), UNIT_RESTS=(0.0, 0.0), POINTS=3, NEAREST=False,
        BLOCK_Q=16, BLOCK_C=32, FUSED=fused, BOXES=fused,
        FOR_VALUE=True, FOR_POINTS=True, FOR_REFERENCES=fused,
    )
    for kernel in (module._forward, module._backward):
        names = kernel.arg_names
        known = {n: "constexpr" if n in constants else types.get(n, "*fp16") for n in names}
        values = {(names.index(n),): x for n, x in constants.items() if n in names}
        code = compile(ASTSource(kernel, known, values), target=GPUTarget(*eval(sys.argv[2]))).asm
        print(*code.keys() & {"hsaco", "cubin"})
"""


@pytest.mark.parametrize(
    "target",
    [
        ("hip", "gfx942", 64),  # an MI300
        pytest.param(("hip", "gfx1100", 32), marks=pytest.mark.slow),  # a Radeon RX 7900
        pytest.param(("cuda", 90, 32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_they_compile(target: tuple, tmp_path) -> None:
    pytest.importorskip("triton")
    variant = builder.ROOT / "build" / builder.UNIVERSAL_VARIANT
    if not variant.is_dir():
        pytest.skip("no torch-universal: python tools/build.py --backend universal")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(variant), repr(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cubin" if target[0] == "cuda" else "hsaco"] * 4
