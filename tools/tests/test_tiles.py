"""Maps with 2^31 - 1 pixels are cut into tiles without an overflow and without an end to them."""

import subprocess
from pathlib import Path

from tools.build import ROOT, Kernel, find_compiler, find_torch


def test_tiles_of_the_largest_maps(tmp_path):
    major, minor = Kernel.open(ROOT).stable_abi("cpu")
    torch, program = find_torch((major, minor)), tmp_path / "tiles"
    command = [find_compiler(), "-std=c++20", "-O0", "-w", f"-I{ROOT}"]
    command += ["-isystem", torch / "include"]
    command += [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"]
    command += [Path(__file__).with_name("tiles.cpp"), "-o", program]
    command += [f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [text for _, text in lines] == ["covered"] * 4
    # A tile is 960 KB of values and gradients, or a 32nd of the map; one row has one tile.
    assert all(0 < int(count) < 10**7 for count, _ in lines) and int(lines[1][0]) == 1
