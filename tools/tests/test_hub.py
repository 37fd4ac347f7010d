"""From the source to the Hub and back: published with tools/publish.py, fetched with kernels.

The Hub is a stand-in on this machine. Each consumer is a process of its own with an empty cache, as
a user's is.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BACKEND, KERNEL, REPO_ID

from tools import abi
from tools import build as builder
from tools.tests.hub import TOKEN, Fault, Hub, Repository
from tools.tests.releases import (
    VARIANTS,
    copy_release,
    skip_if_the_compiler_is_newer,
    skip_without_abi_tools,
)

VARIANT = Path(KERNEL.__file__).parent.name  # what suits this environment

# Variants that suit no environment that this test runs in: of other machines, CUDA and torch.
FOREIGN = [
    "torch-stable-abi210-cpu-aarch64-linux",
    "torch-stable-abi210-cu126-x86_64-linux",
    "torch-stable-abi210-cu139-x86_64-linux",
    "torch-stable-abi210-rocm72-x86_64-linux",
    "torch-stable-abi299-cpu-x86_64-linux",
    "torch27-cxx11-cpu-x86_64-linux",
    "torch27-cxx11-cu128-x86_64-linux",
]

# For each call of a function of kernels: where the kernel came from and what it ran on, once its
# output was found to be that of the float64 reference there; or what was raised.
CONSUMER = """
import json, platform, sys
from pathlib import Path
import kernels, torch
from cases import SMALL, assert_close, make_inputs

exec(sys.argv[2])  # what makes this machine pass for another

results = []
for function, arguments in json.loads(sys.argv[1]):
    try:
        kernel = getattr(kernels, function)(**arguments)
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
        continue
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        inputs = make_inputs(SMALL, torch.float32, device)
        expected = kernel.reference.ms_deform_attn(*inputs.double().args)
        output = kernel.ms_deform_attn(*inputs.args)
        assert output.device.type == device
        assert_close(output, expected, "output")
    results.append([str(Path(kernel.__file__).parent), devices])
print(json.dumps(results))
"""


# The command line of kernels, several times.
KERNELS_COMMANDS = """
import json, sys
from kernels.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    main()
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub on which the kernel was published, beside variants for other environments."""
    skip_without_abi_tools()
    kernel = copy_release(tmp_path_factory.mktemp("release"))
    for variant in VARIANTS:
        skip_if_the_compiler_is_newer(abi.check(variant))
    with Hub() as hub:
        home = tmp_path_factory.mktemp("publisher")
        publish = [builder.ROOT / "tools" / "publish.py", kernel.root, "--partial"]
        run(hub, home, publish, HF_TOKEN=TOKEN)
        repository = hub.repositories[REPO_ID]
        metadata = repository.files("v1")[f"build/{VARIANT}/metadata.json"]  # a lock reads them all
        foreign = {f"build/{name}/metadata.json": metadata for name in FOREIGN}
        repository.commit("refs/heads/v1", {**repository.files("v1"), **foreign})
        hub.requests.clear()
        yield hub


@pytest.fixture(autouse=True)
def no_faults(hub: Hub) -> None:
    hub.faults.clear()


def run(hub: Hub, home: Path, arguments: list, **environment: str) -> str:
    """What a Python program prints in a fresh process that knows only this Hub."""
    others = ("HF_", "LOCAL_KERNELS", "KERNELS_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    paths = [str(builder.ROOT / "tests"), *filter(None, [clean.get("PYTHONPATH")])]
    environment = {
        **clean,
        **hub.environment(home),
        "PYTHONPATH": os.pathsep.join(paths),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def consume(
    hub: Hub, home: Path, *calls: "tuple[str, dict]", machine: str = "", **environment: str
) -> list:
    """What a fresh process gets from each call: the kernel's folder and devices, or the error."""
    calls = [(name, {"backend": BACKEND, **arguments}) for name, arguments in calls]
    program = ["-c", CONSUMER, json.dumps(calls), machine]
    return json.loads(run(hub, home, program, **environment).splitlines()[-1])


def get(repo_id: str = REPO_ID, **arguments) -> "tuple[str, dict]":
    """A call of get_kernel, for version 1 and with trust unless told otherwise."""
    if "revision" not in arguments:
        arguments = {"version": 1, **arguments}
    return "get_kernel", {"repo_id": repo_id, "trust_remote_code": True, **arguments}


