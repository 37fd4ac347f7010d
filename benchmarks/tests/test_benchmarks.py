"""The benchmark suite, run small: what it measures, judges and records."""

import json
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import benchmark, checks, implementations, peers, probe, suite, table, timing
from benchmarks.__main__ import _parse, main
from benchmarks.benchmark import Workload
from benchmarks.implementations import (
    BASELINE,
    FUSED,
    IMPLEMENTATIONS,
    KERNEL,
    get_project_kernel,
    grid_sample,
    seed_eager,
)
from benchmarks.operators import Implementation, Operator
from benchmarks.suite import Case, Limits
from benchmarks.table import build_markdown, build_table, format_ms, format_us
from benchmarks.timing import Effort
from benchmarks.workloads import CANONICAL, WORKLOADS, draw_sets, make_inputs, select
from tools import build as builder

CPU = torch.device("cpu")
REFERENCE = checks.load_reference()
FIELDS = (
    "ts run impl tags wl env lat_ms compile_ms peak_bytes ok absmax corr err floor_ms ceiling_ms"
).split()
LATENCY_FIELDS = "p10 p50 p90 mean iqr raw_times has_warnings reps warmup sets".split()


def make_case(workload, dtype, limits=None, sets=1):
    return Case(workload, dtype, draw_sets(workload, CPU, sets), limits)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A workload named "tiny", beside the real ones."""
    workload = Workload(2, 7, 2, 4, 3, ((6, 5), (3, 2)), "decoder")
    monkeypatch.setitem(WORKLOADS, "tiny", workload)
    return workload


@pytest.fixture
def run(tmp_path):
    """Runs the suite's command on "tiny"; returns its exit status and the records it wrote."""

    def run(*options):
        out = tmp_path / "results" / "run.jsonl"
        arguments = ["--device", "cpu", "--workloads", "tiny", "--reps", "3", "--out", str(out)]
        status = main([*arguments, *options])
        return status, [json.loads(line) for line in out.read_text().splitlines()]

    return run


def render(records):
    console = Console(width=200, record=True)
    console.print(build_table(records))
    return console.export_text()


def test_command(run):
    status, records = run()
    assert status == 0
    assert [(record["impl"], record["wl"]["pass"]) for record in records] == [
        (implementation, pass_name)
        for implementation in (BASELINE, "grid_sample", "grid_sample_compiled", KERNEL, FUSED)
        for pass_name in ("forward", "backward")
    ]
    for record in records:
        assert list(record) == FIELDS
        assert list(record["lat_ms"]) == LATENCY_FIELDS
        assert record["ok"] and record["corr"]["ok"] and record["err"] is None
        assert record["corr"]["queries"] == 7
        assert len(record["lat_ms"]["raw_times"]) == record["lat_ms"]["reps"] == 3
        assert 0 < record["lat_ms"]["p10"] <= record["lat_ms"]["p50"] <= record["lat_ms"]["p90"]
        assert record["wl"]["name"] == "tiny" and record["wl"]["dtype"] == "float32"
        assert record["env"]["threads"] == torch.get_num_threads()
    table = render(records)
    assert "1.00x" in table and "WRONG" not in table and "failed" not in table


