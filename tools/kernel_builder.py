"""What kernel-builder makes of the present commit, as far as that shows without Nix.

    python tools/kernel_builder.py          # source set, variants and flags, what ci-test collects
    python tools/kernel_builder.py --run    # runs ci-test, too

kernel-builder builds and tests a copy that holds the source set and nothing else: build.toml, the
sources it lists, and the Python files below torch-ext and tests, as far as git tracks them. Its
`ci-test` runs `pytest tests -m kernels_ci` there, on one variant, with torch, kernels and pytest.
Here such a copy is made, what else is installed is hidden from it, and a variant of build/ is
tested. It fails if a listed file is missing or not tracked, or a test file needs more than it has.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    from tools import build as builder
except ModuleNotFoundError:  # run as a script
    import build as builder

# What the revision of kernel-builder in flake.lock builds a kernel of torch's stable ABI for.
CUDA = {"cu126": 12, "cu130": 13, "cu132": 13}  # the major has the GPU architectures
SYSTEMS = {
    "x86_64-linux": ["cpu", *CUDA],
    "aarch64-linux": ["cpu", *CUDA],
    "aarch64-darwin": ["cpu"],
}

# The packages of ci-test. kernel-builder's torch depends on numpy, other than pip's.
GIVEN = ("torch", "kernels", "pytest", "numpy")
# kernel-builder generates a pyproject.toml; this is the part that pytest reads.
PYPROJECT = """\
[tool.pytest.ini_options]
markers = ["kernels_ci: mark a test as a kernel CI test"]
"""
# What Python runs first of all: to import one of these is a ModuleNotFoundError.
HIDE = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


# --------------------------------------------------------------------------------- the source set


def source_set(kernel: builder.Kernel) -> list[str]:
    """The files, relative to the root. Kernel.open() has found the sources among them."""
    files = {"build.toml", *(f"torch-ext/{kernel.package}/{name}" for name in kernel.package_files)}
    files |= {source for backend in kernel.backends for source in kernel.sources(backend)}
    tests = [path for kind in ("py", "pyi") for path in (kernel.root / "tests").rglob(f"*.{kind}")]
    return sorted(files | {str(path.relative_to(kernel.root)) for path in tests})


def untracked(kernel: builder.Kernel) -> list[str]:
    """The files of the source set that Nix would not see."""
    if builder.git_status(kernel.root) is None:
        return []
    return builder.untracked(kernel.root, source_set(kernel))


def variants(kernel: builder.Kernel) -> dict[str, tuple[str, list[str]]]:
    """The variants that kernel-builder builds: their backend and GPU architectures."""
    result = {}
    for system, computes in SYSTEMS.items():
        for compute in computes:
            backend = "cuda" if compute in CUDA else "cpu"
            archs = builder.RELEASE_ARCHS[CUDA[compute]] if compute in CUDA else []
            name = builder.variant_name(kernel.stable_abi(backend), compute, system)
            result[name] = (backend, archs)
    return result


def describe(kernel: builder.Kernel, name: str, backend: str, archs: list[str]) -> str:
    lines = [f"{name} {' '.join(archs)}".rstrip()]
    for section in kernel.sections(backend):
        flags = [*section.get("cxx-flags", []), *section.get("cuda-flags", [])]
        sources = [source for source in section["src"] if source.endswith((".cpp", ".cu"))]
        lines.append(f"    {' '.join(sources)}: {' '.join(flags) or 'no flags'}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- ci-test


def hidden_modules() -> list[str]:
    """The modules of all packages that the environment of ci-test lacks."""
    given, names = set(), list(GIVEN)
    while names:
        name = canonical(names.pop())
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another system
        if name not in given:
            given.add(name)
            names += [re.match(r"[\w.-]+", line)[0] for line in requires if "extra ==" not in line]
    modules = importlib.metadata.packages_distributions()
    return sorted(
        m for m, packages in modules.items() if given.isdisjoint(map(canonical, packages))
    )


def canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def ci_test(
    kernel: builder.Kernel, variant: Path, folder: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Runs pytest as ci-test does.

    Args:
        variant: A built variant that suits this machine's torch.
        folder: An empty one, for the copy and the variant.
        options: Of pytest.
    """
    source, built, hidden = folder / "source", folder / "built", folder / "hidden"
    for name in source_set(kernel):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kernel.root / name, source / name)
    (source / "pyproject.toml").write_text(PYPROJECT)
    shutil.copytree(variant, built / variant.name)
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE.format(names=hidden_modules()))
    environment = {
        **os.environ,
        "LOCAL_KERNELS": f"{kernel.repo_id}={built}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(built / variant.name), str(hidden)]),
    }
    command = [sys.executable, "-m", "pytest", source / "tests", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *options], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="run the tests that are collected")
    args = parser.parse_args(argv)

    try:
        kernel = builder.Kernel.open(builder.ROOT)
    except builder.BuildError as error:
        sys.exit(f"error: {error}")
    if untracked(kernel):
        sys.exit(f"error: not tracked by git: {', '.join(untracked(kernel))}")
    files = source_set(kernel)
    print(f"source set: {len(files)} files", *files, sep="\n  ")

    print("\nvariants")
    for name, (backend, archs) in variants(kernel).items():
        print(" ", describe(kernel, name, backend, archs).replace("\n", "\n  "))

    sys.path.insert(0, str(kernel.root / "tests"))
    from conftest import KERNEL

    variant = Path(KERNEL.__file__).parent
    print(f"\nci-test on {variant.name}", flush=True)
    options = ["-q", "-m", "kernels_ci", *([] if args.run else ["--collect-only", "-q"])]
    with tempfile.TemporaryDirectory() as folder:
        done = ci_test(kernel, variant, Path(folder), *options)
    print(done.stdout)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
