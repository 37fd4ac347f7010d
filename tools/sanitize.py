"""Run the CPU kernels under a sanitizer, outside Python and torch.

    python tools/sanitize.py                        # data races
    python tools/sanitize.py address,undefined      # memory and undefined behaviour
    python tools/sanitize.py none                   # none: a quick test of the kernels alone

Each instruction set that the processor has is run. The exit status is 1 if one run fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from build import ROOT, Kernel, find_compiler, find_torch

CAPABILITIES = ["default", "avx2", "avx512"]


def build(sanitizer: str, out: Path) -> None:
    kernel = Kernel.open(ROOT)
    section = kernel.config["kernel"]["cpu"]
    sources = [source for source in section["src"] if source.endswith(".cpp")]
    major, minor = kernel.stable_abi("cpu")
    include = find_torch((major, minor)) / "include"
    flags = [] if sanitizer == "none" else [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [find_compiler(), "-std=c++20", "-O2", "-g", *section["cxx-flags"], *flags, "-I."]
    command += [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}", "-isystem", include]
    command += [*sources, "tools/sanitize.cpp", "-pthread", "-o", out]
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser("python tools/sanitize.py", description=__doc__)
    parser.add_argument("sanitizer", nargs="?", default="thread", help="as -fsanitize has it")
    sanitizer = parser.parse_args().sanitizer
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "sanitize"
        build(sanitizer, program)
        for capability in CAPABILITIES:
            print(f"{sanitizer}, {capability}: ", end="", flush=True)
            environment = {**os.environ, "MSDA_CPU_CAPABILITY": capability}
            failed |= subprocess.run([program], env=environment).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
