"""The suite, run small: no wrong answer has a figure, and no time is of something else."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from sanitize import compile_emulated_library

from benchmarks import benchmark, checks, probe, suite
from benchmarks.benchmark import WORKLOADS, Workload
from benchmarks.implementations import BASELINE, FUSED, IMPLEMENTATIONS, KERNEL, seed_eager
from benchmarks.operators import Implementation, Operator, plain_reference
from benchmarks.render import build_table
from tools.build import CudaToolkit, NvccMissing

CPU = torch.device("cpu")
TINY = Workload(2, 7, 2, 4, 4, ((6, 5), (3, 2)), "decoder")
UNEQUAL = TINY._replace(points=(3, 1))


@pytest.fixture
def run(command, monkeypatch):
    """The suite, with workloads beside the real ones."""
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    monkeypatch.setitem(WORKLOADS, "unequal", UNEQUAL)
    return lambda *options: command("--workloads", "tiny", "--reps", "3", *options)


def shown(records):
    with (console := Console(width=200)).capture() as capture:
        console.print(build_table(records))
    return capture.get()


def replace(monkeypatch, name, forward):
    monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation({}, lambda _: Operator(forward)))


def test_every_implementation_is_right(run):
    names = (BASELINE, "grid_sample", KERNEL, FUSED)
    options = ("--workloads", "tiny", "unequal", "--impls", *names)
    status, records = run(*options, "--dtypes", "float64", "float32", "float16_autocast")
    assert status == 0 and len(records) == 2 * 3 * 4 * 2 and all(r["ok"] for r in records)
    for record in records:
        assert record["corr"]["queries"] == len(record["lat_ms"]["raw_times"]) + 4 == 7
    assert "1.00x" in shown(records) and "WRONG" not in shown(records)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_answer_has_no_speed_up_and_sets_none(run, monkeypatch, factor):
    replace(monkeypatch, "wrong", lambda *arguments: factor * seed_eager(*arguments))
    status, records = run("--impls", BASELINE, "wrong")
    assert status == 0 and [record["ok"] for record in records] == [True, True, False, False]
    row = next(line for line in shown(records).splitlines() if "wrong" in line)
    assert "WRONG" in row and "0x" not in row and "(" in row
    for name in (BASELINE, KERNEL):
        replace(monkeypatch, name, lambda *arguments: factor * seed_eager(*arguments))
    status, records = run("--impls", BASELINE, "grid_sample", KERNEL)
    assert status == 1 and "0x" not in shown(records[4:])


def test_sets_take_turns_and_one_wrong_answer_is_enough(run, monkeypatch):
    seen = []

    def forward(value, *others):
        seen.append(value.data_ptr())
        return seed_eager(value, *others) * (2 if len(seen) == 2 else 1)

    replace(monkeypatch, "seen", forward)
    _, (record,) = run("--impls", "seen", "--passes", "forward", "--sets", "2")
    assert not record["ok"] and record["lat_ms"]["sets"] == 2
    assert len(set(seen)) == 2 and seen[2:] == [seen[0], seen[1], seen[0]]


@pytest.mark.parametrize("limit", [checks.CPU_LIMIT, 3 * UNEQUAL.samples_per_query])
def test_every_gradient_is_judged_by_some_queries(monkeypatch, limit):
    monkeypatch.setattr(checks, "CPU_LIMIT", limit)
    (inputs,) = suite.Case(UNEQUAL, "float16", suite.draw_sets(UNEQUAL, CPU, 1)).sets
    calls = inputs.prepare("backward", IMPLEMENTATIONS[FUSED].load(UNEQUAL))
    gradients = calls.checked()
    assert calls.judge(gradients).ok and len(gradients) == 4
    for index in range(4):
        wrong = [1.1 * g if index == i else g for i, g in enumerate(gradients)]
        assert not calls.judge(wrong).ok


def test_failures_are_recorded_and_tried_again(run, tmp_path, monkeypatch):
    def no_room(*arguments):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        replace(patch, KERNEL, no_room)
        status, records = run("--impls", BASELINE, KERNEL, "--passes", "forward")
    assert status == 1 and "failed: MemoryError: no room" in shown(records)
    with (tmp_path / "records.jsonl").open("a") as lines:
        lines.write('{"ts": "2026')  # of a run that was killed
    status, records = run("--impls", BASELINE, KERNEL, "--passes", "forward", "--resume")
    assert status == 0 and [record["ok"] for record in records] == [True, False, True]


def test_limits(monkeypatch):
    """Every byte once, and the fastest arrangement of the loads."""
    inputs = benchmark.make_inputs(TINY, torch.float16, "cpu")
    sizes, times = [tensor.nbytes for tensor in inputs], iter([[9, 3, 3], [6, 4, 8]])
    once = sum(sizes) + 2 * TINY.batch * TINY.queries * TINY.heads * TINY.channels
    fakes = {"copy_rate": lambda *_: 0.5, "gather": lambda *_: None}
    for name, fake in {**fakes, "time_device": lambda *_: next(times)}.items():
        monkeypatch.setattr(probe, name, fake)
    forward, backward = suite.Limits(CPU, None).of(TINY, [inputs]).values()
    assert forward == {"floor_ms": 2 * once, "ceiling_ms": 3}
    assert backward == {"floor_ms": 2 * (once + sizes[0] + sum(sizes[3:])), "ceiling_ms": 6}


def test_the_probe_loads_every_corner_in_the_map(device, monkeypatch, tmp_path):
    """On a GPU, and by its emulator on the CPU."""
    try:
        CudaToolkit.find()
    except NvccMissing as error:
        pytest.skip(f"the probe cannot be compiled: {error}")
    if device == "cpu":
        library, stream = tmp_path / "gather.so", SimpleNamespace(cuda_stream=None)
        compile_emulated_library(probe.SOURCE, library)
        monkeypatch.setattr(probe, "build", lambda arch: library)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    points, maps = (3, 6, 1), ((7, 9), (1, 4), (4, 2))
    order = probe.strips(maps).to(device)  # queries are the pixels
    workload = Workload(2, len(order), 3, 24, points, maps, "encoder")
    for dtype, integer in zip(probe.DTYPES, (torch.int64, torch.int32, torch.int16, torch.int16)):
        inputs = benchmark.make_inputs(workload, dtype, device)
        bits = (inputs.value > 0).to(integer)
        inputs = inputs._replace(value=bits.view(dtype))
        _, shapes, starts, locations, weights = inputs
        sizes = shapes.flip(1).repeat_interleave(shapes.new_tensor(points), 0)
        # The reference counts a bit where it samples the centres of the corners' pixels.
        centres, counts = (locations.double() * sizes - 0.5).floor() + 0.5, 0
        for corner in product((0, 1), (0, 1)):
            corners = (centres + shapes.new_tensor(corner)) / sizes
            sampled = (bits.double(), shapes, starts, corners, torch.ones_like(weights).double())
            counts += plain_reference(workload)(*sampled).view(2, len(order), 3, 24)
        for split, some_order in product(probe.splits(inputs), (None, order)):
            output = torch.full_like(bits[:, : len(order)], -1)
            probe.gather(inputs, points, output, split, some_order)
            assert torch.equal(output, counts.round().to(integer) % 2), (dtype, split)


def test_wider_offsets():
    near = TINY._replace(locations="encoder", queries=36)
    draws = [near._replace(spread=x) for x in (0, 1, 2)]
    draws = [benchmark.make_inputs(x, torch.float32, "cpu").sampling_locations for x in draws]
    centres, once, twice = draws
    assert torch.allclose(twice - centres, 2 * (once - centres), atol=1e-5)
    assert (centres >= 0).all() and (centres <= 1).all()


def test_kernels_benchmark_verifies(kernel):
    for instance in (benchmark.Forward(), benchmark.Backward()):
        instance.kernel, instance.device = kernel, "cpu"
        instance.setup_seed_b1_q100()
        instance.benchmark_seed_b1_q100()
        assert torch.allclose(instance.out, instance.verify_seed_b1_q100(), atol=1e-2)
