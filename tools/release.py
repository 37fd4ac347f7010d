"""Build every variant of a release from the last commit, twice, and compare.

    python tools/release.py                            # universal, cpu, cu130 and cu132, for all
    python tools/release.py --archs 9.0 --cuda 13.0    # less, to try it

The commit is checked out and built in release/, where tools/publish.py looks for it, and again in
.ninja/again/: the variants of two folders have to be the same, byte for byte. nvcc comes from pip,
of the releases pinned in the requirements files. Then the ABI is checked. Run it again after an
interruption: what was compiled is not compiled again.
"""

import argparse
import filecmp
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

try:
    from tools import abi
    from tools import build as builder
except ModuleNotFoundError:  # run as a script
    import abi
    import build as builder

ROOT = builder.ROOT
FIRST, AGAIN = ROOT / "release", ROOT / ".ninja" / "again"
TOOLKITS = ROOT / ".toolkits"
REQUIREMENTS = {"13.0": "requirements-cuda.txt", "13.2": "requirements-cuda132.txt"}


def compute_of(cuda: str) -> str:
    return "cu" + cuda.replace(".", "")


def matrix(kernel: builder.Kernel) -> dict[str, list[str]]:
    """The variants of a whole release by their names, and each one's GPU architectures."""
    variants = {builder.UNIVERSAL_VARIANT: []}
    variants[builder.variant_name(kernel.stable_abi("cpu"), "cpu")] = []
    for cuda in REQUIREMENTS:
        name = builder.variant_name(kernel.stable_abi("cuda"), compute_of(cuda))
        variants[name] = builder.RELEASE_ARCHS[int(cuda.split(".")[0])]
    return variants


def check_out(folder: Path) -> str:
    """Makes ``folder`` a checkout of the last commit, which it returns."""
    git = ["git", "-C", str(folder)]
    if not (folder / ".git").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run(["git", "clone", "--quiet", "--no-checkout", str(ROOT), str(folder)])
    run([*git, "fetch", "--quiet", str(ROOT), "HEAD"])
    run([*git, "checkout", "--quiet", "--force", "--detach", "FETCH_HEAD"])
    return builder.git_status(folder)["commit"]


def install_nvcc(cuda: str) -> Path:
    """The pinned nvcc of pip, in a folder of its own."""
    folder, requirements = TOOLKITS / cuda, FIRST / REQUIREMENTS[cuda]
    installed = folder / "requirements.txt"
    if not installed.is_file() or installed.read_text() != requirements.read_text():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        run([*pip, "--target", str(folder), "-r", str(requirements)])
        installed.write_text(requirements.read_text())
    (nvcc,) = folder.glob("nvidia/cu*/bin/nvcc")
    return nvcc


def run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise builder.BuildError(f"{' '.join(command)} failed:\n{done.stdout}")


@dataclass(frozen=True)
class Task:
    """One variant of the matrix."""

    backend: str
    compute: str  # universal, cpu, cu130
    options: list[str]  # of tools/build.py

    def name(self, kernel: builder.Kernel) -> str:
        return builder.variant_of(kernel, self.backend, self.compute)

    def steps(self, kernel: builder.Kernel) -> int:
        """Files to compile, and the link."""
        if self.backend == builder.UNIVERSAL:
            return 1
        sources = kernel.sources(self.backend)
        return sum(Path(source).suffix in (".cpp", ".cu") for source in sources) + 2

    def build(self, folder: Path, jobs: int, bar: tqdm) -> None:
        """Runs the commit's own tools/build.py."""
        before = bar.n
        bar.set_description(f"{self.compute} in {folder.relative_to(ROOT)}")
        command = [sys.executable, folder / "tools" / "build.py", "--backend", self.backend]
        command += ["--jobs", str(jobs), *self.options]
        output = []
        with subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout:
                output.append(line)
                step = re.match(r" +\w+ \[(\d+)/\d+\] \S+ +(.*)", line)
                if step is not None:
                    bar.n = before + int(step[1])
                    bar.set_postfix_str(step[2][-50:])
        if process.returncode != 0:
            raise builder.BuildError(f"{folder}, {self.compute}:\n{''.join(output)}")
        bar.n = before + self.steps(builder.Kernel.open(folder))
        bar.refresh()


def differences(first: Path, second: Path) -> list[str]:
    """The files, by relative path, that are not the same in both folders."""
    names = {
        str(path.relative_to(folder))
        for folder in (first, second)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    same, _, _ = filecmp.cmpfiles(first, second, names, shallow=False)
    return sorted(names - set(same))


def release(archs: list[str], cudas: list[str], jobs: int, once: bool) -> None:
    folders = [FIRST] if once else [FIRST, AGAIN]
    (commit,) = {check_out(folder) for folder in folders}
    print(f"releasing commit {commit}")
    if builder.git_status(ROOT)["dirty"]:
        print("what is not committed is not part of it")
    kernel = builder.Kernel.open(FIRST)

    tasks = [Task(builder.UNIVERSAL, builder.UNIVERSAL, []), Task("cpu", "cpu", [])]
    for cuda in cudas:
        nvcc = install_nvcc(cuda)
        tasks.append(Task("cuda", compute_of(cuda), ["--nvcc", str(nvcc), "--archs", *archs]))

    total = sum(task.steps(kernel) for task in tasks) * len(folders)
    with tqdm(total=total, unit="step", bar_format="{l_bar}{bar:20}{r_bar}") as bar:
        for task in tasks:
            for folder in folders:
                task.build(folder, jobs, bar)

    failed = False
    for task in tasks:
        variant = FIRST / "build" / task.name(kernel)
        problems = abi.check(variant)
        if not once:
            again = AGAIN / "build" / variant.name
            problems += [f"differs in {file}" for file in differences(variant, again)]
        failed |= bool(problems)
        verdict = "compliant" if once else "compliant, twice the same"
        size = sum(path.stat().st_size for path in variant.rglob("*") if path.is_file())
        size = f"{size / 1e6:.1f} MB"
        print("\n  ".join([f"{variant.name}: {size}", *(problems or [verdict])]))
    if failed:
        raise builder.BuildError("not fit for publication, see above")
    print(f"in {FIRST.relative_to(ROOT)}/build; publish it with tools/publish.py")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archs", nargs="+", default=["all"], metavar="ARCH",
        help="GPU architectures (default: those kernel-builder builds for)",
    )  # fmt: skip
    parser.add_argument(
        "--cuda", nargs="*", choices=list(REQUIREMENTS), default=list(REQUIREMENTS),
        help="releases of CUDA (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="do not build again to compare")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if builder.git_status(ROOT) is None:
            raise builder.BuildError(f"{ROOT} is not a git checkout, a release is of a commit")
        release(args.archs, args.cuda, args.jobs, args.once)
    except builder.BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
