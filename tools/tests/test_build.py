"""The build: build.toml, workflows, tools/build.py, and the variants it wrote into build/."""

import ast
import fnmatch
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KERNEL as KERNEL_MODULE
from kernels._rust import Digest, DigestAlgorithm, Metadata
from test_loading import python

from tools import abi
from tools import build as builder
from tools.release import differences
from tools.tests.releases import (
    BACKENDS,
    KERNEL,
    ROOT,
    commit_all,
    copy_checkout,
    edit,
    edit_metadata,
    violations_of_releases,
)

PACKAGE = ROOT / "torch-ext" / KERNEL.package
LAYERS = f"torch-ext/{KERNEL.package}/layers.py"
VARIANTS = sorted(path.parent for path in ROOT.glob("build/*/metadata.json"))
NATIVE = [variant for variant in VARIANTS if variant.name != builder.UNIVERSAL_VARIANT]
each_backend = pytest.mark.parametrize("backend", KERNEL.backends)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.name)
each_native_variant = pytest.mark.parametrize("variant", NATIVE, ids=lambda path: path.name)


@pytest.fixture
def checkout(tmp_path: Path) -> builder.Kernel:
    return copy_checkout(tmp_path)


@pytest.fixture
def cpu_variant() -> Path:
    (found,) = (variant for variant in VARIANTS if "-cpu-" in variant.name)
    return found


# ------------------------------------------------------------------------------ what is checked in


@each_backend
def test_build_toml_lists_every_native_file(backend: str) -> None:
    """kernel-builder copies the listed files only."""
    listed = set(KERNEL.sources(backend))
    for source in listed:
        for header in re.findall(r'^#include "(.+)"', (ROOT / source).read_text(), re.M):
            found = {header, str(Path(source).parent / header)} & {*listed, "registration.h"}
            assert found, f"{source} includes {header}"
    everywhere = {source for other in KERNEL.backends for source in KERNEL.sources(other)}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "deformable_detr").rglob("*.*")}
    assert native <= everywhere


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


def test_workflows_are_pinned_and_name_what_exists() -> None:
    """By commit, but for an action whose commits could not be seen. Sources start a release."""
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".ci" / "run"]
    text = "\n".join(file.read_text() for file in files)
    for action in set(re.findall(r"uses: (\S+)", text)) - {"huggingface/hf-jobs-action@main"}:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
    limits = [int(minutes) for minutes in re.findall(r"^    timeout-minutes: (\d+)", text, re.M)]
    assert len(limits) == text.count("\n    runs-on: ") and max(limits) <= 360  # GitHub's limit
    for file in files[:-1]:  # sh runs the script of a job on the Hub, bash what `run:` has
        scripts = re.findall(r"script: \|\n((?: {12}.*\n)+)", file.read_text())
        assert all(script.split("\n")[1].strip() == "set -eu" for script in scripts), file
        assert scripts or "shell: bash -euo pipefail {0}" in file.read_text(), file
    assert "--repo-id" not in text  # build.toml names the repository, once
    for name in set(re.findall(r"tools/\w+\.py|requirements[\w-]*\.txt", text)):
        assert (ROOT / name).is_file(), name
    filters = re.findall(r"^      - (\S+)$", text, re.M)  # paths of release.yml
    inputs = [name for backend in KERNEL.backends for name in KERNEL.inputs(backend)]
    for name in ("CARD.md", *inputs):  # of what kernel-builder builds
        matching = any(fnmatch.fnmatch(name, pattern) for pattern in filters)
        assert matching or name.startswith("tools/"), name  # of the local build


