"""Run the kernels under a sanitizer, outside Python and torch.

    python tools/sanitize.py                        # CPU: data races
    python tools/sanitize.py address,undefined      # CPU: memory and undefined behaviour
    python tools/sanitize.py memcheck               # GPU; also racecheck, initcheck, synccheck
    python tools/sanitize.py guards                 # GPU: each tensor between zones of NaN
    python tools/sanitize.py none                   # CPU, none: a quick test of the kernels alone
    CXX=aarch64-linux-gnu-g++ python tools/sanitize.py none --emulator qemu-aarch64  # another CPU

Each instruction set that the processor has is run. The exit status is 1 if one run fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from build import (
    ARCH_WITHOUT_GPU,
    ROOT,
    CudaToolkit,
    Kernel,
    find_compiler,
    find_torch,
    gencode,
    present_archs,
)

CAPABILITIES = ["default", "avx2", "avx512"]
GPU_TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
HARNESS = "tools/sanitize.cpp"


def compile_for_cpu(sanitizers: str, out: Path, static: bool) -> None:
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []
    flags += ["-static"] if static else []
    kernel = Kernel.open(ROOT)
    run_compiler(kernel, [*flags, *sources(kernel, "cpu"), HARNESS, "-o", out])


def compile_for_gpu(out: Path) -> None:
    """The CPU kernels are linked, too: their results are what is expected."""
    kernel, toolkit = Kernel.open(ROOT), CudaToolkit.find()
    archs = gencode(present_archs() or [ARCH_WITHOUT_GPU])
    nvcc = [toolkit.nvcc, "-std=c++20", "-O2", "-lineinfo", "-I.", *archs]
    nvcc += ["-ccbin", find_compiler(), "-c"]
    with tempfile.TemporaryDirectory() as folder:
        objects, running = [], []
        for source in sources(kernel, "cuda"):
            if source.endswith(".cu"):
                objects.append(Path(folder) / f"{Path(source).stem}.o")
                running.append(subprocess.Popen([*nvcc, source, "-o", objects[-1]], cwd=ROOT))
        if any([process.wait() for process in running]):
            sys.exit("error: the CUDA kernels were not compiled, see above")
        arguments = ["-DUSE_CUDA=1", "-isystem", toolkit.home / "include"]
        arguments += [*sources(kernel, "cpu"), HARNESS, *objects, toolkit.cudart, "-ldl", "-lrt"]
        run_compiler(kernel, [*arguments, "-o", out])


def sources(kernel: Kernel, backend: str) -> list[str]:
    section = kernel.config["kernel"][backend]
    return [source for source in section["src"] if source.endswith((".cpp", ".cu"))]


def run_compiler(kernel: Kernel, arguments: list) -> None:
    major, minor = kernel.stable_abi("cpu")
    include = find_torch((major, minor)) / "include"
    command = [find_compiler(), "-std=c++20", "-O2", "-g", "-I.", "-isystem", include]
    command += [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"]
    command += [*kernel.config["kernel"]["cpu"]["cxx-flags"], *arguments, "-pthread"]
    subprocess.run(command, cwd=ROOT, check=True)


def run_on_cpu(program: Path, sanitizer: str, emulator: str | None) -> bool:
    ok = True
    for capability in ["default"] if emulator else CAPABILITIES:
        print(f"{sanitizer}, {emulator or capability}: ", end="", flush=True)
        environment = {**os.environ, "MSDA_CPU_CAPABILITY": capability}
        command = [*([emulator] if emulator else []), program]
        ok &= subprocess.run(command, env=environment).returncode == 0
    return ok


def run_on_gpu(program: Path, tool: str) -> bool:
    print(f"{tool}: ", end="", flush=True)
    if tool == "guards":
        return subprocess.run([program, "guards"]).returncode == 0
    sanitizer = CudaToolkit.find().nvcc.parent / "compute-sanitizer"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "2", program]
    return subprocess.run(command).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser("python tools/sanitize.py", description=__doc__)
    parser.add_argument("sanitizer", nargs="*", default=["thread"], help="as -fsanitize has it")
    parser.add_argument("--gpu-program", type=Path, help="what to run, compiled if it is not there")
    parser.add_argument("--emulator", help="runs the program, if CXX compiles for another CPU")
    args = parser.parse_args()
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = args.gpu_program or Path(folder) / "sanitize-cuda"
        for sanitizer in args.sanitizer:
            if sanitizer in [*GPU_TOOLS, "guards"]:
                if not on_gpu.exists():
                    compile_for_gpu(on_gpu)
                ok &= run_on_gpu(on_gpu, sanitizer)
            else:
                program = Path(folder) / "sanitize"
                flags = "" if sanitizer == "none" else sanitizer
                compile_for_cpu(flags, program, static=args.emulator is not None)
                ok &= run_on_cpu(program, sanitizer, args.emulator)
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
