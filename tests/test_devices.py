"""Several devices, streams and threads, many calls, and too little memory."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import OPERATORS, SMALL, Case, assert_close, relative_error
from test_contract import misaligned
from test_large import make, need

CASE = Case("devices", ((20, 27), (10, 14)), queries=300, heads=4, channels=32)


@pytest.fixture
def gpus(request):
    """Skips where there are fewer than that many GPUs."""
    wanted = request.param
    if torch.cuda.device_count() < wanted:
        pytest.skip(f"{torch.cuda.device_count()} GPUs here, {wanted} are needed")


one_gpu = pytest.mark.parametrize("gpus", [1], indirect=True)
two_gpus = pytest.mark.parametrize("gpus", [2], indirect=True)


def call(kernel, operator, inputs):
    """Output and gradients."""
    output = getattr(kernel, operator)(*inputs.args, **inputs.options)
    return [output, *torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)]


def reference_of(kernel, operator, inputs):
    return call(kernel.reference, operator, inputs.double().require_grad())


def check(results, expected):
    for index, (result, wanted) in enumerate(zip(results, expected)):
        assert_close(result.detach(), wanted.detach(), f"result {index}")


# ---------------------------------------------------------------------------------------- devices


@two_gpus
def test_another_gpu_than_the_current_one(kernel, operator, gpus):
    inputs = OPERATORS[operator](CASE, torch.float32, "cuda:1").require_grad()
    assert torch.cuda.current_device() == 0
    before = torch.cuda.memory_allocated(0)
    results = call(kernel, operator, inputs)
    assert torch.cuda.current_device() == 0
    assert torch.cuda.memory_allocated(0) == before
    assert all(result.device == torch.device("cuda:1") for result in results)
    check(results, reference_of(kernel, operator, inputs))


@two_gpus
def test_gradients_cross_from_gpu_to_gpu(kernel, operator, gpus):
    """Leaves on one, the operator on the other, the loss on the first again."""
    inputs = OPERATORS[operator](CASE, torch.float32, "cuda:0").require_grad()
    output = getattr(kernel, operator)(*(tensor.to("cuda:1") for tensor in inputs.args))
    assert output.device == torch.device("cuda:1")
    (output.to("cuda:0") * inputs.grad_output).sum().backward()
    grads = [tensor.grad for tensor in inputs.differentiable()]
    check([output.to("cuda:0"), *grads], reference_of(kernel, operator, inputs))


@two_gpus
def test_tensors_of_two_gpus_are_refused(kernel, gpus):
    inputs = OPERATORS["ms_deform_attn"](SMALL, torch.float32, "cuda:0")
    inputs.attention_weights = inputs.attention_weights.to("cuda:1")
    with pytest.raises(RuntimeError, match="attention_weights is on cuda:1, expected cuda:0"):
        kernel.ms_deform_attn(*inputs.args)


# ---------------------------------------------------------------------------------------- streams


@one_gpu
def test_a_side_stream_does_not_wait_for_the_default_stream(kernel, operator, gpus):
    inputs = OPERATORS[operator](CASE, torch.float32, "cuda").require_grad()
    expected = reference_of(kernel, operator, inputs)
    side, default = torch.cuda.Stream(), torch.cuda.default_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        call(kernel, operator, inputs)  # loaded, and the stream has memory
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    with torch.cuda.stream(side):
        results = call(kernel, operator, inputs)
    side.synchronize()
    assert not default.query(), "the default stream ended first: it was waited for"
    check(results, expected)


@one_gpu
def test_the_current_stream_is_used(kernel, operator, gpus):
    """Inputs that a side stream still has to write are waited for."""
    inputs = OPERATORS[operator](CASE, torch.float32, "cuda")
    expected = getattr(kernel, operator)(*inputs.args)
    value, late = inputs.value, torch.zeros_like(inputs.value)
    inputs.value = late
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(value)
        output = getattr(kernel, operator)(*inputs.args)
    side.synchronize()
    assert torch.equal(output, expected)


@one_gpu
def test_two_threads_on_two_streams(kernel, operator, gpus):
    def work(seed):
        inputs = OPERATORS[operator](CASE, torch.float32, "cuda", seed=seed).require_grad()
        expected = reference_of(kernel, operator, inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            results = [call(kernel, operator, inputs) for _ in range(50)]
        stream.synchronize()
        for result in results:
            check(result, expected)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, (0, 1)))


@one_gpu
def test_threads_with_calls_of_other_sizes(kernel, operator, gpus):
    """Each kernel's maximum of shared memory is the process's: no thread takes it from another."""

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(40):
                queries = (40, 5000, 300, 900, 2000)[(turn + seed) % 5]
                case = replace(CASE, queries=queries, heads=8)
                inputs = OPERATORS[operator](case, torch.float16, "cuda").require_grad()
                call(kernel, operator, inputs)
        return True

    torch.use_deterministic_algorithms(True)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(3)))
    finally:
        torch.use_deterministic_algorithms(False)


@one_gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_forward_and_backward_in_a_cuda_graph(kernel, operator, deterministic, gpus):
    inputs = OPERATORS[operator](CASE, torch.float16, "cuda").require_grad()
    torch.use_deterministic_algorithms(deterministic)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(kernel, operator, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call(kernel, operator, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for seed in (1, 2):
        others = OPERATORS[operator](CASE, torch.float16, "cuda", seed=seed)
        with torch.no_grad():
            for tensor, other in zip(inputs.differentiable(), others.differentiable()):
                tensor.copy_(other)
            inputs.grad_output.copy_(others.grad_output)
        graph.replay()
        torch.cuda.synchronize()
        check(results, reference_of(kernel, operator, others))


# ------------------------------------------------------------------------------- calls and memory


def used_memory(device):
    """Of the process, in bytes: allocated and reserved on a GPU, resident on a CPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (pages * os.sysconf("SC_PAGE_SIZE"),)


