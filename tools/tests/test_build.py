"""The build: build.toml, workflows, tools/build.py, and the variants it wrote into build/."""

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kernels._rust import Digest, DigestAlgorithm
from test_loading import python

from tools import build as builder
from tools import publish
from tools.release import differences
from tools.tests.conftest import (
    BACKENDS,
    KERNEL,
    ROOT,
    commit_all,
    edit,
    edit_metadata,
    violations_of_releases,
)

LAYERS = f"torch-ext/{KERNEL.package}/layers.py"
VARIANTS = sorted(path.parent for path in ROOT.glob("build/*/metadata.json"))


@pytest.fixture
def cpu_variant() -> Path:
    (found,) = (variant for variant in VARIANTS if "-cpu-" in variant.name)
    return found


# ------------------------------------------------------------------------------ what is checked in


def test_build_toml_lists_every_native_file() -> None:
    """kernel-builder copies the listed files only. torch-universal is the same kernel."""
    for backend in KERNEL.backends:
        listed = set(KERNEL.sources(backend))
        for source in listed:
            for header in re.findall(r'^#include "(.+)"', (ROOT / source).read_text(), re.M):
                found = {header, str(Path(source).parent / header)} & {*listed, "registration.h"}
                assert found, f"{source} includes {header}"
    general, universal = KERNEL.general("cpu"), KERNEL.general(builder.UNIVERSAL)
    assert {**universal, "backends": general["backends"]} == general


@pytest.mark.slow
@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_the_cpu_sources_compile_without_a_warning(name: str, tmp_path: Path) -> None:
    """By GCC, and by clang, which compiles the variant for Macs."""
    compiler = shutil.which(name)
    if compiler is None:
        pytest.skip(f"{name} is missing")
    (tmp_path / "registration.h").write_text(builder.REGISTRATION_H)
    variant = builder.Variant(KERNEL, "cpu", "variant", [], None, "id")
    flags = builder.compiler_flags(variant, compiler, verbose=False)[".cpp"]
    flags += ["-DTORCH_EXTENSION_NAME=id", f"-I{tmp_path}", "-I.", "-fsyntax-only", "-Werror"]
    for section in KERNEL.sections("cpu"):
        sources = [source for source in section["src"] if source.endswith(".cpp")]
        command = [compiler, *flags, *section.get("cxx-flags", []), *sources]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------- built variants


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.name)
def test_variants_are_fit_to_be_published(variant: Path) -> None:
    """Of these sources, intact, compliant with the ABIs; and without paths of this machine."""
    found = publish.problems(KERNEL, variant)
    found = [problem for problem in found if "dirty" not in problem and "commit" not in problem]
    for path in (ROOT, builder.find_torch(KERNEL.stable_abi("cpu")), Path.home()):
        assert not any(bytes(path) in library.read_bytes() for library in variant.glob("*.so"))
    assert violations_of_releases(found) == []


def test_a_second_build_elsewhere_is_the_same(checkout, cpu_variant: Path) -> None:
    """Every byte but the provenance, which a copy without git has not. A file with torch's headers
    and one with a kernel are compiled again; ``make release`` compiles all, CUDA's variants too.
    Another build of a process that has loaded the first has ops of its own."""
    work = Path(".ninja") / cpu_variant.name
    if not (ROOT / work / "kernel.so").is_file():
        pytest.skip(f"{cpu_variant.name} was built by another machine, perhaps another compiler")
    shutil.copytree(ROOT / work, checkout.root / work)
    for name in ("kernel.so", "torch-ext/torch_binding.cpp.o", "deformable_detr/cpu/forward.cpp.o"):
        (checkout.root / work / name).unlink()
    builder.build(checkout, "cpu", None, jobs=os.cpu_count(), verbose=False)
    second = checkout.root / "build" / cpu_variant.name
    first = json.loads((cpu_variant / "metadata.json").read_text())
    edit_metadata(second, provenance=first.get("provenance"))
    assert set(differences(cpu_variant, second)) <= {"metadata.json"}
    assert json.loads((second / "metadata.json").read_text()) == first

    edit(checkout.root, f"torch-ext/{KERNEL.package}/functional.py")
    builder.build(checkout, "cpu", None, jobs=1, verbose=False)
    script = f"""
from pathlib import Path
one, other = load(), kernels.get_local_kernel(Path({str(checkout.root)!r}), backend="cpu")
assert one is not other and one.functional.ops is not other.functional.ops
print(call(one), call(other), call(one))
"""
    assert python(script) == ["right"] * 3