def test_records_are_appended(run):
    run("--impls", BASELINE, "--passes", "forward")
    _, records = run("--impls", BASELINE, "--passes", "forward")
    assert len(records) == 2 and records[0]["run"] != records[1]["run"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16_autocast"])
@pytest.mark.parametrize("implementation", [BASELINE, "grid_sample", KERNEL, FUSED])
def test_implementations_agree_with_float64(implementation, dtype, tiny):
    (inputs,) = make_case("tiny", dtype).sets
    operator = IMPLEMENTATIONS[implementation].load(tiny)
    for pass_name in ("forward", "backward", "forward_backward"):
        calls = inputs.prepare(pass_name, operator)
        assert calls.judge(calls.checked()).ok


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("points", [3, (3, 1)])
def test_fused_gradients_are_all_judged(monkeypatch, dtype, points):
    workload = Workload(2, 7, 2, 4, points, ((6, 5), (3, 2)), "decoder")
    monkeypatch.setitem(WORKLOADS, "fused", workload)
    (inputs,) = make_case("fused", dtype).sets
    operator = IMPLEMENTATIONS[FUSED].load(workload)
    calls = inputs.prepare("forward_backward", operator)
    output, gradients = calls.checked()
    verdict = calls.judge((output, gradients))
    assert verdict.ok and list(verdict.errors) == [
        "output",
        "grad_value",
        "grad_sampling_offsets",
        "grad_attention_logits",
        "grad_reference_points",
    ]
    for index in range(4):
        wrong = list(gradients)
        wrong[index] = 1.1 * wrong[index]
        assert not calls.judge((output, tuple(wrong))).ok


class TestSets:
    """Calls that are timed take several sets of inputs in turn, and each is checked."""

    def test_are_drawn_alike_with_other_numbers(self, tiny):
        first, second, third = (draw.inputs for draw in draw_sets("tiny", CPU, 3))
        for tensor, alone in zip(first, make_inputs("tiny", torch.float32, "cpu")):
            assert torch.equal(tensor, alone)
        alone = benchmark.make_grad_output(tiny, torch.float32, "cpu")
        assert torch.equal(draw_sets("tiny", CPU, 1)[0].grad_output, alone)
        for field in ("value", "sampling_locations", "attention_weights"):
            tensors = [getattr(inputs, field) for inputs in (first, second, third)]
            assert len({tensor.data_ptr() for tensor in tensors}) == 3
            assert not torch.equal(*tensors[:2]) and not torch.equal(*tensors[1:])

    def test_are_cast_as_when_drawn(self):
        (draw,) = draw_sets("tiny", CPU, 1)
        cast = draw.cast(torch.bfloat16, torch.float32)
        drawn = make_inputs("tiny", torch.bfloat16, "cpu", 0, torch.float32, torch.float32)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(cast.inputs, drawn))
        assert cast.grad_output.dtype == torch.bfloat16

    @pytest.mark.parametrize("pass_name", ["forward", "backward", "forward_backward"])
    def test_are_timed_in_turn(self, run, monkeypatch, pass_name):
        seen = []

        def forward(value, *others):
            seen.append(value.data_ptr())
            return seed_eager(value, *others)

        def backward(*arguments):
            seen.append(arguments[0].data_ptr())
            return get_project_kernel().ms_deform_attn_backward(*arguments)

        operator = Operator(forward, backward, differentiable=False)
        monkeypatch.setitem(IMPLEMENTATIONS, "seen", Implementation({}, lambda _: operator))
        _, (record,) = run("--impls", "seen", "--passes", pass_name, "--reps", "5", "--sets", "2")
        assert record["ok"] and record["lat_ms"]["sets"] == record["lat_ms"]["warmup"] == 2
        calls = seen[::2] if pass_name == "forward_backward" else seen
        assert len(set(calls)) == 2  # both are checked, then timed
        assert calls == [*calls[:2], calls[0], calls[1], calls[0], calls[1], calls[0]]

    @pytest.mark.parametrize("wrong_call", [0, 1])
    @pytest.mark.parametrize("factor", [2, float("nan")])
    def test_one_wrong_answer_is_enough(self, run, monkeypatch, wrong_call, factor):
        calls = iter(range(100))

        def forward(*arguments):
            return (factor if next(calls) == wrong_call else 1) * seed_eager(*arguments)

        operator = Operator(forward)
        monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Implementation({}, lambda _: operator))
        _, (record,) = run("--impls", "wrong", "--passes", "forward", "--sets", "2")
        assert not record["ok"] and not record["corr"]["error"]["output"] < 1

    def test_one_does_where_a_call_fills_the_caches_of_a_cpu(self, monkeypatch):
        assert len(make_case("tiny", "float32", sets=3).sets) == 3
        monkeypatch.setattr(suite, "CPU_CACHE_BYTES", 100)
        assert len(make_case("tiny", "float32", sets=3).sets) == 1

    def test_number_is_checked(self, run, capsys):
        with pytest.raises(SystemExit):
            run("--sets", "0")
        assert "--sets is 0, expected at least 1" in capsys.readouterr().err


