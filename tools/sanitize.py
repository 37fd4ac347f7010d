"""Run the kernels under a sanitizer, outside Python and torch.

    python tools/sanitize.py                        # CPU: data races
    python tools/sanitize.py address,undefined      # CPU: memory and undefined behaviour
    python tools/sanitize.py memcheck               # GPU; also racecheck, initcheck, synccheck
    python tools/sanitize.py none                   # CPU, none: a quick test of the kernels alone
    python tools/sanitize.py address --emulate      # the GPU's kernels on the CPU; 6 minutes
    CXX=aarch64-linux-gnu-g++ python tools/sanitize.py none --emulator qemu-aarch64  # another CPU

Each instruction set that the processor has is run. ``--emulate`` needs no GPU, only the CUDA
toolkit's headers: see emulator/cuda_runtime.h. The exit status is 1 if one run fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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
EMULATOR = "tools/emulator"
AS_CPP = ["-x", "c++", "-include", "cuda_runtime.h", "-DMSDA_EMULATED"]
# What a C++ compiler does not take of CUDA, and what the emulator has for it.
EMULATED = {
    r"extern __shared__ __align__\(\d+\) char memory\[\];": (
        "char* memory = emulator::dynamic_shared;"
    ),
    r"\b__shared__\b": "static",
    r"\bthreadIdx\b": "emulator::thread_index",
    r"\bblockIdx\b": "emulator::block_index",
    r"(?<!\.)\bblockDim\b": "emulator::block_size",
    r"(?<!\.)\bgridDim\b": "emulator::grid_size",
    r"\bcudaLaunchKernelEx\b": "emulator::launch",
    r'asm\("ex2.*;': "y = std::exp2(x * 1.4426950408889634f);",
    r'asm\(""[^;]*;': "",
    r'asm\("mul\.wide.*;': "product = int64_t{a} * b;",
    r"\b__CUDACC__\b": "MSDA_EMULATED",
    # One of the CPU's instruction sets will do for what is expected.
    r"\bMSDA_X86_LEVELS 1\b": "MSDA_X86_LEVELS 0",
}


def compile_for_cpu(sanitizers: str, out: Path, static: bool) -> None:
    flags = [*sanitizing(sanitizers), *(["-static"] if static else [])]
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


def emulate(paths: Iterable[Path], folder: Path) -> list:
    """Copies CUDA sources as a C++ compiler takes them; returns the flags to compile them with."""
    for path in paths:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        for pattern, replacement in EMULATED.items():
            text = re.sub(pattern, replacement, text)
        copy.write_text(text)
    # The sources take liberties with types that g++ would take advantage of.
    flags = ["-iquote", folder, "-O1", "-w", "-fno-strict-aliasing", f"-I{EMULATOR}"]
    return [*flags, "-isystem", CudaToolkit.find().home / "include"]


def compile_emulated(sanitizers: str, out: Path) -> None:
    """The CUDA kernels as C++ for the CPU; the CPU's own are linked, too, as for a GPU."""
    kernel = Kernel.open(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        flags = emulate((ROOT / "deformable_detr").rglob("*.*"), Path(folder))
        shutil.copy(ROOT / EMULATOR / "matrix.cuh", Path(folder) / "deformable_detr/cuda")
        flags += sanitizing(sanitizers)
        with ThreadPoolExecutor() as compilers:

            def compile(source: Path | str, *arguments: str) -> None:
                objects.append(Path(folder) / f"{len(objects)}.o")
                jobs.append(
                    compilers.submit(
                        run_compiler, kernel, [*flags, *arguments, "-c", source, "-o", objects[-1]]
                    )
                )

            jobs: list[Future] = []
            for source in sources(kernel, "cuda"):
                if source.endswith(".cu"):
                    compile(Path(folder) / source, *AS_CPP)
            for source in [*sources(kernel, "cpu"), f"{EMULATOR}/emulator.cpp"]:
                compile(source)
            compile(HARNESS, "-DUSE_CUDA=1")
            for job in jobs:
                job.result()
        run_compiler(kernel, [*flags, *objects, "-o", out])


def compile_emulated_library(source: Path, out: Path) -> None:
    """Of one more CUDA source, which has the kernels' headers: a shared library for the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        flags = emulate([source, *(ROOT / "deformable_detr").rglob("*.*h")], Path(folder))
        copy = Path(folder) / source.relative_to(ROOT)
        flags += ["-shared", "-fPIC", f"{EMULATOR}/emulator.cpp", *AS_CPP, copy]
        run_compiler(Kernel.open(ROOT), [*flags, "-o", out])


def sanitizing(sanitizers: str) -> list[str]:
    """Flags; with what names the lines that a sanitizer reports, a quarter of the time."""
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g"] if sanitizers else []


def sources(kernel: Kernel, backend: str) -> list[str]:
    section = kernel.config["kernel"][backend]
    return [source for source in section["src"] if source.endswith((".cpp", ".cu"))]


def run_compiler(kernel: Kernel, arguments: list) -> None:
    major, minor = kernel.stable_abi("cpu")
    include = find_torch((major, minor)) / "include"
    command = [find_compiler(), "-std=c++20", "-O2", "-I.", "-isystem", include]
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


def run_emulated(program: Path, sanitizer: str) -> bool:
    print(f"{sanitizer}, GPU emulated: ", end="", flush=True)
    # The threads' stacks are not the sanitizer's.
    options = "detect_stack_use_after_return=0:detect_leaks=0"
    environment = {**os.environ, "ASAN_OPTIONS": options}
    return subprocess.run([program], env=environment).returncode == 0


def run_on_gpu(program: Path, tool: str) -> bool:
    """In several processes: one takes more than five minutes for racecheck, twelve take three."""
    sanitizer = CudaToolkit.find().nvcc.parent / "compute-sanitizer"
    parts = min(12, os.cpu_count() or 1)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "2", program]
    print(f"{tool}, {parts} processes:", flush=True)
    running = [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]
    return not any([process.wait() for process in running])


def main() -> int:
    parser = argparse.ArgumentParser("python tools/sanitize.py", description=__doc__)
    parser.add_argument("sanitizer", nargs="*", default=["thread"], help="as -fsanitize has it")
    parser.add_argument("--gpu-program", type=Path, help="what to run, compiled if it is not there")
    parser.add_argument("--emulate", action="store_true", help="runs the GPU's kernels on the CPU")
    parser.add_argument("--emulator", help="runs the program, if CXX compiles for another CPU")
    args = parser.parse_args()
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = args.gpu_program or Path(folder) / "sanitize-cuda"
        for sanitizer in args.sanitizer:
            if sanitizer in GPU_TOOLS:
                if not on_gpu.exists():
                    compile_for_gpu(on_gpu)
                ok &= run_on_gpu(on_gpu, sanitizer)
            else:
                program = Path(folder) / "sanitize"
                flags = "" if sanitizer == "none" else sanitizer
                if args.emulate:
                    compile_emulated(flags, program)
                    ok &= run_emulated(program, sanitizer)
                    continue
                compile_for_cpu(flags, program, static=args.emulator is not None)
                ok &= run_on_cpu(program, sanitizer, args.emulator)
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
