"""From the source to the Hub and back: released, published with tools/publish.py, fetched with
kernels. The Hub is a stand-in on this machine.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKEND, KERNEL, REPO_ID
from huggingface_hub import HfApi

from tools import abi, publish
from tools import build as builder
from tools import release as release_tool
from tools.tests import releases
from tools.tests.hub import TOKEN, Fault, Hub, Repository

VARIANT = Path(KERNEL.__file__).parent.name  # what suits this environment
FOREIGN = ["torch-stable-abi210-rocm72-x86_64-linux", "torch-stable-abi299-cpu-x86_64-linux"]

# Where each kernel came from, once its output was found right there; or what was raised.
CONSUMER = """
import json, platform, sys
import kernels, torch
from cases import OPERATORS, SMALL, assert_close

exec(sys.argv[3])  # what makes this machine pass for another
for repo_id, version in json.loads(sys.argv[1]):
    arguments = dict(version=version, trust_remote_code=True, backend=json.loads(sys.argv[2]))
    try:
        kernel = kernels.get_kernel(repo_id, **arguments)
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            inputs = OPERATORS["ms_deform_attn"](SMALL, torch.float32, device)
            expected = kernel.reference.ms_deform_attn(*inputs.double().args)
            assert_close(kernel.ms_deform_attn(*inputs.args), expected, "output")
        print(json.dumps(kernel.__file__))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.fixture
def release(tmp_path: Path) -> builder.Kernel:
    """The variant of this environment as if built from a commit, with what is published beside."""
    kernel = releases.copy_checkout(tmp_path / "release")
    (kernel.root / "benchmarks").mkdir()
    for name in ("CARD.md", "benchmarks/benchmark.py"):
        shutil.copyfile(releases.ROOT / name, kernel.root / name)
    variant = shutil.copytree(Path(KERNEL.__file__).parent, kernel.root / "build" / VARIANT)
    git = {"commit": "1" * 40, "dirty": False}
    releases.edit_metadata(Path(variant), provenance=builder.provenance(git))
    releases.violations_of_releases(abi.check(Path(variant)))
    return kernel


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with Hub() as hub:
        monkeypatch.setattr(publish, "HfApi", functools.partial(HfApi, hub.url))
        monkeypatch.setattr(publish, "get_token", lambda: TOKEN)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


def run(kernel: builder.Kernel, *arguments: str) -> None:
    """Publishes what there is: a development machine has not built a whole release."""
    publish.main([str(kernel.root), "--partial", *arguments])


def refused(kernel: builder.Kernel, *arguments: str) -> str:
    with pytest.raises(SystemExit, match="^error: ") as exit:
        run(kernel, *arguments)
    return exit.value.code


def local_files(kernel: builder.Kernel) -> "dict[str, bytes]":
    paths = [*kernel.root.glob("build/**/*"), kernel.root / "benchmarks" / "benchmark.py"]
    files = [path for path in paths if path.is_file() and path.suffix != ".pyc"]
    return {str(path.relative_to(kernel.root)): path.read_bytes() for path in files}