def test_a_gpu_sleeps_while_a_round_is_enqueued(monkeypatch):
    """The order of what time_device enqueues, on a GPU that is not there."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append("event")

        def elapsed_time(self, end):
            return 0.5

    def enqueue():
        time.sleep(0.002)
        queue.append("call")

    cuda = SimpleNamespace(
        Event=Event,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1),
        synchronize=lambda device: queue.append("wait"),
        _sleep=lambda cycles: queue.append(cycles / timing.CYCLES_PER_MS),
    )
    flush = SimpleNamespace(zero_=lambda: queue.append("flush"))
    fake = SimpleNamespace(cuda=cuda, empty=lambda *args, **options: flush, int8=torch.int8)
    monkeypatch.setattr(timing, "torch", fake)
    assert timing.time_device(enqueue, CPU, Effort(min_reps=2, max_reps=5)) == [0.5] * 5
    one = ["flush", "event", "call", "event"]
    assert queue[:2] == ["wait", "call"] and queue[3:12] == [*one, *one, "wait"]
    assert queue[13:] == [*one, *one, *one, "wait"]
    first, second = queue[2], queue[12]
    assert 4 <= first <= 20 and second == pytest.approx(min(1.5 * first, 20))


def test_latency_is_warmed_up_for_a_while():
    times = []

    def call():
        begin = time.perf_counter()
        time.sleep(0.004)
        times.append((time.perf_counter() - begin) * 1e3)

    assert timing.warm_up(call, CPU) == len(times)
    assert sum(times[:-1]) < timing.WARM_UP_MS <= sum(times) + len(times)


class TestResume:
    def test_measures_what_is_missing(self, run, tmp_path):
        options = ("--impls", BASELINE, "--passes", "forward", "backward")
        _, before = run(*options[:4])
        status, records = run(*options, "--resume")
        assert status == 0 and records[0] == before[0]
        assert [record["wl"]["pass"] for record in records] == ["forward", "backward"]

    def test_tries_again_what_failed_and_drops_half_a_line(self, run, tmp_path, monkeypatch):
        def load(workload):
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setitem(IMPLEMENTATIONS, KERNEL, Implementation({}, load))
            status, _ = run("--impls", KERNEL, "--passes", "forward")
        assert status == 1
        with (tmp_path / "results" / "run.jsonl").open("a") as lines:
            lines.write('{"ts": "2026')
        status, records = run("--impls", KERNEL, "--passes", "forward", "--resume")
        assert status == 0 and [record["ok"] for record in records] == [False, True]

    def test_needs_a_file(self, capsys):
        with pytest.raises(SystemExit):
            main(["--resume"])
        assert "--resume needs --out FILE" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_wrong_answer_is_shown_as_wrong(run, monkeypatch, factor):
    wrong = Implementation({}, lambda workload: Operator(lambda *args: factor * seed_eager(*args)))
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", wrong)
    status, records = run("--impls", BASELINE, "wrong")
    assert status == 0  # what a peer gets wrong does not fail the run
    assert [record["ok"] for record in records] == [True, True, False, False]
    rows = [line for line in render(records).splitlines() if "wrong" in line]
    assert len(rows) == 2 and all("WRONG" in row and "x" not in row for row in rows)


def test_wrong_baseline_sets_no_speed_up(run, monkeypatch):
    wrong = Operator(lambda *args: 2 * seed_eager(*args))
    monkeypatch.setitem(IMPLEMENTATIONS, BASELINE, Implementation({}, lambda workload: wrong))
    _, records = run("--passes", "forward", "--impls", BASELINE, "grid_sample", KERNEL)
    assert [record["ok"] for record in records] == [False, True, True]
    assert "x" not in "".join(line for line in render(records).splitlines() if "us" in line)


def test_failure_is_recorded_and_survived(run, monkeypatch):
    def load(workload):
        raise MemoryError("no room\nfor this")

    monkeypatch.setitem(IMPLEMENTATIONS, "failing", Implementation({}, load))
    # They run in the order of the table, so this one comes after the failure.
    monkeypatch.setitem(IMPLEMENTATIONS, "after", IMPLEMENTATIONS[BASELINE])
    _, records = run("--impls", "failing", "after", "--passes", "forward")
    failing, after = records
    assert failing["err"] == {"type": "MemoryError", "msg": "no room\nfor this"}
    assert failing["lat_ms"] is None and not failing["ok"]
    assert after["ok"]
    assert "failed: MemoryError: no room" in render(records)


def test_exit_status_tells_of_our_kernel(run, monkeypatch):
    zeros = Operator(lambda *args: torch.zeros_like(seed_eager(*args)))
    monkeypatch.setitem(IMPLEMENTATIONS, KERNEL, Implementation({}, lambda workload: zeros))
    status, _ = run("--passes", "forward")
    assert status == 1


class TestUnequalPoints:
    """A workload whose levels have numbers of points of their own."""

    @pytest.fixture(autouse=True)
    def unequal(self, monkeypatch):
        workload = Workload(2, 7, 2, 4, (3, 1), ((6, 5), (3, 2)), "decoder")
        monkeypatch.setitem(WORKLOADS, "unequal", workload)
        monkeypatch.setattr(checks, "load_reference", lambda: reference_by_level)
        return workload

    @pytest.mark.parametrize("function", [seed_eager, grid_sample])
    @pytest.mark.parametrize("pass_name", ["forward", "backward"])
    def test_baselines(self, unequal, function, pass_name):
        (inputs,) = make_case("unequal", "float64").sets
        shapes = {"shapes": unequal.shapes} if function is grid_sample else {}
        operator = Operator(partial(function, points_per_level=[3, 1], **shapes))
        calls = inputs.prepare(pass_name, operator)
        assert calls.judge(calls.checked()).ok

    def test_kernel_is_told_the_points(self, run, monkeypatch):
        # With the keyword in the forward alone, autograd is the way to the gradients.
        kernel = SimpleNamespace(
            ms_deform_attn=reference_by_level,
            ms_deform_attn_backward=benchmark.gradients_in_chunks,
        )
        monkeypatch.setattr(implementations, "get_project_kernel", lambda: kernel)
        status, records = run("--workloads", "unequal", "--impls", KERNEL)
        assert status == 0 and len(records) == 2 and all(record["ok"] for record in records)

    def test_kernel_without_them_is_unsupported_not_wrong(self, run, monkeypatch):
        kernel = SimpleNamespace(ms_deform_attn=lambda value: value, ms_deform_attn_backward=None)
        monkeypatch.setattr(implementations, "get_project_kernel", lambda: kernel)
        rivals = (BASELINE, "grid_sample", KERNEL)
        status, records = run("--workloads", "unequal", "--impls", *rivals)
        assert status == 0
        assert [record["ok"] for record in records] == [True] * 4 + [False] * 2
        assert {record["err"]["type"] for record in records[4:]} == {"Unsupported"}
        assert "unsupported: points is (3, 1)" in render(records)


def reference_by_level(
    value, spatial_shapes, level_start_index, locations, weights, points_per_level=None
):
    """The reference, called for each level with that level's points."""
    output = 0
    for level, points in enumerate(locations.split(points_per_level, 3)):
        metadata = spatial_shapes[level : level + 1], level_start_index[level : level + 1]
        weight = weights.split(points_per_level, 3)[level].unsqueeze(3)
        output = output + REFERENCE(value, *metadata, points.unsqueeze(3), weight)
    return output


