"""From the source to the Hub and back: released, published with tools/publish.py, fetched with
kernels. The Hub is a stand-in on this machine.
"""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKEND, REPO_ID
from conftest import KERNEL as KERNEL_MODULE
from huggingface_hub import HfApi

from tools import abi, publish
from tools import build as builder
from tools import release as release_tool
from tools.tests.conftest import ROOT, commit_all, edit, edit_metadata, violations_of_releases
from tools.tests.hub import Fault, Hub, Repository

BUILT = Path(KERNEL_MODULE.__file__).parent  # what suits this environment
VARIANT = BUILT.name
UNIVERSAL = ROOT / "build" / builder.UNIVERSAL_VARIANT
# Where each kernel came from, once its output was found right there; or what was raised.
CONSUMER = """
import json, platform, sys
import kernels, torch
from cases import SMALL, assert_close, make_inputs

for repo_id, version, backend, machine in json.loads(sys.argv[1]):
    exec(machine)  # what makes this one pass for another
    try:
        kernel = kernels.get_kernel(
            repo_id, version=version, trust_remote_code=True, backend=backend
        )
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            inputs = make_inputs(SMALL, torch.float32, device)
            expected = kernel.reference.ms_deform_attn(*inputs.double().args)
            assert_close(kernel.ms_deform_attn(*inputs.args), expected, "output")
        print(json.dumps(kernel.__file__))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""
# Each from the one before, where the loader asks: with ROCm, XPU, MPS, Windows, an old torch.
OTHER_MACHINES = (
    "torch.version.cuda, torch.version.hip = None, '7.9.1'",
    "torch.version.hip, torch.version.xpu = None, '20990100'",
    "torch.version.xpu, torch.backends.mps.is_available = None, lambda: True",
    "torch.backends.mps.is_available, platform.system = lambda: False, lambda: 'Windows'",
    "platform.system, torch.__version__ = lambda: 'Linux', '2.8.0'",
)


def add_variant(kernel: builder.Kernel, built: Path) -> Path:
    """As if built from a commit."""
    variant = Path(shutil.copytree(built, kernel.root / "build" / built.name))
    edit_metadata(variant, provenance=builder.provenance({"commit": "1" * 40, "dirty": False}))
    return variant


@pytest.fixture
def release(checkout: builder.Kernel) -> builder.Kernel:
    """A release of this environment's variant alone."""
    violations_of_releases(abi.check(add_variant(checkout, BUILT)))
    return checkout


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with Hub() as hub:
        monkeypatch.setattr(publish, "HfApi", functools.partial(HfApi, hub.url))
        monkeypatch.setattr(publish, "get_token", lambda: "hf_test")
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


def run(kernel: builder.Kernel, *arguments: str) -> None:
    """Publishes what there is: a development machine has not built a whole release."""
    publish.main([str(kernel.root), "--partial", *arguments])


def refused(root: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit, match="^error: ") as exit:
        publish.main([str(root), *arguments])
    return exit.value.code


def local_files(kernel: builder.Kernel) -> dict[str, bytes]:
    paths = [*kernel.root.glob("build/torch*/**/*"), kernel.root / "benchmarks" / "benchmark.py"]
    files = [path for path in paths if path.is_file() and path.suffix != ".pyc"]
    return {str(path.relative_to(kernel.root)): path.read_bytes() for path in files}


