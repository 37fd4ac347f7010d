"""The CPU kernels' own matters: instruction sets, threads, processes and memory."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import DTYPES, Case, make_inputs
from processes import TESTS, python

MEGABYTE = 2**20


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(kernel, inputs):
    """Output and gradients."""
    output = kernel.ms_deform_attn(*inputs.args)
    return [output, *kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)]


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets(capability):
    """The native comparisons with the reference, in a process held to an instruction set.

    One that the processor does not have is lowered to the next that it has; the widest that it has
    is what all other tests run.
    """
    cases = "pyramid or encoder or channels_30 or channels_3 or channels_71 or thin_maps or far"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_operator.py",
         "-k", f"cpu and native and (test_matches_reference and ({cases}) or test_any_mixture)"],
        cwd=TESTS,
        env={**os.environ, "MSDA_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


THREAD_CASES = [
    Case("threads", ((12, 17), (6, 9)), queries=90, heads=3, channels=32),
    Case("one_map", ((100, 167),), batch=1, queries=700, heads=1, channels=8),
    Case("encoder", ((60, 80), (30, 40)), batch=1, queries=6000, heads=2, channels=32,
         locations="encoder"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", THREAD_CASES, ids=lambda case: case.name)
def test_repeats_bit_for_bit_with_any_number_of_threads(kernel, set_threads, case, dtype):
    inputs = make_inputs(case, dtype)
    results = []
    for number in (1, 2, 3, 1):
        set_threads(number)
        results.append(run(kernel, inputs))
    assert all(same(result, results[0]) for result in results[1:])


def test_callers_may_have_threads_of_their_own(kernel, set_threads):
    set_threads(2)
    inputs = make_inputs(THREAD_CASES[0], torch.float32)
    expected = run(kernel, inputs)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(kernel, inputs), range(16)))
    assert all(same(result, expected) for result in results)


def test_set_num_threads_is_honoured():
    """Threads that take part in a call are started by it, and stay."""
    script = """
import os
import torch
from cases import Case, make_inputs
from conftest import KERNEL

torch.set_num_threads(1)
inputs = make_inputs(Case("any", ((60, 80),), queries=2000, heads=8, channels=32), torch.float32)
KERNEL.ms_deform_attn  # loaded
for number in (1, 3):
    torch.set_num_threads(number)
    before = len(os.listdir("/proc/self/task"))
    KERNEL.ms_deform_attn(*inputs.args)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    assert python(script).split() == ["0", "2"]


class Calls(torch.utils.data.Dataset):
    """Items computed with the kernel, as a dataset's transformation would."""

    def __init__(self, kernel, inputs):
        self.kernel, self.inputs = kernel, inputs

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return run(self.kernel, self.inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_works_in_a_data_loader_worker(kernel, set_threads):
    set_threads(2)
    inputs = make_inputs(THREAD_CASES[0], torch.float32)
    expected = run(kernel, inputs)  # threads are there when the workers are forked
    loader = torch.utils.data.DataLoader(
        Calls(kernel, inputs),
        batch_size=None,
        num_workers=2,
        timeout=60,
        multiprocessing_context="fork",
    )
    results = list(loader)
    assert len(results) == 4 and all(same(result, expected) for result in results)
    assert same(run(kernel, inputs), expected)


def test_memory_beyond_the_results_is_a_megabyte_a_thread():
    """Peak resident memory of a call, less its results."""
    script = """
import torch
from cases import Case, make_inputs
from conftest import KERNEL

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(2)
case = Case("any", ((100, 167), (50, 84)), batch=1, queries=4000, heads=8, channels=32)

def call(inputs):
    output = KERNEL.ms_deform_attn(*inputs.args)
    return [output, *KERNEL.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)]

for dtype in (torch.float32, torch.float16):
    inputs = make_inputs(case, dtype)
    call(make_inputs(Case("small", ((4, 5),), queries=1, heads=1), dtype))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    results = call(inputs)
    peak = (kilobytes("VmHWM") - before) * 1024
    print(peak - sum(result.nbytes for result in results))
    del inputs, results
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured in /proc")
    for dtype, beyond in zip(("float32", "float16"), map(int, python(script).split())):
        # Two threads, and another megabyte for what they and the allocator round up.
        assert beyond < 3 * MEGABYTE, f"{beyond / MEGABYTE:.1f} MB in {dtype}"


def test_out_of_memory_in_a_worker_says_so_and_leaves_the_process_usable():
    """A worker thread has no memory for the rows of a map that has 4096 channels."""
    script = """
import resource
import torch
from cases import SMALL, Case, make_inputs
from conftest import KERNEL

def call(inputs):
    return KERNEL.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)

torch.set_num_threads(2)
wide = Case("wide", ((2, 4000),), batch=1, queries=50, heads=1, channels=4096)
inputs, small = make_inputs(wide, torch.float32), make_inputs(SMALL, torch.float32)
call(small)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + inputs.value.nbytes + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    call(inputs)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(all(grad.isfinite().all() for grad in call(small)))
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is measured in /proc")
    message, usable = python(script).strip().splitlines()[-2:]
    assert message.startswith("out of memory: ms_deform_attn on cpu cannot allocate ")
    assert usable == "True"