def test_large_workloads_are_checked_at_some_queries(monkeypatch, tiny):
    monkeypatch.setattr(checks, "CPU_LIMIT", 3 * tiny.samples_per_query)
    (inputs,) = make_case("tiny", "float32").sets
    assert inputs.expected.queries.tolist() == [0, 3, 6]
    for pass_name in ("forward", "backward"):
        calls = inputs.prepare(pass_name, Operator(seed_eager))
        assert calls.judge(calls.checked()).ok


def test_chunks_add_up(monkeypatch, tiny):
    whole = make_case("tiny", "float64").sets[0].expected
    monkeypatch.setattr(checks, "CHUNK", 2 * tiny.samples_per_query)
    chunked = make_case("tiny", "float64").sets[0].expected
    torch.testing.assert_close(chunked.output, whole.output)
    torch.testing.assert_close(chunked.gradients, whole.gradients)


def test_unknown_name_is_an_error(run, capsys):
    with pytest.raises(SystemExit):
        run("--impls", "fastest")
    assert "'fastest' matches none of" in capsys.readouterr().err


def test_select_keeps_the_listed_order():
    names = ["seed_b1", "seed_b2", "hub_b2"]
    assert select(["hub_*", "seed_b1"], names) == ["seed_b1", "hub_b2"]
    assert select(["all"], names) == names


def test_all_workloads_are_the_canonical_ones(tmp_path):
    out = ["--out", str(tmp_path / "run.jsonl")]
    plan, _ = _parse(["--workloads", "all", *out])
    assert plan.workloads == list(CANONICAL)
    plan, _ = _parse(["--workloads", "scaling_b1_*", *out])
    assert plan.workloads == ["scaling_b1_q900"] and WORKLOADS["scaling_b1_q900"].queries == 900


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.00123, "1.23 us"), (0.9996, "1.00 ms"), (123.4, "123 ms"), (4690.0, "4.69 s")],
)
def test_format_ms(milliseconds, text):
    assert format_ms(milliseconds) == text


class FakeFunction:
    """What the peers have for a ``torch.autograd.Function``."""

    def __init__(self, apply):
        self.apply = apply


def fake_mmcv(value, spatial_shapes, level_start_index, locations, weights, im2col_step):
    assert im2col_step == 64
    return REFERENCE(value, spatial_shapes, level_start_index, locations, weights)


def fake_dcnv4(value, spatial_shapes, level_start_index, locations_and_logits, im2col_step, points):
    assert locations_and_logits.shape == (2, 7, 2, 3 * 8) and points == 4
    locations, logits = locations_and_logits.split((16, 8), -1)
    locations = locations.unflatten(-1, (2, 4, 2))
    weights = logits.float().softmax(-1).unflatten(-1, (2, 4))
    return REFERENCE(value, spatial_shapes, level_start_index, locations, weights)