def consume(hub: Hub, home: Path, calls: list, backend=BACKEND, machine="", **variables) -> list:
    """What a fresh process gets from each call, which fetches from the stand-in."""
    others = ("HF_", "LOCAL_KERNELS", "KERNELS_")
    environment = {name: x for name, x in os.environ.items() if not name.startswith(others)}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(releases.ROOT / "tests"), **variables}
    consumer = [sys.executable, "-c", CONSUMER, json.dumps(calls), json.dumps(backend), machine]
    done = subprocess.run(consumer, env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(calls), done.stderr
    return results


def test_published_and_fetched(hub: Hub, release: builder.Kernel, tmp_path: Path, capsys) -> None:
    (release.root / "build" / "CARD.md").touch()  # kernel-builder puts these beside the variants
    shutil.copytree(release.root / "benchmarks", release.root / "build" / "benchmarks")
    run(release, "--dry-run")
    assert f"v1: add build/{VARIANT}/metadata.json (" in capsys.readouterr().out
    assert hub.repositories == {}
    run(release)
    repository = hub.repositories[REPO_ID]
    (release.root / "build" / "CARD.md").unlink()
    shutil.rmtree(release.root / "build" / "benchmarks")
    files = local_files(release)
    refs, requests = dict(repository.refs), len(hub.requests)
    assert repository.files("v1") == {**files, ".gitattributes": b""}
    assert f'get_kernel("{REPO_ID}", version=1' in repository.files("main")["README.md"].decode()
    run(release)  # changes nothing, and sends nothing twice
    assert repository.refs == refs
    assert not any(request.startswith("PUT ") for request in hub.requests[requests:])

    # Variants of other environments beside it, and alone; the largest file breaks off once.
    foreign = {f"build/{name}/metadata.json": b"{}" for name in FOREIGN}
    repository.commit("v1", {**repository.files("v1"), **foreign})
    hub.repositories["org/foreign"] = Repository(foreign, "v1")
    hub.repositories["org/broken"] = Repository(files, "v1")
    (library,) = (path for path in files if path.endswith(".so"))
    half = len(files[library]) // 2
    hub.faults = [Fault(f"GET .*/broken/.*{library}", sent=0)]
    hub.faults += [Fault(f"GET .*{library}", sent=half, times=1)]
    hub.requests.clear()
    expected = [
        (REPO_ID, 1, f"{tmp_path}/.*/build/{VARIANT}/__init__.py"),
        (REPO_ID, 7, "ValueError: Version 7 not found, available versions: 1"),
        ("org/nothing", 1, "RepositoryNotFoundError: .*org/nothing"),
        ("org/foreign", 1, "FileNotFoundError: Cannot find a build variant for this system"),
        ("org/broken", 1, "RemoteProtocolError: .*without sending complete message body"),
    ]
    results = consume(hub, tmp_path, [call[:2] for call in expected])
    for result, (*_, message) in zip(results, expected):
        assert re.match(message, result, re.S), result
    folder = Path(results[0]).parent
    for path in (path for path in files if VARIANT in path):
        assert (folder / Path(path).relative_to(f"build/{VARIANT}")).read_bytes() == files[path]
    fetched = {r for r in hub.requests if f"{REPO_ID}/resolve" in r}
    assert fetched and all(f"/build/{VARIANT}/" in request for request in fetched)


def test_what_a_variant_no_longer_has_is_deleted(hub: Hub, release: builder.Kernel) -> None:
    """And a new version has no build that main has."""
    old = {"build/torch29-cpu/_ops.py": b"", "LICENSE": b""}
    repository = hub.repositories[REPO_ID] = Repository(old)
    run(release)
    assert repository.files("v1") == {**local_files(release), "LICENSE": b""}
    stays, goes = {"build/other/_ops.py": b""}, {f"build/{VARIANT}/old.py": b""}
    repository.commit("v1", {**repository.files("v1"), **stays, **goes})
    run(release)
    assert repository.files("v1") == {**local_files(release), "LICENSE": b"", **stays}


# What makes this machine pass for another where the loader asks.
MACHINES = {
    "rocm": "torch.version.cuda, torch.version.hip = None, '7.9.1'",
    "xpu": "torch.version.cuda, torch.version.xpu = None, '20990100'",
    "metal": "torch.version.cuda, torch.backends.mps.is_available = None, lambda: True",
    "windows": "platform.system = lambda: 'Windows'",
    "torch_2_8": "torch.__version__ = '2.8.0'",
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "machine", ["rocm", *(pytest.param(name, marks=slow) for name in [*MACHINES][1:]), "this"]
)
def test_the_universal_variant_serves_what_no_native_one_does(
    hub: Hub, release: builder.Kernel, tmp_path: Path, machine: str
) -> None:
    """Published apart, neither removes the other. Here it computes on the CPU, and is right."""
    universal = releases.ROOT / "build" / builder.UNIVERSAL_VARIANT
    if not universal.is_dir():
        pytest.skip("no torch-universal: python tools/build.py --backend universal")
    run(release)
    native = release.root / "build" / VARIANT
    native.rename(release.root / VARIANT)
    git = builder.provenance({"commit": "1" * 40, "dirty": False})
    releases.edit_metadata(
        Path(shutil.copytree(universal, native.parent / universal.name)), provenance=git
    )
    run(release)
    (result,) = consume(
        hub,
        tmp_path,
        [(REPO_ID, 1)],
        backend=BACKEND if machine == "this" else None,
        machine=MACHINES.get(machine, ""),
        CUDA_VISIBLE_DEVICES="",
    )
    expected = VARIANT if machine == "this" else universal.name
    assert re.match(f"{tmp_path}/.*/build/{expected}/__init__.py", result), result


@pytest.mark.parametrize("request_", ["PUT /objects/", "POST .*/commit/v1"])
def test_an_interruption_publishes_nothing_and_is_resumed(hub, release, request_: str) -> None:
    hub.faults = [Fault(request_)]
    refused(release)
    assert set(hub.repositories[REPO_ID].refs) == {"main"}
    hub.faults = []
    run(release)
    assert hub.repositories[REPO_ID].files("v1").items() >= local_files(release).items()


def spoil_abi(variant: Path) -> None:
    """A library that calls C++ of torch beside the stable ABI."""
    source = 'namespace c10 { void f(); } extern "C" void g() { c10::f(); }'
    (library,) = variant.glob("*.so")
    command = [builder.find_compiler(), "-shared", "-fPIC", "-xc++", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)


def change(**keys):
    return functools.partial(releases.edit_metadata, **keys)


DIRTY = builder.provenance({"commit": "1" * 40, "dirty": True})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (functools.partial(releases.edit, name="layers.py"), "not match its digest: .*layers.py"),
        (spoil_abi, "c10::f.* has no version and is not of the stable ABI of torch 2.10"),
        (change(provenance=DIRTY), "was built from a dirty tree; commit"),
        (change(provenance=None), "does not tell which commit"),
        (change(digest=None), "has no digest"),
        (change(version=2), "is of version 2, build.toml has 1"),
        (change(id="_of_others"), "was built from other sources"),
        (lambda variant: (variant / "metadata.json").unlink(), "metadata.json: .*No such file"),
        (shutil.rmtree, "has no variant; run make release"),
    ],
)
def test_a_release_that_is_not_fit_is_refused(hub: Hub, release, spoil, message: str) -> None:
    spoil(release.root / "build" / VARIANT)
    assert re.search(message, refused(release), re.S)
    assert hub.requests == []