# -------------------------------------------------------------------------- ids and what is refused


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_id_is_that_of_the_inputs(backend: str, checkout: builder.Kernel) -> None:
    """In any folder. What kernel-builder generates is no input, nor what another backend has."""
    (checkout.root / "torch-ext" / KERNEL.package / "_ops.py").write_text("# generated\n")
    ids = {KERNEL.id(backend, "variant", []), checkout.id(backend, "variant", [])}
    assert len(ids) == 1
    universal = f"universal/torch-ext/{KERNEL.package}/universal/embedding_bag.py"
    edited = {"deformable_detr/bilinear.h": backend != builder.UNIVERSAL, LAYERS: True}
    for name, is_input in (edited | {universal: backend == builder.UNIVERSAL}).items():
        edit(checkout.root, name)
        assert (checkout.id(backend, "variant", []) not in ids) is is_input
        ids.add(checkout.id(backend, "variant", []))
    assert not ids & {checkout.id(backend, "x", []), checkout.id(backend, "variant", ["9.0"])}


def test_a_build_of_what_is_not_committed_is_dirty(checkout: builder.Kernel) -> None:
    """An input that git does not track, too."""
    commit_all(checkout.root)
    new = f"torch-ext/{KERNEL.package}/new.py"
    for name, dirty in (("notes.txt", False), (new, True), (LAYERS, True)):
        edit(checkout.root, name)
        assert builder.git_status(checkout.root, checkout.inputs("cpu"))["dirty"] is dirty
        (checkout.root / new).unlink(missing_ok=True)


def test_a_build_is_current_until_a_source_changes(
    checkout, cpu_variant: Path, monkeypatch
) -> None:
    """Then its commit is the present one, without compiling. A failed build leaves the last one,
    and what an edit during the build may have spoilt is not kept either."""
    built = Path(shutil.copytree(cpu_variant, checkout.root / "build" / cpu_variant.name))
    git = {"commit": "2" * 40, "dirty": False}
    monkeypatch.setattr(builder, "git_status", lambda *_: git)
    assert builder.say_if_current(checkout, "cpu", "cpu", None)
    assert json.loads((built / "metadata.json").read_text())["provenance"]["kernel"] == git
    edit_source = functools.partial(edit, checkout.root, "deformable_detr/bilinear.h")
    edit_source()
    assert not builder.is_current(checkout, "cpu", built, None)
    before = Digest.hash_variant(DigestAlgorithm.SHA256, built)
    with monkeypatch.context() as patch, pytest.raises(builder.BuildError, match="build failed"):
        patch.setenv("CXX", "false")
        builder.build(checkout, "cpu", None, jobs=1, verbose=False)
    monkeypatch.setattr(builder, "compile_and_link", lambda *_: edit_source())
    with pytest.raises(builder.BuildError, match="changed during the build"):
        builder.build(checkout, "cpu", None, jobs=1, verbose=False)
    before.validate(Digest.hash_variant(DigestAlgorithm.SHA256, built))


def test_what_is_missing_or_misspelt_is_named(checkout, monkeypatch, tmp_path, capsys) -> None:
    (checkout.root / checkout.sources("cpu")[0]).unlink()
    with pytest.raises(builder.BuildError, match="which does not exist"):
        builder.Kernel.open(checkout.root)
    edit(checkout.root, "build.toml", "[licence]")
    with pytest.raises(builder.BuildError, match="licence"):
        builder.Kernel.open(checkout.root)
    for archs in (["sm_90"], ["9"], ["all", "9.0"]):
        with pytest.raises(SystemExit):
            builder.parse_args(["--archs", *archs])
        assert f"--archs has {archs[0]}" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(builder, "USUAL_CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(builder.NvccMissing, match="pip install -r requirements-cuda.txt"):
        builder.CudaToolkit.find()
    with pytest.raises(builder.BuildError, match="no-such-compiler is missing; install one"):
        builder.find_compiler()


def test_which_gpus_a_build_covers() -> None:
    archs = ["9.0", "12.1+PTX", "10.0", "9.0"]
    assert builder.parse_args(["--archs", *archs]).archs == ["10.0", "12.1+PTX", "9.0"]
    codes = [flag.split("code=")[-1] for flag in builder.gencode(["9.0", "12.1+PTX"])]
    assert codes == ["sm_90", "sm_121", "compute_121"]
    for case in "9.0 on 9.0, 8.0 on 8.6, 8.0+PTX on 9.0, 9.0a on 9.0, 10.0f on 10.3".split(", "):
        assert builder.covers(case.split()[:1], case.split()[2]), case
    for case in "8.6 on 8.0, 8.0 on 9.0, 10.0a on 10.3".split(", "):
        assert not builder.covers(case.split()[:1], case.split()[2]), case
