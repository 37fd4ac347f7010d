"""Loading: twice, two builds at once, in child processes, without a GPU, and where it cannot be."""

import os
import shutil
from pathlib import Path

import kernels
import processes
import pytest
import torch
from cases import SMALL, assert_close, make_inputs
from conftest import KERNEL, REPO_ID

VARIANT = Path(KERNEL.__file__).parent
BUILD = VARIANT.parent  # build/ of the checkout, or what kernel-builder puts in its place

# The first lines of a script: call(kernel) computes and checks, in forward and backward.
PREAMBLE = f"""
import kernels, logging, torch
from cases import SMALL, assert_close, make_inputs

logging.getLogger("kernels").setLevel("ERROR")  # of a build from a tree with changes it warns

def load():
    return kernels.get_kernel({REPO_ID!r}, version=1, backend="cpu")

def call(kernel):
    inputs = make_inputs(SMALL, torch.float32).require_grad()
    reference = inputs.double().require_grad()
    output = kernel.ms_deform_attn(*inputs.args)
    expected = kernel.reference.ms_deform_attn(*reference.args)
    assert_close(output, expected, "output")
    grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    wanted = torch.autograd.grad(expected, reference.differentiable(), reference.grad_output)
    for grad, other in zip(grads, wanted):
        assert_close(grad, other, "gradient")
    return "right"
"""


def python(script: str, **environment: str) -> list[str]:
    """The words that the script prints."""
    return processes.python(PREAMBLE + script, **environment).split()


@pytest.fixture(scope="module")
def cpu_variant():
    """Skips where only a CUDA variant was built."""
    if not any("-cpu-" in path.name for path in BUILD.iterdir()):
        pytest.skip(f"no CPU variant beside {VARIANT.name}: python tools/build.py --backend cpu")


def test_loaded_twice_is_the_same(kernel):
    backend = "cpu" if "-cpu-" in VARIANT.name else None
    assert kernels.get_kernel(REPO_ID, version=1, backend=backend) is kernel
    assert kernels.get_local_kernel(BUILD, backend=backend) is kernel
    repository = kernels.LocalLayerRepository(BUILD, layer_name="MultiScaleDeformableAttention")
    if backend is None or torch.version.cuda is None:
        assert repository.load() is kernel.layers.MultiScaleDeformableAttention


def test_imported_again_after_it_was_forgotten(cpu_variant):
    """As reloading tools do: the ops, which torch keeps, are not registered twice."""
    script = """
first = load()
for module in [name for name in sys.modules if name.startswith(first.__name__)]:
    del sys.modules[module]
print(call(load()), call(first))
"""
    assert python(script) == ["right"] * 2


@pytest.mark.parametrize("forgotten", [False, True])
def test_the_same_build_from_another_folder(cpu_variant, tmp_path, forgotten):
    """Where the first was forgotten, its ops are there: another library of them would be refused by
    torch, whose StableLibrary (of 2.11 to 2.13) then ends the process."""
    shutil.copytree(BUILD, tmp_path / "build")
    script = f"""
from pathlib import Path
first = load()
if {forgotten}:
    for module in [name for name in sys.modules if name.startswith(first.__name__)]:
        del sys.modules[module]
copy = kernels.get_local_kernel(Path({str(tmp_path)!r}), backend="cpu")
assert copy is not first and copy.__name__ == first.__name__
assert (copy.ms_deform_attn is first.ms_deform_attn) is not {forgotten}
print(call(copy), call(first))
"""
    assert python(script) == ["right"] * 2


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("changed", ["library", "module"])
def test_another_build_of_the_same_id(cpu_variant, tmp_path, changed, forgotten):
    """As two builds of uncommitted changes by kernel-builder. Python gives the second package the
    modules of the first, unless they are forgotten: then only the library is the first's."""
    shutil.copytree(BUILD, tmp_path / "build")
    (other,) = (tmp_path / "build").glob("*-cpu-*")
    if changed == "library":
        (file,) = other.glob("*.abi3.so")
    else:
        file = other / "layers.py"
    with open(file, "ab") as content:
        content.write(b"\n")
    script = f"""
from pathlib import Path
first = load()
if {forgotten}:
    for module in [name for name in sys.modules if name.startswith(first.__name__)]:
        del sys.modules[module]
try:
    other = kernels.get_local_kernel(Path({str(tmp_path)!r}), backend="cpu")
except ImportError as error:
    assert "has another build than" in str(error), error
    print("refused", call(first))
else:
    print(call(other), call(first))
"""
    expected = ["right"] if (changed, forgotten) == ("module", True) else ["refused"]
    assert python(script) == [*expected, "right"]


def test_a_build_of_uncommitted_changes_is_told(cpu_variant, tmp_path):
    """By its id, as kernel-builder writes it. (The ops have another, so it does not load.)"""
    shutil.copytree(BUILD, tmp_path / "build")
    (variant,) = (tmp_path / "build").glob("*-cpu-*")
    (library,) = variant.glob("*.abi3.so")
    library.rename(variant / f"{library.name.split('.')[0]}_dirty.abi3.so")
    script = f"""
import warnings
from pathlib import Path
with warnings.catch_warnings(record=True) as caught:
    try:
        kernels.get_local_kernel(Path({str(tmp_path)!r}), backend="cpu")
    except ImportError:
        pass
print(*(str(warning.message).split(": ")[-1] for warning in caught), sep="")
"""
    assert python(script) == "other builds may have its id".split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("before", [False, True], ids=["loaded_after", "loaded_before"])
def test_in_a_fork(cpu_variant, before):
    script = f"""
# OpenMP's threads do not survive a fork: torch's own operators would wait for them.
torch.set_num_threads(1)
if {before}:
    call(load())
child = os.fork()
if child == 0:
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError:
        os._exit(3)
    try:
        os._exit(0 if call(load()) == "right" else 1)
    finally:
        os._exit(2)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, call(load()))
"""
    status, of_parent = python(script)
    if before and status == "3":  # where there is a GPU, after a backward
        pytest.skip("torch's own autograd does not survive a fork here")
    assert (status, of_parent) == ("0", "right")


def work(rank):
    torch.set_num_threads(1)
    kernel = kernels.get_kernel(REPO_ID, version=1, backend="cpu")
    inputs = make_inputs(SMALL, torch.float32)
    expected = kernel.reference.ms_deform_attn(*inputs.double().args)
    assert_close(kernel.ms_deform_attn(*inputs.args), expected, "output")


def test_in_a_spawned_process(cpu_variant):
    torch.multiprocessing.spawn(work, nprocs=1)


def test_the_cpu_variant_needs_no_gpu(cpu_variant):
    """Nor does it touch one."""
    script = """
kernel = load()
assert "-cpu-" in kernel.__file__
print(call(kernel), torch.cuda.is_initialized())
"""
    assert python(script, CUDA_VISIBLE_DEVICES="") == ["right", "False"]


@pytest.mark.parametrize("cuda", ["11.8", "12.4"])
def test_a_cuda_too_old_is_told(monkeypatch, tmp_path, cuda):
    """By the loader, which names what there is and what it looked for."""
    name = "torch-stable-abi210-cu130-x86_64-linux"
    (tmp_path / "build").mkdir()
    shutil.copytree(VARIANT, tmp_path / "build" / name)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(FileNotFoundError) as error:
        kernels.get_local_kernel(tmp_path)
    assert "Cannot find a build variant for this system" in str(error.value)
    told = f"{name}: CUDA version (13.0) is not compatible with system CUDA version ({cuda})"
    assert told in str(error.value)