def fake_triton(img, img_shapes, sampling_points, attention_weights, padding_mode, align_corners):
    assert padding_mode == "zeros" and align_corners is False
    starts = img_shapes.prod(1).cumsum(0) - img_shapes.prod(1)
    output = REFERENCE(img, img_shapes, starts, sampling_points, attention_weights)
    return output.unflatten(2, img.shape[2:])


class TestPeers:
    """The adapters to other kernels, with the operator itself in the place of each kernel."""

    @pytest.fixture(autouse=True)
    def none_there(self, monkeypatch):
        """Takes away what this machine may have, and adds a workload that all of them offer."""
        workload = Workload(2, 7, 2, 4, 4, ((6, 5), (3, 2)), "decoder")
        monkeypatch.setitem(WORKLOADS, "four", workload)
        for module in (
            "mmcv.ops.multi_scale_deform_attn",
            "DCNv4.functions",
            "msda_triton.frontend",
        ):
            monkeypatch.setitem(sys.modules, module, None)

        def get_kernel(repository, version):
            raise OSError(f"no network to get {repository} from")

        monkeypatch.setattr(peers, "get_kernel", get_kernel)
        self.forget()
        yield
        self.forget()

    def forget(self):
        for peer in peers.PEERS.values():
            peer.find.cache_clear()

    @pytest.fixture
    def all_there(self, monkeypatch):
        kernel = SimpleNamespace(
            ms_deform_attn_forward=fake_mmcv,
            ms_deform_attn_backward=get_project_kernel().ms_deform_attn_backward,
        )
        monkeypatch.setattr(peers, "get_kernel", lambda repository, version: kernel)
        for module, name, function in (
            ("mmcv.ops.multi_scale_deform_attn", "MultiScaleDeformableAttnFunction", fake_mmcv),
            ("DCNv4.functions", "FlashDeformAttnFunction", fake_dcnv4),
        ):
            fake = SimpleNamespace(**{name: FakeFunction(function)})
            monkeypatch.setitem(sys.modules, module, fake)
        fake = SimpleNamespace(triton_multiscale_deformable_attention=fake_triton)
        monkeypatch.setitem(sys.modules, "msda_triton.frontend", fake)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float16_autocast"])
    def test_all_there(self, all_there, run, dtype):
        status, records = run(
            "--workloads", "four", "--dtypes", dtype, "--impls", KERNEL, "--peers"
        )
        assert status == 0
        names = [KERNEL, *peers.PEERS]
        assert [record["impl"] for record in records] == [name for name in names for _ in "fb"]
        not_offered = {"float32": ["dcnv4_flash"], "bfloat16": ["mmcv", "msda_triton"]}
        for record in records:
            if record["impl"] in not_offered.get(dtype, []):
                assert record["err"]["type"] == "Unsupported"
            else:
                assert record["ok"], record
        last = records[-3]["corr"].get("error", {})
        assert dtype == "float32" or "grad_attention_logits" in last

    def test_rounding_to_logits_is_no_error_of_the_peer(self, all_there, run):
        """What is left in bfloat16 is the rounding of the output."""
        _, records = run("--workloads", "four", "--dtypes", "bfloat16", "--impls", "dcnv4_flash")
        assert records[0]["corr"]["error"]["output"] < 2e-3

    def test_none_there(self, run):
        status, records = run("--impls", KERNEL, "--peers", "--passes", "forward")
        assert status == 0 and len(records) == 5 and records[4]["ok"]
        for record in records:
            assert list(record) == FIELDS
        assert [record["impl"] for record in records[:4]] == list(peers.PEERS)
        assert {record["err"]["type"] for record in records[:4]} == {"Unavailable"}
        text = render(records)
        assert "unavailable: no network to get kernels-community/deformable-detr from" in text
        assert "DCNv4.functions" in text
        assert "| tiny | float32 |" in build_markdown(records)

    def test_wrong_peer_is_shown_as_wrong(self, all_there, run, monkeypatch):
        wrong = FakeFunction(lambda *arguments: 1.1 * fake_mmcv(*arguments))
        fake = SimpleNamespace(MultiScaleDeformableAttnFunction=wrong)
        monkeypatch.setitem(sys.modules, "mmcv.ops.multi_scale_deform_attn", fake)
        status, records = run("--impls", "mmcv")
        assert status == 0 and not any(record["ok"] for record in records)
        assert "WRONG" in render(records)

    @pytest.mark.parametrize("name", ["tiny", "unequal"])
    def test_what_a_peer_does_not_offer(self, all_there, run, monkeypatch, name):
        workload = Workload(2, 7, 2, 4, (3, 1), ((6, 5), (3, 2)), "decoder")
        monkeypatch.setitem(WORKLOADS, "unequal", workload)
        monkeypatch.setattr(checks, "load_reference", lambda: reference_by_level)
        names = list(peers.PEERS) if name == "unequal" else ["dcnv4_flash"]
        _, records = run("--workloads", name, "--dtypes", "float16", "--impls", *names)
        assert {record["err"]["type"] for record in records} == {"Unsupported"}
        assert "unsupported: points is" in render(records)


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.019, "19.0"), (0.09996, "100"), (1.2, "1200")]
)
def test_format_us(milliseconds, text):
    assert format_us(milliseconds) == text


