"""What a built library may ask of the systems it will be loaded on.

    python tools/abi.py build/torch*    # says what is wrong with each variant

Python's limited API of 3.9 and manylinux_2_28 are checked by kernel-abi-check. What that does not
see is checked here: a symbol without a version has to be of Python or of torch's stable shims of
the release that build.toml names (C++ symbols of torch or the C++ library are none of these), and
libraries may only be torch's own, the CUDA runtime it brings, and those of manylinux. What
kernel-builder builds is held to the same.
"""

import functools
import re
import subprocess
import sys
from pathlib import Path

try:
    from tools import build as builder
except ModuleNotFoundError:  # run as a script
    import build as builder

MANYLINUX = "manylinux_2_28"
PYTHON = "3.9"
TORCH_LIBRARIES = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
CUDA_LIBRARIES = {"libtorch_cuda.so", "libc10_cuda.so"}  # torch's; kernel-builder links the first
SYSTEM_LIBRARIES = r"lib(c|m|gcc_s|stdc\+\+|dl|pthread|rt)\.so\.\d+|ld-linux.*\.so\.\d+"

# Weak symbols of every library: the compiler's start files name them, and none has to be there.
OPTIONAL = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
OPTIONAL |= {"__cxa_finalize", "__gmon_start__"}

# Every header that declares functions of torch's stable C ABI. The second needs CUDA's headers for
# the functions of streams, so these are not read but named.
SHIM_HEADERS = ["torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h"]
CUDA_SHIMS = {"aoti_torch_get_current_cuda_stream"}


@functools.lru_cache
def stable_shims(release: tuple[int, int]) -> frozenset[str]:
    """The functions that torch's headers declare to who asks for the ABI of ``release``."""
    major, minor = release
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"
    include = f"-I{builder.find_torch(release)}/include"
    command = [builder.find_compiler(), "-std=c++20", "-E", "-P", target, include, "-xc++", "-"]
    headers = "".join(f"#include <{header}>\n" for header in SHIM_HEADERS)
    done = subprocess.run(command, input=headers, text=True, capture_output=True)
    if done.returncode != 0:
        raise builder.BuildError(f"torch's stable headers cannot be read: {done.stderr}")
    return frozenset(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", done.stdout)) | CUDA_SHIMS


def undefined_symbols(library: Path) -> list[str]:
    """The dynamic symbols that the library expects elsewhere, as nm writes them."""
    done = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--with-symbol-versions", "--format=just-symbols"]
        + [library],
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def needed_libraries(library: Path) -> tuple[set[str], list[str]]:
    """The libraries it loads, and the paths it would search for them.

    An empty path, which patchelf leaves of one that it removes, is ignored by the loader.
    """
    dynamic = builder.output_of(["readelf", "--dynamic", "--wide", library])
    return (
        set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)),
        re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", dynamic),
    )


def violations(library: Path, stable_abi: tuple[int, int], cuda: int | None) -> list[str]:
    """What is wrong with a library, one line each.

    Args:
        stable_abi: The release of torch whose stable ABI it keeps to.
        cuda: The major version of the CUDA runtime it may load; None for no CUDA.
    """
    from kernel_abi_check import ObjectFile

    file = ObjectFile(library)
    found = [f"not of Python {PYTHON}'s limited API: {s}" for s in file.check_python_abi(PYTHON)]
    found += [f"not of {MANYLINUX}: {s}" for s in file.check_manylinux(MANYLINUX)]

    shims = stable_shims(stable_abi)
    for symbol in undefined_symbols(library):
        name, _, version = symbol.partition("@")
        if not version and not name.startswith(("Py", "_Py")) and name not in shims | OPTIONAL:
            plain = builder.output_of(["c++filt", name]).strip()
            expected = f"the stable ABI of torch {builder.dotted(stable_abi)}"
            found.append(f"{plain} has no version and is not of {expected}")

    libraries, paths = needed_libraries(library)
    allowed = set(TORCH_LIBRARIES)
    if cuda is not None:
        allowed |= CUDA_LIBRARIES | {f"libcudart.so.{cuda}"}
    for name in sorted(libraries - allowed):
        if not re.fullmatch(SYSTEM_LIBRARIES, name):
            found.append(f"{name} is not of torch or the system, expected {sorted(allowed)}")
    found += [f"searches {path} for libraries, expected no path" for path in paths]
    return found


def check(variant: Path) -> list[str]:
    """The violations of the library in a variant's folder; its name says what it is for."""
    if variant.name == builder.UNIVERSAL_VARIANT:
        native = sorted(path.name for path in variant.rglob("*.so"))
        return [f"has {name}, expected Python alone" for name in native]
    match = re.match(r"torch-stable-abi(\d)(\d+)-(?:cpu|cu(\d\d)\d)-", variant.name)
    if match is None:
        expected = "torch-stable-abi210-cpu-x86_64-linux"
        return [f"the folder is named {variant.name}, expected a name like {expected}"]
    libraries = sorted(variant.glob("*.so"))
    if len(libraries) != 1:
        return [f"{len(libraries)} libraries, expected 1"]
    cuda = int(match[3]) if match[3] else None
    return violations(libraries[0], (int(match[1]), int(match[2])), cuda)


def main() -> None:
    variants = [Path(argument) for argument in sys.argv[1:]]
    if not variants:
        sys.exit(__doc__)
    failed = False
    for variant in variants:
        try:
            found = check(variant)
        except (builder.BuildError, OSError, ValueError) as error:
            found = [str(error)]
        failed |= bool(found)
        print("\n  ".join([f"{variant.name}: {'not ' if found else ''}compliant", *found]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