def test_the_package_keeps_to_what_the_hub_asks() -> None:
    """No module but torch's, Python's and its own, and Triton's where there is Triton; ops in the
    build's namespace."""
    registrars = ("define", "impl", "register_autograd", "register_fake", "register_vmap")
    found = 0
    for module in [*PACKAGE.rglob("*.py"), *(ROOT / builder.UNIVERSAL).rglob("*.py")]:
        known = {"torch", *sys.stdlib_module_names}
        if module.name == "triton_kernels.py":
            known.add("triton")
        for node in ast.walk(ast.parse(module.read_text(), feature_version=(3, 9))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in known, name
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in registrars:
                found += 1
                op = ast.unparse(node.args[0])
                assert op.startswith("add_op_namespace_prefix("), f"{module.name}: {op}"
    assert found > 0


# ----------------------------------------------------------------------------------- built variants


@each_variant
def test_variant_is_of_these_sources_and_tells_so(variant: Path) -> None:
    text = (variant / "metadata.json").read_text()
    metadata = Metadata.read_from_file(variant / "metadata.json")
    archs, backend = metadata.backend.archs or [], builder.backend_of(variant)
    assert metadata.id == KERNEL.id(backend, variant.name, archs) and archs == sorted(set(archs))
    libraries = [f"{metadata.id}.abi3.so"] if variant in NATIVE else []
    assert [path.name for path in variant.glob("*.so")] == libraries
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    sources = KERNEL.package_sources(backend)
    for file, source in sources.items():
        assert (variant / file).read_bytes() == (ROOT / source).read_bytes()
    built = {str(path.relative_to(variant)) for path in variant.rglob("*.py")}
    assert built == {*sources, "_ops.py"}
    # As kernel-builder writes it: these keys in this order, and nothing after the end.
    keys = "name id version license upstream source python-depends kernel-depends backend digest"
    assert [key for key in json.loads(text) if key != "provenance"] == keys.split()
    assert text == json.dumps(json.loads(text), indent=2)


def test_the_universal_variant_is_the_same_kernel(checkout: builder.Kernel) -> None:
    """By what its build.toml says, by its schemas, and by an id of its own sources alone."""
    native, universal = KERNEL.general("cpu"), KERNEL.general(builder.UNIVERSAL)
    assert {**universal, "backends": native["backends"]} == native
    ops = KERNEL_MODULE.native.ops
    schemas = {schema.split("(")[0]: schema for schema in KERNEL.schemas()}
    assert len(schemas) == 4
    for name, schema in schemas.items():
        parsed = torch._C.parse_schema(f"{ops.name}::{schema}")
        assert str(getattr(ops, name).default._schema) == str(parsed)
    ids = {backend: checkout.id(backend, "variant", []) for backend in BACKENDS}
    edit(checkout.root, f"universal/torch-ext/{KERNEL.package}/universal/pytorch.py")
    changed = {name for name, id in ids.items() if checkout.id(name, "variant", []) != id}
    assert changed == {builder.UNIVERSAL}


@each_native_variant
def test_library_keeps_to_the_abis_and_hides_where_it_was_built(variant: Path) -> None:
    """Python's, torch's and manylinux's, without a newer symbol, and no library beyond torch's."""
    (library,) = variant.glob("*.so")
    for path in (ROOT, builder.find_torch(KERNEL.stable_abi("cpu")), Path.home()):
        assert bytes(path) not in library.read_bytes()
    assert violations_of_releases(abi.check(variant)) == []


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_second_build_elsewhere_is_the_same(whole: bool, checkout, cpu_variant: Path) -> None:
    """Every byte but the provenance, which a copy without git has not; ``make release`` compares
    the CUDA variants. In part: what includes torch's headers is compiled again, and linked.
    Another build of a process that has loaded the first has ops of its own."""
    work = Path(".ninja") / cpu_variant.name
    if not (ROOT / work / "kernel.so").is_file():
        pytest.skip(f"{cpu_variant.name} was built by another machine, perhaps another compiler")
    if not whole:
        shutil.copytree(ROOT / work, checkout.root / work)
        for name in ("kernel.so", "torch-ext/torch_binding.cpp.o"):
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


def test_archs_in_any_order_make_one_build(checkout: builder.Kernel, monkeypatch) -> None:
    """Sorted as strings, as kernel-builder does."""
    found = []
    monkeypatch.setattr(builder, "say_if_current", lambda *arguments: found.append(arguments[-1]))
    monkeypatch.setattr(
        builder, "compile_and_link", lambda variant, *_: found.append(variant.archs)
    )
    monkeypatch.setattr(builder, "assemble", lambda *_: None)
    monkeypatch.setattr(builder.CudaToolkit, "of", lambda nvcc: builder.CudaToolkit(nvcc, (13, 0)))
    archs = ["9.0", "12.1+PTX", "10.0", "9.0"]
    builder.build(checkout, "cuda", archs, jobs=1, verbose=False, nvcc=Path("nvcc"))
    assert found == [["10.0", "12.1+PTX", "9.0"]] * 2


# -------------------------------------------------------------------------- ids and what is refused


@each_backend
def test_the_id_is_that_of_the_inputs(backend: str, checkout: builder.Kernel) -> None:
    """In any folder. What kernel-builder generates is no input."""
    (checkout.root / "torch-ext" / KERNEL.package / "_ops.py").write_text("# generated\n")
    ids = {KERNEL.id(backend, "variant", []), checkout.id(backend, "variant", [])}
    assert len(ids) == 1
    for name in ("deformable_detr/bilinear.h", "build.toml", LAYERS):
        edit(checkout.root, name)
        ids.add(checkout.id(backend, "variant", []))
    ids |= {checkout.id(backend, "other", []), checkout.id(backend, "variant", ["9.0"])}
    assert len(ids) == 6


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
    """Then its commit is the present one, without compiling. A failed build leaves the last one."""
    built = Path(shutil.copytree(cpu_variant, checkout.root / "build" / cpu_variant.name))
    git = {"commit": "2" * 40, "dirty": False}
    monkeypatch.setattr(builder, "git_status", lambda *_: git)
    assert builder.say_if_current(checkout, "cpu", "cpu", None)
    assert json.loads((built / "metadata.json").read_text())["provenance"]["kernel"] == git
    edit(checkout.root, "deformable_detr/bilinear.h")
    assert not builder.is_current(checkout, "cpu", built, None)
    before = Digest.hash_variant(DigestAlgorithm.SHA256, built)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(builder.BuildError):
        builder.build(checkout, "cpu", None, jobs=1, verbose=False)
    before.validate(Digest.hash_variant(DigestAlgorithm.SHA256, built))


def test_an_edit_during_the_build_is_refused(checkout: builder.Kernel, monkeypatch) -> None:
    """What was compiled may be older or newer than what the id was derived from."""
    edit_source = functools.partial(edit, checkout.root, "deformable_detr/bilinear.h")
    monkeypatch.setattr(builder, "compile_and_link", lambda *_: edit_source())
    with pytest.raises(builder.BuildError, match="changed during the build"):
        builder.build(checkout, "cpu", None, jobs=1, verbose=False)
    assert not (checkout.root / "build").exists()


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
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(builder, "USUAL_CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(builder.NvccMissing, match="pip install -r requirements-cuda.txt"):
        builder.CudaToolkit.find()
    with pytest.raises(builder.BuildError, match="no-such-compiler is missing; install one"):
        builder.find_compiler()


def test_which_gpus_a_build_covers() -> None:
    covered = "9.0 on 9.0, 8.0 on 8.6, 8.0+PTX on 9.0, 9.0a on 9.0, 10.0f on 10.3"
    for case in (case.split(" on ") for case in covered.split(", ")):
        assert builder.covers(case[:1], case[1]), case
    for case in (
        case.split(" on ") for case in "8.6 on 8.0, 8.0 on 9.0, 10.0a on 10.3".split(", ")
    ):
        assert not builder.covers(case[:1], case[1]), case
    codes = [flag.split("code=")[-1] for flag in builder.gencode(["9.0", "12.1+PTX"])]
    assert codes == ["sm_90", "sm_121", "compute_121"]