def test_markdown_has_the_latest_figures_and_the_fastest_right_rival(run, tiny, capsys):
    arguments = ("--passes", "forward", "--impls", BASELINE, "grid_sample", KERNEL)
    run(*arguments)
    _, records = run(*arguments)
    assert len(records) == 6
    times = {BASELINE: 0.003, "grid_sample": 0.001, KERNEL: 0.0005}
    for record in records[3:]:
        record["lat_ms"]["p50"] = times[record["impl"]]
        record |= {"floor_ms": 0.0001, "ceiling_ms": 0.0004}
    assert build_markdown(records).endswith(
        "| tiny | float32 | 0.500 | 1.00 grid_sample | 5.00 | 1.25 |"
    )
    rows = render(records)
    assert "/floor" in rows and "1.25" in rows and "6.00x" in rows
    records[4]["ok"] = False
    assert "| 0.500 | 3.00 seed_eager |" in build_markdown(records)


def test_table_command(run, tmp_path, capsys):
    run("--passes", "forward")
    file = str(tmp_path / "results" / "run.jsonl")
    table.main([file])
    assert "grid_sample" in capsys.readouterr().out
    table.main([file, "--markdown", "--workloads", "tiny"])
    assert "| tiny | float32 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        table.main([file, "--workloads", "hub_b2_q300"])