def assert_is_what_was_published(hub: Hub, folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    prefix = f"build/{VARIANT}/"
    published = hub.repositories[REPO_ID].files("v1").items()
    assert files == {p[len(prefix) :]: c for p, c in published if p.startswith(prefix)}


def test_the_variant_of_this_environment_is_fetched_and_runs(hub: Hub, tmp_path: Path) -> None:
    """And only that one, although the largest file breaks off halfway once."""
    published = hub.repositories[REPO_ID].files("v1")
    (library,) = (path for path in published if re.search(rf"/{VARIANT}/.*\.so$", path))
    hub.faults = [Fault(f"GET .*{library}", bytes_sent=len(published[library]) // 2, times=1)]
    (result,) = consume(hub, tmp_path, get())
    assert isinstance(result, list), result
    folder, devices = Path(result[0]), result[1]
    assert folder.is_relative_to(tmp_path) and folder.name == VARIANT
    on_gpu = torch.cuda.is_available()
    compute = VARIANT.split("-")[3]
    assert re.fullmatch(r"cu\d+" if on_gpu else "cpu", compute), VARIANT
    assert devices == (["cpu", "cuda"] if on_gpu else ["cpu"])
    assert_is_what_was_published(hub, folder)
    fetched = {r.split("/build/")[1].split("/")[0] for r in hub.requests if "/resolve/" in r}
    assert fetched == {VARIANT}
    assert sum(r.startswith("GET ") and library in r for r in hub.requests) == 2


MACHINES = {
    "rocm": "torch.version.cuda, torch.version.hip = None, '7.9.1'",
    "xpu": "torch.version.cuda, torch.version.xpu = None, '20990100'",
    "metal": "torch.version.cuda, torch.backends.mps.is_available = None, lambda: True",
    "windows": "platform.system = lambda: 'Windows'",
    "torch_2_8": "torch.__version__ = '2.8.0'",
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_no_native_variant_serves_gets_the_universal_one(
    hub: Hub, tmp_path: Path, machine: str
) -> None:
    """Here the machine passes for another where the loader asks. It computes on the CPU, on which
    the universal variant gives the right answer, too."""
    if not any(variant.name == builder.UNIVERSAL_VARIANT for variant in VARIANTS):
        pytest.skip("no torch-universal: python tools/build.py --backend universal")
    (result,) = consume(
        hub, tmp_path, get(backend=None), machine=MACHINES[machine], CUDA_VISIBLE_DEVICES=""
    )
    assert isinstance(result, list), result
    assert Path(result[0]).name == builder.UNIVERSAL_VARIANT


def test_locked_then_loaded_offline(hub: Hub, tmp_path: Path) -> None:
    """`kernels lock`, `kernels download`, then load_kernel and a pinned revision, without a Hub."""
    pytest.importorskip("sigstore", reason="the command line of kernels needs it")
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(f'[tool.kernels.dependencies]\n"{REPO_ID}" = 1\n')
    commands = [["lock", str(project)], ["download", "--all-variants", str(project)]]
    hub.trusted.add("org")  # a lock cannot say trust_remote_code
    try:
        run(hub, tmp_path, ["-c", KERNELS_COMMANDS, json.dumps(commands)])
    finally:
        hub.trusted.clear()
    (lock,) = json.loads((project / "kernels.lock").read_text())
    commit = hub.repositories[REPO_ID].find("v1")
    assert lock["lock"]["commit"] == commit

    lockfile = str(project / "kernels.lock")
    calls = [("load_kernel", {"repo_id": REPO_ID, "lockfile": lockfile}), get(revision=commit)]

    # huggingface_hub 1.22 and later call a snapshot incomplete that has only what kernels 0.17.2
    # asks for; the whole revision is complete.
    for result in consume(hub, tmp_path, *calls, HF_HUB_OFFLINE="1"):
        assert isinstance(result, str), result
        assert result.startswith("FileNotFoundError: Cannot find a local snapshot")
    download = (
        f"import huggingface_hub as hub; hub.snapshot_download({REPO_ID!r}, repo_type='kernel', "
        f"revision={commit!r})"
    )
    run(hub, tmp_path, ["-c", download])

    hub.requests.clear()
    loaded, pinned = consume(hub, tmp_path, *calls, HF_HUB_OFFLINE="1")
    assert isinstance(loaded, list) and loaded == pinned, (loaded, pinned)
    assert_is_what_was_published(hub, Path(loaded[0]))
    assert hub.requests == []


def test_what_cannot_be_had_is_told(hub: Hub, tmp_path: Path) -> None:
    """Each in a repository of its own, since a cache remembers."""
    files = hub.repositories[REPO_ID].files("v1")
    foreign = {path: c for path, c in files.items() if Path(path).parent.name in FOREIGN}
    for name in ("short", "broken", "failing", "foreign"):
        hub.repositories[f"org/{name}"] = Repository()
        content = foreign if name == "foreign" else files
        hub.repositories[f"org/{name}"].commit("refs/heads/v1", content)
    hub.faults = [
        Fault(r"GET /kernels/org/broken/resolve/.*\.so", bytes_sent=0),
        Fault(r"GET /kernels/org/short/resolve/.*\.so", shortened_to=1000),
        Fault(r"GET /api/kernels/org/failing/refs", status=500),
    ]
    expected = [
        (get(version=7), "ValueError: Version 7 not found, available versions: 1"),
        (get("org/nothing"), "RepositoryNotFoundError: .*org/nothing"),
        (get(trust_remote_code=False), "ValueError: .*is not from a trusted publisher"),
        (get("org/foreign"), "FileNotFoundError: Cannot find a build variant for this system"),
        (get("org/short"), "OSError: Consistency check failed: file should be of size"),
        (get("org/broken"), "RemoteProtocolError: .*without sending complete message body"),
        (get("org/failing"), "HfHubHTTPError: Server error '500"),
    ]
    results = consume(hub, tmp_path, *(call for call, _ in expected))
    for result, (call, message) in zip(results, expected):
        assert isinstance(result, str) and re.match(message, result, re.S), (call, result)
