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
types |= dict.fromkeys(["pixels", "queries", "own_levels", "blocks"], "i32")

def compiled(kernel, reference, target, **options):
    constants = dict(
        HEADS=8, CHANNELS=32, COUNTS=(2, 1), UNITS=(0.5, 1.0), UNIT_RESTS=(1e-9, 0.0), POINTS=3,
        REFERENCE=reference, NEAREST=False, LARGE=False, STEP=1, BLOCK_Q=16, BLOCK_C=32,
        FOR_VALUE=True, FOR_POINTS=True, FOR_REFERENCES=reference > 0,
    )
    names = kernel.arg_names
    known = {n: "constexpr" if n in constants else types.get(n, "*fp16") for n in names}
    values = {(names.index(n),): x for n, x in constants.items() if n in names}
    source = ASTSource(kernel, known, values)
    return compile(source, target=GPUTarget(*target), options=options).asm
"""

EACH_KERNEL = """
for reference in (0, 4):
    for kernel in (module._forward, module._backward):
        print(*compiled(kernel, reference, eval(sys.argv[2])).keys() & {"hsaco", "cubin"})
"""

FUSION = """
for reference in (0, 2, 4):
    for fusion in (True, False):
        code = compiled(module._forward, reference, eval(sys.argv[2]), enable_fp_fusion=fusion)
        print(code["ptx"].count("fma.rn.f32"))
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script after COMPILE, and returns the words that it prints."""
    pytest.importorskip("triton")
    variant = builder.ROOT / "build" / builder.UNIVERSAL_VARIANT
    if not variant.is_dir():
        pytest.skip("no torch-universal: python tools/build.py --backend universal")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)

    def run(script, target):
        command = [sys.executable, "-c", COMPILE + script, str(variant), repr(target)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.parametrize(
    "target",
    [
        ("hip", "gfx942", 64),  # an MI300
        pytest.param(("hip", "gfx1100", 32), marks=pytest.mark.slow),  # a Radeon RX 7900
        pytest.param(("cuda", 90, 32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_they_compile(target: tuple, run) -> None:
    assert run(EACH_KERNEL, target) == ["cubin" if target[0] == "cuda" else "hsaco"] * 4


def test_compilers_fuse_nothing(run) -> None:
    """Each fma is in the source. One that a compiler makes would spoil the exact coordinates, which
    both kernels have from the same functions; Triton's interpreter makes none."""
    fmas = run(FUSION, ("cuda", 90, 32))
    assert len(fmas) == 6 and "0" not in fmas
    assert fmas[::2] == fmas[1::2]