class TestLimits:
    """The HBM floor and the gather ceiling."""

    @pytest.fixture(autouse=True)
    def encoder(self, monkeypatch):
        workload = Workload(2, 36, 2, 16, 3, ((6, 5), (3, 2)), "encoder")
        monkeypatch.setitem(WORKLOADS, "encoder", workload)

    # tiny: 576 elements of value, 336 of locations, 168 of weights, 112 of output, and 6 int64.
    @pytest.mark.parametrize(
        ("dtype", "other", "forward", "backward"),
        [
            (torch.float32, None, 4 * 1192 + 48, 4 * (2 * 1080 + 112) + 48),
            (torch.float16, None, 2 * 1192 + 48, 2 * (2 * 1080 + 112) + 48),
            (
                torch.bfloat16,
                torch.float32,
                2 * (576 + 112) + 4 * 504 + 48,
                2 * (2 * 576 + 112) + 8 * 504 + 48,
            ),
        ],
    )
    def test_traffic_is_every_byte_once(self, dtype, other, forward, backward):
        inputs = make_inputs("tiny", dtype, "cpu", locations_dtype=other, weights_dtype=other)
        assert probe.traffic_bytes(inputs, "forward") == forward
        assert probe.traffic_bytes(inputs, "backward") == backward

    @pytest.fixture
    def limits(self, monkeypatch):
        """On a machine that copies 1000 bytes a millisecond and gathers in 7."""
        monkeypatch.setattr(probe, "copy_rate", lambda device: 1000)
        monkeypatch.setattr(probe, "load", lambda device: None)
        monkeypatch.setattr(probe, "gather_ms", lambda sets, workload, effort: 7)
        return lambda: Limits(CPU, Effort(reps=1))

    def test_of_a_case(self, limits):
        case = make_case("tiny", "float32", limits())
        assert case.bounds("forward") == {"floor_ms": 4.816, "ceiling_ms": 7}
        assert case.bounds("backward") == {"floor_ms": 9.136, "ceiling_ms": 14}
        assert case.bounds("latency") == {"floor_ms": None, "ceiling_ms": None}

    def test_without_nvcc_there_is_no_ceiling(self, limits, monkeypatch):
        def load(device):
            raise builder.NvccMissing("nvcc is missing")

        monkeypatch.setattr(probe, "load", load)
        assert limits().describe() == {"copy_gb_per_s": 0.001, "gather_probe": "nvcc is missing"}
        bounds = make_case("tiny", "float32", limits()).bounds("forward")
        assert bounds == {"floor_ms": 4.816, "ceiling_ms": None}

    def test_sizes_the_probe_does_not_cover_have_no_ceiling(self, limits, monkeypatch, capsys):
        def gather_ms(*arguments):
            raise RuntimeError("too wide")

        monkeypatch.setattr(probe, "gather_ms", gather_ms)
        assert make_case("tiny", "float32", limits()).bounds("forward")["ceiling_ms"] is None
        assert capsys.readouterr().err == "no ceiling: too wide\n"

    def test_arguments_of_the_probe(self, monkeypatch):
        calls = []

        def msda_gather(*arguments):
            calls.append(arguments)
            return b"too wide" if arguments[0] == 4 else None

        monkeypatch.setattr(probe, "load", lambda device: SimpleNamespace(msda_gather=msda_gather))
        stream = SimpleNamespace(cuda_stream=99)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        inputs = make_inputs("encoder", torch.bfloat16, "cpu")
        output = torch.empty(2, 36, 2, 16, dtype=torch.bfloat16)
        order = probe.strips(((6, 5), (3, 2)))
        probe.gather(inputs, [3, 3], output, order=order)
        (arguments,) = calls
        assert arguments[:6] == (1, 2, 36, 36, 2, 2) and list(arguments[6]) == [3, 3]
        assert arguments[7:9] == (2, 3)
        pointers = [tensor.data_ptr() for tensor in (*inputs, order, output)]
        assert arguments[9:] == (*pointers, 99)
        with pytest.raises(RuntimeError, match="too wide"):
            probe.gather(inputs, [3, 3], output, split=4)
        mixed = inputs._replace(attention_weights=inputs.attention_weights.float())
        with pytest.raises(RuntimeError, match="dtypes or channels"):
            probe.gather(mixed, [3, 3], output)

    def test_fastest_arrangement_counts(self, monkeypatch):
        arrangements, times = [], iter([[4, 4, 4], [9, 3, 3], [5, 5, 5], [6, 1, 8]])

        def gather(inputs, points_per_level, output, split, order):
            arrangements.append((split, order is not None))

        def time_device(call, device, effort):
            call()
            return next(times)

        monkeypatch.setattr(probe, "gather", gather)
        monkeypatch.setattr(probe, "time_device", time_device)
        inputs = make_inputs("encoder", torch.float32, "cpu")
        assert probe.gather_ms([inputs], WORKLOADS["encoder"], Effort(reps=3)) == 3
        assert arrangements[::2] == [(1, False), (1, True), (4, False), (4, True)]

    def test_strips_have_every_pixel_once(self):
        order = probe.strips(((6, 3), (1, 2)))
        assert order.sort()[0].tolist() == list(range(20))
        assert order[:8].tolist() == [0, 3, 6, 9, 1, 4, 7, 10]
        assert order[12:].tolist() == [12, 15, 13, 16, 14, 17, 18, 19]

    def test_compiles(self, capsys):
        try:
            builder.CudaToolkit.find()
        except builder.NvccMissing:
            pytest.skip("no nvcc")
        probe.main(["--arch", "9.0"])
        library = builder.ROOT / capsys.readouterr().out.strip()
        assert library == probe.library_path("9.0") and b"msda_gather" in library.read_bytes()

    @pytest.fixture
    def gpu(self):
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        try:
            probe.load(torch.device("cuda", 0))
        except builder.NvccMissing as error:
            pytest.skip(str(error))
        return "cuda:0"

    @pytest.mark.parametrize("in_strips", [False, True])
    @pytest.mark.parametrize("split", probe.SPLITS)
    @pytest.mark.parametrize("dtype", probe.DTYPES)
    @pytest.mark.parametrize(
        "workload",
        [
            Workload(2, 715, 8, 32, 4, ((20, 27), (10, 14), (5, 7)), "encoder"),
            Workload(3, 129, 3, 16, (3, 6, 1), ((9, 13), (1, 4), (4, 2)), "encoder"),
        ],
    )
    def test_probe_loads_every_corner_in_the_map(self, gpu, workload, dtype, split, in_strips):
        inputs = benchmark.make_inputs(workload, dtype, gpu)
        output = inputs.value.new_empty(workload.batch, workload.queries, *inputs.value.shape[2:])
        order = probe.strips(workload.shapes).to(gpu) if in_strips else None
        call = partial(probe.gather, inputs, workload.points_per_level, output, split, order)
        if split > 1 and workload.channels * dtype.itemsize > 16 * probe.MOST_SPLIT_VECTORS:
            with pytest.raises(RuntimeError, match="split"):
                call()
            return
        call()
        expected = xor_of_corners(inputs, workload.points_per_level)
        assert np.array_equal(as_integers(output), expected)

    def test_a_run_measures_them(self, gpu, tmp_path):
        out = tmp_path / "run.jsonl"
        main(["--workloads", "seed_b1_q100", "--impls", KERNEL, "--quick", "--out", str(out)])
        for record in map(json.loads, out.read_text().splitlines()):
            assert record["env"]["copy_gb_per_s"] > 10
            has_limits = record["wl"]["pass"] != "latency"
            for limit in (record["floor_ms"], record["ceiling_ms"]):
                assert limit > 0 if has_limits else limit is None


