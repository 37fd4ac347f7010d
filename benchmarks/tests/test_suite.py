"""The suite, run small: no wrong answer has a figure, and no time is of something else."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import benchmark, checks, probe, suite, timing
from benchmarks.benchmark import Workload
from benchmarks.implementations import BASELINE, FUSED, IMPLEMENTATIONS, KERNEL, seed_eager
from benchmarks.operators import Implementation, Operator
from benchmarks.render import build_table
from benchmarks.workloads import WORKLOADS, draw_sets

CPU = torch.device("cpu")
TINY = Workload(2, 7, 2, 4, 4, ((6, 5), (3, 2)), "decoder")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Workloads beside the real ones."""
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    monkeypatch.setitem(WORKLOADS, "unequal", TINY._replace(points=(3, 1)))


def case(name, dtype, limits=None):
    return suite.Case(name, dtype, draw_sets(name, CPU, 1), limits)


@pytest.fixture
def run(command):
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
        assert 0 < record["lat_ms"]["p10"] <= record["lat_ms"]["p50"] <= record["lat_ms"]["p90"]
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


@pytest.mark.parametrize("wrong_call", [0, 1])
def test_sets_take_turns_and_one_wrong_answer_is_enough(run, monkeypatch, wrong_call):
    seen = []

    def forward(value, *others):
        seen.append(value.data_ptr())
        return seed_eager(value, *others) * (2 if len(seen) - 1 == wrong_call else 1)

    replace(monkeypatch, "seen", forward)
    _, (record,) = run("--impls", "seen", "--passes", "forward", "--sets", "2")
    assert not record["ok"] and record["lat_ms"]["sets"] == 2
    assert len(set(seen)) == 2 and seen[2:] == [seen[0], seen[1], seen[0]]


def test_every_gradient_is_judged_of_some_queries_and_in_chunks(monkeypatch):
    fused = IMPLEMENTATIONS[FUSED].load(WORKLOADS["unequal"])
    calls = case("unequal", "float16").sets[0].prepare("backward", fused)
    gradients = calls.checked()
    assert calls.judge(gradients).ok and len(gradients) == 4
    for index in range(4):
        wrong = [1.1 * g if index == i else g for i, g in enumerate(gradients)]
        assert not calls.judge(wrong).ok
    whole = case("tiny", "float64").sets[0].expected
    monkeypatch.setattr(checks, "CHUNK", 2 * TINY.samples_per_query)
    chunked = case("tiny", "float64").sets[0].expected
    torch.testing.assert_close(chunked.gradients, whole.gradients)
    monkeypatch.setattr(checks, "CPU_LIMIT", 3 * TINY.samples_per_query)
    some = case("tiny", "float64").sets[0]
    calls = some.prepare("backward", Operator(seed_eager))
    assert some.expected.queries.tolist() == [0, 3, 6] and calls.judge(calls.checked()).ok


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


def test_a_gpu_is_cold_and_busy_while_a_round_is_enqueued(monkeypatch):
    """The order of what time_device enqueues, on a GPU that is not there."""
    queue, note = [], lambda word, result=None: lambda *_, **__: queue.append(word) or result
    event = SimpleNamespace(record=note("event"), elapsed_time=lambda end: 0.5)
    sizes = SimpleNamespace(L2_cache_size=1)
    fake = SimpleNamespace(Event=lambda **_: event, get_device_properties=lambda device: sizes)
    fake.synchronize, fake._sleep = note("wait"), note("sleep")
    empty = lambda *_, **__: SimpleNamespace(zero_=note("flush"))  # noqa: E731
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=fake, empty=empty, int8=None))
    effort = timing.Effort(min_reps=2, max_reps=5)
    assert timing.time_device(note("call"), CPU, effort) == [0.5] * 5
    one = ["flush", "event", "call", "event"]
    assert queue == ["wait", "call", "sleep", *2 * one, "wait", "sleep", *3 * one, "wait"]


def test_limits(monkeypatch):
    """Every byte once, and the fastest arrangement of the loads; none that was not measured."""
    inputs = benchmark.make_inputs(TINY, torch.float16, "cpu")
    output = 2 * TINY.batch * TINY.queries * TINY.heads * TINY.channels
    once = sum(tensor.nbytes for tensor in inputs) + output
    assert probe.traffic_bytes(inputs, "forward") == once
    results = sum(tensor.nbytes for tensor in (inputs.value, *inputs[3:]))
    assert probe.traffic_bytes(inputs, "backward") == once + results
    times = iter([[9, 3, 3], [6, 4, 8]])
    monkeypatch.setattr(probe, "gather", lambda *arguments: None)
    monkeypatch.setattr(probe, "time_device", lambda *arguments: next(times))
    assert probe.gather_ms([inputs], TINY, None) == 3
    limits = SimpleNamespace(floor_ms=lambda *x: 1, gather_ms=lambda *x: 7)
    bounds = case("tiny", "float16", limits).bounds
    assert [bounds(name)["ceiling_ms"] for name in suite.PASSES] == [7, 14, None]


def test_kernels_benchmark_verifies(kernel):
    for instance in (benchmark.Forward(), benchmark.Backward()):
        instance.kernel, instance.device = kernel, "cpu"
        instance.setup_seed_b1_q100()
        instance.benchmark_seed_b1_q100()
        assert torch.allclose(instance.out, instance.verify_seed_b1_q100(), atol=1e-2)
