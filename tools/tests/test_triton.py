"""torch-universal's Triton kernels are compiled for GPUs on which nobody here can run them."""

import os
import subprocess
import sys

import pytest

from tools import build as builder

# gfx942 is an MI300, gfx1100 a Radeon RX 7900.
COMPILE = """
import importlib, importlib.util, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

spec = importlib.util.spec_from_file_location("universal_variant", sys.argv[1] + "/__init__.py")
package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
kernels = importlib.import_module("universal_variant.universal.triton_kernels")
types = dict.fromkeys(["shapes", "starts"], "*i64")
types |= dict.fromkeys(["grad_value", "grad_references"], "*fp32")
for name in ("pixels", "queries", "heads", "channels", "reference_levels", "blocks"):
    types[name] = "i32"
for fused in (False, True):
    constants = dict(
        COUNTS=(4,) * 4, UNITS=(0.125,) * 4, UNIT_RESTS=(0.0,) * 4, POINTS=16, FUSED=fused,
        BOXES=fused, NEAREST=False, BLOCK_Q=16, BLOCK_C=32,
        FOR_VALUE=True, FOR_POINTS=True, FOR_REFERENCES=fused,
    )
    for kernel in (kernels._forward, kernels._backward):
        names = kernel.arg_names
        known = {n: "constexpr" if n in constants else types.get(n, "*fp16") for n in names}
        values = {(names.index(n),): x for n, x in constants.items() if n in names}
        for target in (("hip", "gfx942", 64), ("hip", "gfx1100", 32), ("cuda", 90, 32)):
            code = compile(ASTSource(kernel, known, values), target=GPUTarget(*target)).asm
            print("hsaco" if "hsaco" in code else "cubin" if "cubin" in code else code.keys())
"""


def test_they_compile_for_amd_and_nvidia(tmp_path) -> None:
    pytest.importorskip("triton")
    variant = builder.ROOT / "build" / builder.UNIVERSAL_VARIANT
    if not variant.is_dir():
        pytest.skip("no torch-universal: python tools/build.py --backend universal")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(variant)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hsaco", "hsaco", "cubin"] * 4