@pytest.mark.parametrize("deterministic", [False, True])
def test_ten_thousand_calls(kernel, device, operator, deterministic):
    """Memory does not grow, and results stay what they were: on a GPU, in any order of sums, to
    rounding."""
    if device == "cpu" and not Path("/proc/self/statm").exists():
        pytest.skip("memory is measured in /proc")
    if device == "cpu" and deterministic:
        pytest.skip("on a CPU gradients always repeat")
    case = Case("calls", ((6, 8), (3, 4)), queries=10, channels=8)
    inputs = OPERATORS[operator](case, torch.float32, device).require_grad()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = call(kernel, operator, inputs)
        last = None
        for number in range(10_000):
            if number == 1000:  # allocators have settled
                before = used_memory(device)
            last = call(kernel, operator, inputs)
        after = used_memory(device)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for now, then in zip(last, first):
        if device == "cpu" or deterministic:
            assert torch.equal(now, then)
        else:
            assert torch.allclose(now, then, rtol=1e-5, atol=1e-5)
    slack = 0 if device == "cuda" else 2**20
    assert all(a <= b + slack for a, b in zip(after, before)), f"{before} bytes became {after}"


def test_out_of_memory_leaves_the_process_usable(kernel, device, operator):
    """The op needs a copy of an expanded value, which no machine has the memory for."""
    inputs = OPERATORS[operator](SMALL, torch.float32, device).require_grad()
    expected = reference_of(kernel, operator, inputs)
    memory = used_memory(device)[0] if device == "cuda" else None
    batch = 2**34  # times 10 kB
    for _ in range(3):
        huge = [
            tensor[:1].expand(batch, *tensor.shape[1:]) if tensor.is_floating_point() else tensor
            for tensor in inputs.args
        ]
        with pytest.raises(RuntimeError, match="out of memory"):
            getattr(kernel, operator)(*huge)
        del huge
    check(call(kernel, operator, inputs), expected)
    if device == "cuda":
        gc.collect()
        assert used_memory(device)[0] <= memory + 2**20


