"""tools/publish.py against a stand-in of the Hub: what it refuses, changes and leaves."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import abi, publish
from tools import build as builder
from tools import release as release_tool
from tools.tests.hub import TOKEN, Fault, Hub
from tools.tests.releases import (
    KERNEL,
    VARIANTS,
    copy_release,
    edit_metadata,
    skip_if_the_compiler_is_newer,
    skip_without_abi_tools,
)

REPO_ID = KERNEL.repo_id


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> builder.Kernel:
    """Not to be changed."""
    skip_without_abi_tools()
    kernel = copy_release(tmp_path_factory.mktemp("release"))
    for variant in VARIANTS:
        skip_if_the_compiler_is_newer(abi.check(variant))
    return kernel


@pytest.fixture
def changed(release: builder.Kernel, tmp_path: Path) -> builder.Kernel:
    """To be changed."""
    return builder.Kernel.open(Path(shutil.copytree(release.root, tmp_path / "changed")))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with Hub() as hub:
        monkeypatch.setattr(publish, "HfApi", functools.partial(publish.HfApi, hub.url))
        monkeypatch.setattr(publish, "get_token", lambda: TOKEN)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


def run(kernel: builder.Kernel, *arguments: str) -> None:
    """Publishes what there is: a development machine has not built a whole release."""
    publish.main([str(kernel.root), "--partial", *arguments])


def refused(kernel: builder.Kernel, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        run(kernel, *arguments)
    assert isinstance(exit.value.code, str) and exit.value.code.startswith("error: ")
    return exit.value.code


def local_files(kernel: builder.Kernel) -> "dict[str, bytes]":
    paths = [path for path in kernel.root.glob("build/**/*") if path.is_file()]
    paths = [path for path in paths if path.suffix != ".pyc"]
    paths.append(kernel.root / "benchmarks" / "benchmark.py")
    return {str(path.relative_to(kernel.root)): path.read_bytes() for path in paths}


def first_variant(kernel: builder.Kernel) -> Path:
    """The first with a library."""
    variants = publish.find_variants(kernel.root)
    return next(v for v in variants if v.name != builder.UNIVERSAL_VARIANT)


# ------------------------------------------------------------------------------------- what arrives


def test_everything_arrives(hub: Hub, release: builder.Kernel) -> None:
    run(release)
    repository = hub.repositories[REPO_ID]
    assert repository.files("v1") == {**local_files(release), ".gitattributes": b""}
    assert set(repository.files("main")) == {"README.md", ".gitattributes"}
    card = repository.files("main")["README.md"].decode()
    assert f'get_kernel("{REPO_ID}", version=1)' in card
    for line in ("## Functions and modules", "- `ms_deform_attn`", "## Layers"):
        assert f"\n{line}\n" in card
    assert "\n\n\n" not in card and "\n- `MultiScaleDeformableAttentionV2`\n\n## " in card
    assert "{{" not in card and "{%" not in card and "license: apache-2.0" in card


def test_what_kernel_builder_puts_beside_the_variants_is_no_variant(
    hub: Hub, changed: builder.Kernel
) -> None:
    expected = local_files(changed)
    shutil.copytree(changed.root / "benchmarks", changed.root / "build" / "benchmarks")
    (changed.root / "build" / "CARD.md").touch()
    run(changed)
    assert hub.repositories[REPO_ID].files("v1") == {**expected, ".gitattributes": b""}


def test_a_second_run_changes_nothing(hub: Hub, release: builder.Kernel) -> None:
    run(release)
    refs = dict(hub.repositories[REPO_ID].refs)
    sent = sum(request.startswith("PUT ") for request in hub.requests)
    run(release)
    assert hub.repositories[REPO_ID].refs == refs
    assert sum(request.startswith("PUT ") for request in hub.requests) == sent


def test_what_a_variant_no_longer_has_is_deleted(hub: Hub, changed: builder.Kernel) -> None:
    variant = first_variant(changed)
    run(changed)
    repository = hub.repositories[REPO_ID]
    stays = {"build/torch-stable-abi210-cu126-x86_64-linux/_ops.py": b"", "notes.txt": b""}
    goes = {f"build/{variant.name}/old.py": b"", "benchmarks/benchmark_old.py": b""}
    repository.commit("refs/heads/v1", {**repository.files("v1"), **stays, **goes})
    run(changed)
    expected = {**local_files(changed), **stays, ".gitattributes": b""}
    assert repository.files("v1") == expected


def test_one_build_does_not_remove_the_variants_of_another(
    hub: Hub, changed: builder.Kernel
) -> None:
    """The universal variant is built apart from what kernel-builder builds."""
    everything = local_files(changed)
    variants = publish.find_variants(changed.root)
    run(changed)
    for variant in variants:  # each published alone
        for other in variants:
            if other != variant:
                other.rename(changed.root / other.name)
        run(changed)
        assert hub.repositories[REPO_ID].files("v1") == {**everything, ".gitattributes": b""}
        for other in variants:
            if other != variant:
                (changed.root / other.name).rename(other)


def test_a_new_version_has_no_build_of_main(hub: Hub, release: builder.Kernel) -> None:
    api = publish.HfApi(token=TOKEN)
    api.create_repo(REPO_ID, repo_type="kernel")
    repository = hub.repositories[REPO_ID]
    repository.commit("refs/heads/main", {"build/torch29-cpu/_ops.py": b"", "LICENSE": b""})
    run(release)
    assert repository.files("v1") == {**local_files(release), "LICENSE": b""}


def test_dry_run_prints_and_changes_nothing(
    hub: Hub, release: builder.Kernel, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr(publish, "get_token", lambda: None)
    run(release, "--dry-run")
    printed = capsys.readouterr().out
    assert printed.startswith(f"create repository {REPO_ID}\ncreate branch v1\n")
    for path in local_files(release):
        assert f"v1: add {path} (" in printed
    assert "main: add README.md (" in printed
    assert hub.repositories == {}
    assert all(request.startswith("GET ") for request in hub.requests)


def test_pull_requests(hub: Hub, changed: builder.Kernel, capsys) -> None:
    assert "no branch v1 that a pull request" in refused(changed, "--create-pr")
    assert hub.repositories == {}
    run(changed)
    repository = hub.repositories[REPO_ID]
    refs = dict(repository.refs)
    (changed.root / "benchmarks" / "benchmark.py").write_text("# changed\n")
    (changed.root / "CARD.md").write_text("---\nlicense: apache-2.0\n---\nchanged\n")
    capsys.readouterr()
    run(changed, "--create-pr")
    assert {name: repository.refs[name] for name in refs} == refs
    assert repository.files("refs/pr/1")["benchmarks/benchmark.py"] == b"# changed\n"
    assert repository.files("refs/pr/2")["README.md"].endswith(b"changed")
    assert f"{hub.url}/kernels/{REPO_ID}/discussions/1\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("request_", ["PUT /objects/", "POST .*/preupload/", "POST .*/commit/v1"])
def test_an_interruption_publishes_nothing_and_is_resumed(
    hub: Hub, release: builder.Kernel, request_: str
) -> None:
    hub.faults = [Fault(request_)]
    refused(release)
    assert set(hub.repositories[REPO_ID].refs) == {"refs/heads/main"}
    sent = sum(request.startswith("PUT ") for request in hub.requests)
    hub.faults = []
    run(release)
    assert hub.repositories[REPO_ID].files("v1").items() >= local_files(release).items()
    if "commit" in request_:  # the large files had arrived
        assert sum(request.startswith("PUT ") for request in hub.requests) == sent


def test_a_branch_that_stays_empty_is_told_and_filled_later(
    hub: Hub, release: builder.Kernel
) -> None:
    hub.faults = [Fault("POST .*/commit/v1"), Fault("DELETE .*/branch/v1")]
    assert "could not be removed; run it again" in refused(release)
    hub.faults = []
    run(release)
    assert hub.repositories[REPO_ID].files("v1").items() >= local_files(release).items()


def test_a_branch_that_moved_is_left(hub: Hub, changed: builder.Kernel, monkeypatch) -> None:
    run(changed)
    repository = hub.repositories[REPO_ID]
    upload = publish.upload_large_files

    def meanwhile(*arguments):
        repository.commit("refs/heads/v1", {"someone": b"else"})
        upload(*arguments)

    monkeypatch.setattr(publish, "upload_large_files", meanwhile)
    (changed.root / "benchmarks" / "benchmark.py").write_text("# changed\n")
    assert "changed meanwhile" in refused(changed)
    assert repository.files("v1") == {"someone": b"else"}


# ----------------------------------------------------------------------------------------- refusals


def spoil_digest(variant: Path) -> None:
    (variant / "layers.py").write_text("# changed\n")


def spoil_abi(variant: Path) -> None:
    """A library that calls C++ of torch beside the stable ABI."""
    source = 'namespace c10 { void f(); } extern "C" void g() { c10::f(); }'
    (library,) = variant.glob("*.so")
    command = [builder.find_compiler(), "-shared", "-fPIC", "-xc++", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)


def spoil_provenance(variant: Path) -> None:
    edit_metadata(variant, provenance=builder.provenance({"commit": "1" * 40, "dirty": True}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_digest, "does not match its digest: .*layers.py"),
        (spoil_abi, "c10::f.* has no version and is not of the stable ABI of torch 2.10"),
        (spoil_provenance, "was built from a dirty tree; commit"),
        (functools.partial(edit_metadata, provenance=None), "does not tell which commit"),
        (functools.partial(edit_metadata, digest=None), "has no digest"),
        (functools.partial(edit_metadata, version=2), "is of version 2, build.toml has 1"),
        (functools.partial(edit_metadata, id="_of_others"), "was built from other sources"),
        (functools.partial(edit_metadata, name=None), "metadata.json: .*name"),
        (lambda variant: (variant / "metadata.json").unlink(), "metadata.json: .*No such file"),
        (shutil.rmtree, "has no variant; run make release"),
    ],
)
def test_a_release_that_is_not_fit_is_refused(
    hub: Hub, changed: builder.Kernel, spoil, message: str
) -> None:
    for variant in publish.find_variants(changed.root):
        if variant != first_variant(changed):
            shutil.rmtree(variant)
    spoil(first_variant(changed))
    error = refused(changed)
    assert re.search(message, error, re.S), error
    assert hub.requests == []


def make_whole(kernel: builder.Kernel) -> None:
    """Makes copies of the first variant pass for the variants of a whole release."""
    original = first_variant(kernel)
    for name, archs in release_tool.matrix(kernel).items():
        backend = "cuda" if archs else "cpu"
        if name == builder.UNIVERSAL_VARIANT:
            if not (kernel.root / "build" / name).is_dir():
                pytest.skip("no torch-universal: python tools/build.py --backend universal")
            continue
        copy = kernel.root / "build" / name
        if copy != original:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(original, copy)
        about = {"type": backend, **({"archs": archs} if archs else {})}
        edit_metadata(copy, backend=about, id=kernel.id(backend, name, archs))


def test_a_whole_release_needs_no_option(hub: Hub, changed: builder.Kernel) -> None:
    make_whole(changed)
    publish.main([str(changed.root)])
    published = {
        path.split("/")[1] for path in hub.repositories[REPO_ID].files("v1") if "build/" in path
    }
    assert published == set(release_tool.matrix(changed))


def test_a_release_in_part_is_refused(hub: Hub, changed: builder.Kernel) -> None:
    """One variant is missing, another was built for fewer architectures."""
    make_whole(changed)
    variants = {
        variant.name.split("-")[3]: variant
        for variant in publish.find_variants(changed.root)
        if variant.name != builder.UNIVERSAL_VARIANT
    }
    archs = release_tool.matrix(changed)[variants["cu130"].name][:-2]
    id = changed.id("cuda", variants["cu130"].name, archs)
    edit_metadata(variants["cu130"], backend={"type": "cuda", "archs": archs}, id=id)
    shutil.rmtree(variants["cu132"])
    with pytest.raises(SystemExit) as exit:
        publish.main([str(changed.root)])
    assert exit.value.code.splitlines() == [
        "error: not published:",
        "  torch-stable-abi210-cu130-x86_64-linux was not built for 12.0 12.1+PTX",
        "  torch-stable-abi210-cu132-x86_64-linux is missing",
        "  make release builds all of it; --partial publishes what there is",
    ]
    assert hub.requests == []
    run(changed)
    assert f"build/{variants['cu130'].name}/metadata.json" in hub.repositories[REPO_ID].files("v1")


def test_no_token(hub: Hub, release: builder.Kernel, monkeypatch) -> None:
    monkeypatch.setattr(publish, "get_token", lambda: None)
    assert "there is no token; log in" in refused(release)
    assert hub.requests == []


def test_a_bad_token(hub: Hub, release: builder.Kernel, monkeypatch) -> None:
    monkeypatch.setattr(publish, "get_token", lambda: "hf_of_someone_else")
    assert "does not accept the token" in refused(release)
    assert hub.repositories == {}


def test_no_permission(hub: Hub, release: builder.Kernel) -> None:
    hub.forbidden.add("org")
    error = refused(release)
    assert f"may not write to {REPO_ID}" in error and "kernels-community" in error
    assert hub.repositories == {}


def test_no_hub(release: builder.Kernel, monkeypatch) -> None:
    with Hub() as hub:
        url = hub.url
    monkeypatch.setattr(publish, "HfApi", functools.partial(publish.HfApi, url))
    monkeypatch.setattr(publish, "get_token", lambda: TOKEN)
    assert "the Hub cannot be reached" in refused(release)


def test_no_release(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no build.toml; run make release first"):
        publish.main([str(tmp_path)])