def as_integers(tensor):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.cpu().view(integer).numpy()


def xor_of_corners(inputs, points_per_level):
    """(batch, queries, heads, channels): the bits of each query's corners, combined by xor."""
    values = as_integers(inputs.value)
    batch, _, heads, _ = values.shape
    locations = inputs.sampling_locations.cpu().double()
    if locations.ndim == 6:
        locations = locations.flatten(3, 4)
    batch_index = np.arange(batch)[:, None, None]
    head_index = np.arange(heads)
    result = 0
    levels = np.repeat(np.arange(len(points_per_level)), points_per_level)
    for point, level in enumerate(levels):
        height, width = inputs.spatial_shapes[level].tolist()
        # In float64 both are exact.
        left = np.floor(locations[:, :, :, point, 0].numpy() * width - 0.5).astype(int)
        top = np.floor(locations[:, :, :, point, 1].numpy() * height - 0.5).astype(int)
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = np.where(inside, row * width + column, 0) + int(inputs.level_start_index[level])
            result ^= np.where(inside[..., None], values[batch_index, pixel, head_index], 0)
    return result


class TestInputs:
    def test_are_drawn_once_and_cast(self):
        single = make_inputs("seed_b1_q100", torch.float32, "cpu")
        half = make_inputs("seed_b1_q100", torch.float16, "cpu", weights_dtype=torch.float32)
        assert torch.equal(half.value, single.value.half())
        assert torch.equal(half.sampling_locations, single.sampling_locations.half())
        assert torch.equal(half.attention_weights, single.attention_weights)

    def test_levels_and_weights(self):
        inputs = make_inputs("rtdetr_decoder_b16", torch.float32, "cpu")
        assert inputs.spatial_shapes.tolist() == [[80, 80], [40, 40], [20, 20]]
        assert inputs.level_start_index.tolist() == [0, 6400, 8000]
        assert inputs.value.shape == (16, 8400, 8, 32)
        assert inputs.sampling_locations.shape == (16, 300, 8, 3, 4, 2)
        sums = inputs.attention_weights.sum((-2, -1))
        torch.testing.assert_close(sums, torch.ones_like(sums))

    def test_encoder_looks_around_its_own_pixel(self):
        inputs = make_inputs("mask2former_b2", torch.float32, "cpu")
        # Level 1 is 64 x 64; its own queries follow the 32 x 32 of level 0.
        locations = inputs.sampling_locations[:, 1024 : 1024 + 4096, :, 1]
        row, column = torch.arange(4096) // 64, torch.arange(4096) % 64
        own_pixel = torch.stack((column, row), -1)[:, None, None]
        offset = locations * 64 - 0.5 - own_pixel
        assert offset.std((0, 1)).sub(1).abs().max() < 0.05
        # Eight heads look in eight directions, point p to p + 1 pixels away: (x, y) of points 0, 3.
        mean = offset.mean((0, 1))
        for head, direction in enumerate(
            [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
        ):
            for point in (0, 3):
                bias = torch.tensor(direction) * (point + 1)
                torch.testing.assert_close(mean[head, point], bias.float(), atol=0.06, rtol=0)

    def test_decoder_looks_around_its_reference_point(self):
        inputs = make_inputs("rfdetr_decoder_b8", torch.float32, "cpu")
        locations = inputs.sampling_locations
        assert locations.min() < 0 and locations.max() > 1  # not clamped
        # A query's 32 points scatter about one point by about 3 pixels of 48.
        spread = (locations * 48).var((2, 3, 4)).mean().sqrt()
        assert 3 < spread < 3.6

    def test_unequal_points_lie_one_level_after_the_other(self):
        inputs = make_inputs("dfine_decoder_b16", torch.float32, "cpu")
        assert inputs.sampling_locations.shape == (16, 300, 8, 12, 2)
        assert inputs.attention_weights.shape == (16, 300, 8, 12)


class TestKernelsBenchmark:
    """benchmark.py, used as ``kernels benchmark`` uses it."""

    @pytest.mark.parametrize("name", ["Forward", "Backward", "ForwardFloat16"])
    def test_a_run_matches_its_reference(self, name):
        instance = getattr(benchmark, name)()
        instance.kernel, instance.device = get_project_kernel(), "cpu"
        instance.setup_seed_b1_q100()
        instance.benchmark_seed_b1_q100()
        assert torch.allclose(instance.out, instance.verify_seed_b1_q100(), atol=1e-2)