MEGABYTE = 2**20


@contextmanager
def room(size):
    """Lets torch take that many bytes more from the GPU, beside what it has in use."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def fill_gaps():
    """Tensors in the memory that torch has taken and does not use, but for gaps below 2 MB."""
    tensors, size = [], 16 * MEGABYTE
    with room(0):
        while size >= 2 * MEGABYTE:
            try:
                tensors.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
    return tensors


def counts():
    """Of the allocations above 1 MB so far, and of the failures."""
    stats = torch.cuda.memory_stats()
    return stats["allocation.large_pool.allocated"], stats["num_ooms"]


def fail_at_each_allocation(function, check_process):
    """Calls function with room for none of its allocations, for one, and so on up to all.

    A call without enough raises and leaves nothing allocated; one with enough returns what it
    does without a limit. check_process is called after each.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, (allocated, _) = torch.cuda.memory_reserved(), counts()
    expected = function()
    number = counts()[0] - allocated
    enough = torch.cuda.max_memory_reserved() - before + 32 * MEGABYTE

    def allocations_within(size):
        gc.collect()  # of tensors that a traceback of the last failure holds
        memory, (allocated, failures) = torch.cuda.memory_allocated(), counts()
        with room(size):
            try:
                results = function()
            except RuntimeError:
                if counts()[1] == failures:
                    raise  # something else than the memory
                results = None
        succeeded = counts()[0] - allocated
        if results is not None:
            assert succeeded == number
            assert all(
                relative_error(result.detach(), wanted.detach().double()) < 1e-3
                for result, wanted in zip(results, expected)
            )
            results = None
        gc.collect()
        assert torch.cuda.memory_allocated() == memory, f"leaked after {succeeded} allocations"
        check_process()
        return succeeded

    # Between two sizes, a third, until there is one for each number of allocations.
    within = {size: allocations_within(size) for size in (0, enough)}
    gaps = [(0, enough)]
    while gaps:
        low, high = gaps.pop()
        if within[high] - within[low] > 1 and high - low > MEGABYTE:
            middle = (low + high) // 2
            within[middle] = allocations_within(middle)
            gaps += [(low, middle), (middle, high)]
    assert set(within.values()) == set(range(number + 1))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_out_of_memory_at_each_allocation(kernel, operator, dtype, deterministic):
    """Copies of the inputs, scratch, sums and results: each in turn, forward and backward."""
    need(8)
    small = OPERATORS[operator](SMALL, torch.float32, "cuda").require_grad()
    small_expected = reference_of(kernel, operator, small)
    memory = used_memory("cuda")[0]

    def check_process():
        check(call(kernel, operator, small), small_expected)

    def check_each():
        # Of such sizes that no allocation fits into what torch has left over of the 20 MB that it
        # takes for a few, or into what the same call has freed: each needs new memory.
        inputs = make(operator, 1, 2**20, 4, 8, ((160, 256),) * 8, 1, dtype, coordinates=4)
        for name, tensor in [*vars(inputs).items()]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                setattr(inputs, name, misaligned(tensor))
        inputs.require_grad()
        fillers = fill_gaps()

        def forward():
            return [getattr(kernel, operator)(*inputs.args)]

        (output,) = forward()

        def backward():
            tensors = inputs.differentiable()
            return torch.autograd.grad(output, tensors, inputs.grad_output, retain_graph=True)

        fail_at_each_allocation(forward, check_process)
        fail_at_each_allocation(backward, check_process)
        del fillers

    torch.use_deterministic_algorithms(deterministic)
    try:
        check_each()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.empty_cache()
    assert used_memory("cuda")[0] <= memory + MEGABYTE, "a failed call has kept a tensor"
