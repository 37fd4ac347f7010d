"""The benchmark suite, run small: what it measures, judges and records."""

import json

import pytest
import torch
from rich.console import Console

from benchmarks import benchmark, checks
from benchmarks.__main__ import main
from benchmarks.benchmark import Workload
from benchmarks.implementations import (
    BASELINE,
    IMPLEMENTATIONS,
    KERNEL,
    Implementation,
    Operator,
    get_project_kernel,
    seed_eager,
)
from benchmarks.suite import Case
from benchmarks.table import build_table, format_ms
from benchmarks.workloads import WORKLOADS, make_inputs, select

CPU = torch.device("cpu")
FIELDS = "ts run impl tags wl env lat_ms compile_ms peak_bytes ok absmax corr err".split()
LATENCY_FIELDS = "p10 p50 p90 mean iqr raw_times has_warnings reps warmup".split()


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
        for implementation in (BASELINE, "grid_sample", "grid_sample_compiled", KERNEL)
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
@pytest.mark.parametrize("implementation", [BASELINE, "grid_sample", KERNEL])
def test_implementations_agree_with_float64(implementation, dtype, tiny):
    case = Case("tiny", dtype, CPU)
    operator = IMPLEMENTATIONS[implementation].load(tiny)
    for pass_name in ("forward", "backward"):
        calls = case.prepare(pass_name, operator)
        assert calls.judge(calls.checked()).ok


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_wrong_answer_is_shown_as_wrong(run, monkeypatch, factor):
    wrong = Implementation({}, lambda workload: Operator(lambda *args: factor * seed_eager(*args)))
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", wrong)
    status, records = run("--impls", BASELINE, "wrong")
    assert status == 0  # what a peer gets wrong does not fail the run
    assert [record["ok"] for record in records] == [True, True, False, False]
    rows = [line for line in render(records).splitlines() if "wrong" in line]
    assert len(rows) == 2 and all("WRONG" in row and "x" not in row for row in rows)


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


def test_unequal_points_are_recorded_as_unsupported(run):
    _, records = run("--workloads", "dfine_decoder_b16", "--impls", BASELINE)
    assert {record["err"]["type"] for record in records} == {"NotImplementedError"}


def test_large_workloads_are_checked_at_some_queries(monkeypatch, tiny):
    monkeypatch.setattr(checks, "CPU_LIMIT", 3 * tiny.samples_per_query)
    case = Case("tiny", "float32", CPU)
    assert case.expected.queries.tolist() == [0, 3, 6]
    for pass_name in ("forward", "backward"):
        calls = case.prepare(pass_name, Operator(seed_eager))
        assert calls.judge(calls.checked()).ok


def test_chunks_add_up(monkeypatch, tiny):
    whole = Case("tiny", "float64", CPU).expected
    monkeypatch.setattr(checks, "CHUNK", 2 * tiny.samples_per_query)
    chunked = Case("tiny", "float64", CPU).expected
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


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.00123, "1.23 us"), (0.9996, "1.00 ms"), (123.4, "123 ms"), (4690.0, "4.69 s")],
)
def test_format_ms(milliseconds, text):
    assert format_ms(milliseconds) == text


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

    def test_workloads_are_the_suites(self):
        assert benchmark.WORKLOADS == {
            name: workload for name, workload in WORKLOADS.items() if name != "tiny"
        }

    @pytest.mark.parametrize("name", ["Forward", "Backward", "ForwardFloat16"])
    def test_a_run_matches_its_reference(self, name):
        instance = getattr(benchmark, name)()
        instance.kernel, instance.device = get_project_kernel(), "cpu"
        instance.setup_seed_b1_q100()
        instance.benchmark_seed_b1_q100()
        assert torch.allclose(instance.out, instance.verify_seed_b1_q100(), atol=1e-2)