def test_a_release_in_part_is_refused(hub: Hub, release: builder.Kernel) -> None:
    with pytest.raises(SystemExit) as exit:
        publish.main([str(release.root)])
    whole = set(release_tool.matrix(release))
    assert {x for x in whole if f"{x} is missing" in exit.value.code} == whole - {VARIANT}


def test_what_the_hub_refuses_is_told(hub: Hub, release, monkeypatch, tmp_path: Path) -> None:
    """Then nothing was published; nor without a Hub, a token or a release."""
    told = {
        401: "does not accept the token",
        403: "may not write.*kernels-community",
        412: "changed meanwhile",
        500: "refused",
    }
    for status, message in told.items():
        hub.faults = [Fault("POST /api/repos/create", status=status)]
        assert re.search(message, refused(release))
    monkeypatch.setattr(publish, "HfApi", functools.partial(HfApi, "http://127.0.0.1:9"))
    assert "the Hub cannot be reached" in refused(release)
    monkeypatch.setattr(publish, "get_token", lambda: None)
    assert "there is no token; log in" in refused(release)
    with pytest.raises(SystemExit, match="no build.toml; run make release first"):
        publish.main([str(tmp_path)])
    assert hub.repositories == {}


def test_a_release_is_of_the_last_commit(tmp_path: Path, monkeypatch) -> None:
    """Also the second time, whatever was changed in its checkout. Differences are found."""
    root, folder = tmp_path / "repository", tmp_path / "checkout"
    inner, copy = root / "inner", folder / "inner"
    inner.mkdir(parents=True)
    monkeypatch.setattr(release_tool, "ROOT", root)
    for text in ("first", "other"):  # of one size
        (inner / "file").write_text(text)
        last = releases.commit_all(root)
        assert release_tool.check_out(folder) == last
        assert release_tool.differences(inner, copy) == []
        (copy / "file").write_text("wrong")
        assert release_tool.differences(inner, copy) == ["file"]
