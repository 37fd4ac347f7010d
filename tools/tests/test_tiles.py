"""Maps with 2^31 - 1 pixels are cut into tiles without an overflow and without an end to them."""

import subprocess
from pathlib import Path

from tools.build import ROOT, Kernel, find_compiler, find_torch


def test_tiles_of_the_largest_maps(tmp_path):
    major, minor = Kernel.open(ROOT).stable_abi("cpu")
    torch, program = find_torch((major, minor)), tmp_path / "tiles"
    command = [find_compiler(), "-std=c++20", "-fsanitize=undefined", f"-I{ROOT}"]
    command += ["-fno-sanitize-recover=all", "-isystem", torch / "include"]
    command += [Path(__file__).with_name("tiles.cpp"), "-o", program]
    subprocess.run(command, check=True)
    subprocess.run([program], check=True, timeout=60)