def consume(hub: Hub, home: Path, calls: list[tuple], **variables: str) -> list[str]:
    """What a fresh process gets from each call, which fetches from the stand-in."""
    others = ("HF_", "LOCAL_KERNELS", "KERNELS_")
    environment = {name: x for name, x in os.environ.items() if not name.startswith(others)}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), **variables}
    consumer = [sys.executable, "-c", CONSUMER, json.dumps(calls)]
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
    branches, files = hub.repositories[REPO_ID].branches, local_files(release)
    assert branches["v1"] == {**files, ".gitattributes": b""}
    assert f'get_kernel("{REPO_ID}", version=1' in branches["main"]["README.md"].decode()
    before = copy.deepcopy(branches)
    hub.requests.clear()
    run(release)  # changes nothing, and sends nothing twice
    assert branches == before
    assert not any(request.startswith("PUT ") for request in hub.requests)

    # Variants of other environments stay beside it; the largest file breaks off once.
    names = ["torch-stable-abi210-rocm72-x86_64-linux", "torch-stable-abi299-cpu-x86_64-linux"]
    foreign = {f"build/{name}/metadata.json": b"{}" for name in names}
    branches["v1"] |= {**foreign, f"build/{UNIVERSAL.name}/metadata.json": b"{}"}
    before = copy.deepcopy(branches)
    branches["v1"][f"build/{VARIANT}/old.py"] = b""  # what a variant no longer has is deleted
    run(release)
    assert branches == before
    hub.repositories["org/broken"] = Repository(files, "v1")
    (library,) = (path for path in files if path.endswith(".so"))
    hub.faults = [Fault(f"GET .*/broken/.*{library}", sent=0)]
    hub.faults += [Fault(f"GET .*{library}", sent=len(files[library]) // 2, times=1)]
    hub.requests.clear()
    calls = [(repo_id, 1, BACKEND, "") for repo_id in (REPO_ID, "org/broken")]
    served, failed = consume(hub, tmp_path, calls)
    assert re.match(f"{tmp_path}/.*/build/{VARIANT}/__init__.py", served), served
    assert re.match("RemoteProtocolError: .*without sending complete message body", failed), failed
    for path in (path for path in files if path.startswith("build/")):
        assert (Path(served).parents[2] / path).read_bytes() == files[path]
    fetched = {r for r in hub.requests if f"{REPO_ID}/resolve" in r}
    assert fetched and all(f"/build/{VARIANT}/" in request for request in fetched)


def test_the_universal_variant_serves_what_no_native_one_does(hub, release, tmp_path) -> None:
    """Here it computes on the CPU, and is right."""
    if not UNIVERSAL.is_dir():
        pytest.skip("no torch-universal: python tools/build.py --backend universal")
    add_variant(release, UNIVERSAL)
    run(release)
    calls = [(REPO_ID, 1, None, machine) for machine in OTHER_MACHINES]
    for result in consume(hub, tmp_path, calls, CUDA_VISIBLE_DEVICES=""):
        assert re.match(f"{tmp_path}/.*/build/{UNIVERSAL.name}/__init__.py", result), result


@pytest.mark.parametrize("request_", ["PUT /objects/", "POST .*/commit/v1"])
def test_an_interruption_publishes_nothing_and_is_resumed(hub, release, request_: str) -> None:
    """Then a new version has no build that main has."""
    repository = Repository({"build/torch29-cpu/_ops.py": b"", "LICENSE": b""})
    hub.repositories[REPO_ID], hub.faults = repository, [Fault(request_)]
    refused(release.root, "--partial")
    assert set(repository.branches) == {"main"}
    hub.faults = []
    run(release)
    assert repository.branches["v1"] == {**local_files(release), "LICENSE": b""}


def change(**keys):
    return functools.partial(edit_metadata, **keys)


DIRTY = builder.provenance({"commit": "1" * 40, "dirty": True})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (functools.partial(edit, name="layers.py"), "not match its digest: .*layers.py"),
        (lambda variant: next(variant.glob("*.so")).unlink(), "0 libraries, expected 1"),
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
    assert re.search(message, refused(release.root, "--partial"), re.S)
    assert hub.requests == []


def test_a_release_in_part_is_refused(release: builder.Kernel) -> None:
    whole, told = set(release_tool.matrix(release)), refused(release.root)
    assert {x for x in whole if f"{x} is missing" in told} == whole - {VARIANT}


def test_what_the_hub_refuses_is_told(hub: Hub, release, monkeypatch, tmp_path: Path) -> None:
    """Then nothing was published; nor without a Hub, a token or a release."""
    told = {401: "does not accept the token", 403: "may not write.*kernels-community"}
    for status, message in {**told, 412: "changed meanwhile", 500: "refused"}.items():
        hub.faults = [Fault("POST /api/repos/create", status=status)]
        assert re.search(message, refused(release.root, "--partial"))
    monkeypatch.setattr(publish, "HfApi", functools.partial(HfApi, "http://127.0.0.1:9"))
    assert "the Hub cannot be reached" in refused(release.root, "--partial")
    monkeypatch.setattr(publish, "get_token", lambda: None)
    assert "there is no token; log in" in refused(release.root, "--partial")
    assert "no build.toml; run make release first" in refused(tmp_path)
    assert hub.repositories == {}


def test_a_release_is_of_the_last_commit(tmp_path: Path, monkeypatch) -> None:
    """Also the second time, whatever was changed in its checkout. Differences are found."""
    root, folder = tmp_path / "repository", tmp_path / "checkout"
    monkeypatch.setattr(release_tool, "ROOT", root)
    root.mkdir()
    for text in ("first", "other"):  # of one size
        (root / "file").write_text(text)
        last = commit_all(root)
        assert release_tool.check_out(folder) == last
        assert (folder / "file").read_text() == text
        (folder / "file").write_text("wrong")
        assert "file" in release_tool.differences(root, folder)
