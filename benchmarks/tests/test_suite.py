"""The suite, run small: no wrong answer has a figure, and no time is of something else."""

import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import benchmark, checks, peers, probe, suite, timing
from benchmarks.__main__ import main
from benchmarks.benchmark import Workload
from benchmarks.implementations import (
    BASELINE,
    FUSED,
    IMPLEMENTATIONS,
    KERNEL,
    get_project_kernel,
    seed_eager,
)
from benchmarks.operators import Implementation, Operator
from benchmarks.render import build_table
from benchmarks.workloads import WORKLOADS, draw_sets, make_inputs
from tools.build import NvccMissing

CPU = torch.device("cpu")
REFERENCE = checks.load_reference()
TINY = Workload(2, 7, 2, 4, 4, ((6, 5), (3, 2)), "decoder")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Workloads beside the real ones."""
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    monkeypatch.setitem(WORKLOADS, "unequal", TINY._replace(points=(3, 1)))
    monkeypatch.setitem(WORKLOADS, "encoder", TINY._replace(queries=36, locations="encoder"))


@pytest.fixture
def run(tmp_path):
    """Runs the suite's command on "tiny"; returns its exit status and the records it wrote."""

    def run(*options):
        out = tmp_path / "run.jsonl"
        arguments = ["--device", "cpu", "--workloads", "tiny", "--reps", "3", "--out", str(out)]
        status = main([*arguments, *options])
        return status, [json.loads(line) for line in out.read_text().splitlines()]

    return run


def shown(records):
    console = Console(width=200, record=True)
    console.print(build_table(records))
    return console.export_text()


def replace(monkeypatch, name, forward, backward=None):
    operator = Operator(forward, backward)
    monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation({}, lambda workload: operator))


def test_every_implementation_is_right(run):
    dtypes = ("float64", "float32", "float16_autocast")
    names = (BASELINE, "grid_sample", KERNEL, FUSED)
    every = ("--workloads", "tiny", "unequal", "encoder", "--passes", "forward", "backward")
    status, records = run(*every, "--dtypes", *dtypes, "--impls", *names)
    assert status == 0 and len(records) == 3 * 3 * 4 * 2 and all(r["ok"] for r in records)
    for record in records:
        assert record["corr"]["queries"] == WORKLOADS[record["wl"]["name"]].queries
        assert len(record["lat_ms"]["raw_times"]) == record["lat_ms"]["reps"] == 3
        assert 0 < record["lat_ms"]["p10"] <= record["lat_ms"]["p50"] <= record["lat_ms"]["p90"]
    assert "1.00x" in shown(records) and "WRONG" not in shown(records)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_answer_has_no_speed_up_and_sets_none(run, monkeypatch, factor):
    replace(monkeypatch, "wrong", lambda *arguments: factor * seed_eager(*arguments))
    status, records = run("--impls", BASELINE, "wrong")
    assert status == 0 and [record["ok"] for record in records] == [True, True, False, False]
    row = next(line for line in shown(records).splitlines() if "wrong" in line)
    assert "WRONG" in row and "0x" not in row and "(" in row
    replace(monkeypatch, BASELINE, lambda *arguments: factor * seed_eager(*arguments))
    replace(monkeypatch, KERNEL, lambda *arguments: factor * seed_eager(*arguments))
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
    first, second = draw_sets("tiny", CPU, 2)
    assert torch.equal(first.inputs.value, make_inputs("tiny", torch.float32, "cpu").value)
    assert not torch.equal(first.inputs.value, second.inputs.value)


def test_every_gradient_of_the_fused_operator_is_judged():
    case = suite.Case("unequal", "float16", draw_sets("unequal", CPU, 1))
    calls = case.sets[0].prepare("backward", IMPLEMENTATIONS[FUSED].load(WORKLOADS["unequal"]))
    gradients = calls.checked()
    assert calls.judge(gradients).ok and len(gradients) == 4
    for index in range(4):
        wrong = [1.1 * g if index == i else g for i, g in enumerate(gradients)]
        assert not calls.judge(tuple(wrong)).ok


def test_some_queries_stand_for_all_and_chunks_add_up(monkeypatch):
    def expected():
        return suite.Case("tiny", "float64", draw_sets("tiny", CPU, 1)).sets[0]

    whole = expected().expected
    monkeypatch.setattr(checks, "CHUNK", 2 * TINY.samples_per_query)
    torch.testing.assert_close(expected().expected.gradients, whole.gradients)
    monkeypatch.setattr(checks, "CPU_LIMIT", 3 * TINY.samples_per_query)
    some = expected()
    assert some.expected.queries.tolist() == [0, 3, 6]
    calls = some.prepare("backward", Operator(seed_eager))
    assert calls.judge(calls.checked()).ok


def test_failures_are_recorded_and_tried_again(run, tmp_path, monkeypatch):
    def no_room(*arguments):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        replace(patch, KERNEL, no_room)
        status, records = run("--impls", BASELINE, KERNEL, "--passes", "forward")
    assert status == 1 and "failed: MemoryError: no room" in shown(records)
    with (tmp_path / "run.jsonl").open("a") as lines:
        lines.write('{"ts": "2026')  # of a run that was killed
    status, records = run("--impls", BASELINE, KERNEL, "--passes", "forward", "--resume")
    assert status == 0 and [record["ok"] for record in records] == [True, False, True]


def test_a_gpu_is_cold_and_busy_while_a_round_is_enqueued(monkeypatch):
    """The order of what time_device enqueues, on a GPU that is not there."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: queue.append("event")
            self.elapsed_time = lambda end: 0.5

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
    effort = timing.Effort(min_reps=2, max_reps=5)
    assert timing.time_device(enqueue, CPU, effort) == [0.5] * 5
    one = ["flush", "event", "call", "event"]
    assert queue[:2] == ["wait", "call"] and queue[3:12] == [*one, *one, "wait"]
    assert 4 <= queue[2] <= 20 and queue[13:] == [*one, *one, *one, "wait"]


def reference(value, shapes, starts, locations, weights, *rest, **options):
    assert rest in ((), (64,))
    return REFERENCE(value, shapes, starts, locations, weights)


def logits_reference(value, shapes, starts, both, im2col_step, points):
    locations, logits = both.split((16, 8), -1)
    weights = logits.float().softmax(-1).unflatten(-1, (2, 4))
    return REFERENCE(value, shapes, starts, locations.unflatten(-1, (2, 4, 2)), weights)


def without_starts(value, shapes, locations, weights, *rest):
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    output = REFERENCE(value, shapes, starts, locations, weights)
    return output.unflatten(2, value.shape[2:]) if rest == ("zeros", False) else output


@pytest.mark.parametrize("there", [True, False])
def test_peers(run, monkeypatch, there):
    """The adapters, with the operator itself in the place of each kernel; and without any."""
    kernel = SimpleNamespace(
        ms_deform_attn_forward=reference,
        ms_deform_attn_backward=get_project_kernel().ms_deform_attn_backward,
    )
    found = {
        "mmcv.ops.multi_scale_deform_attn": {
            "MultiScaleDeformableAttnFunction": SimpleNamespace(apply=reference)
        },
        "DCNv4.functions": {"FlashDeformAttnFunction": SimpleNamespace(apply=logits_reference)},
        "torch_ms_deform_attn": {"ms_deform_attn": reference},
        "msda_triton.frontend": {"triton_multiscale_deformable_attention": without_starts},
        "deformops.registry": {"msda": reference, "Backend": SimpleNamespace(TRITON="triton")},
        peers._TRITON_MSDA: {"triton_ms_deform_attn": without_starts},
    }
    for module, names in found.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names) if there else None)
    for peer in peers.PEERS.values():
        peer.find.cache_clear()

    def get_kernel(repository, version):
        if not there:
            raise OSError("no network")
        return kernel

    monkeypatch.setattr(peers, "get_kernel", get_kernel)
    dtypes = ("--dtypes", "float32", "float16", "bfloat16", "--workloads", "tiny", "unequal")
    status, records = run("--impls", KERNEL, "--peers", *dtypes)
    for peer in peers.PEERS.values():
        peer.find.cache_clear()
    refused = {record["err"]["type"] for record in records if record["err"]}
    assert status == 0 and refused == {"Unsupported" if there else "Unavailable"}
    right = {(r["impl"], r["wl"]["dtype"], r["wl"]["name"]) for r in records if r["ok"]}
    assert all(r["ok"] for r in records if not r["err"])
    ours = {(KERNEL, d, n) for d in dtypes[1:4] for n in dtypes[5:]}
    offered = {(name, d, "tiny") for name in peers.PEERS for d in dtypes[1:4]}
    offered -= {("dcnv4_flash", "float32", "tiny"), ("mmcv", "bfloat16", "tiny")}
    assert right == ours | (offered - {("msda_triton", "bfloat16", "tiny")} if there else set())


def test_limits(monkeypatch):
    """Every byte once, and the fastest arrangement of the loads; none that was not measured."""
    inputs = make_inputs("tiny", torch.float16, "cpu")
    output = 2 * TINY.batch * TINY.queries * TINY.heads * TINY.channels
    once = sum(tensor.nbytes for tensor in inputs) + output
    assert probe.traffic_bytes(inputs, "forward") == once
    results = sum(tensor.nbytes for tensor in (inputs.value, *inputs[3:]))
    assert probe.traffic_bytes(inputs, "backward") == once + results
    times = iter([[4, 4, 4], [9, 3, 3], [5, 5, 5], [6, 1, 8]])
    monkeypatch.setattr(probe, "gather", lambda *arguments: None)
    monkeypatch.setattr(probe, "time_device", lambda *arguments: next(times))
    sets = [make_inputs("encoder", torch.float32, "cpu")]
    assert probe.gather_ms(sets, WORKLOADS["encoder"], None) == 3
    assert probe.strips(((6, 3), (1, 2))).sort()[0].tolist() == list(range(20))
    monkeypatch.setattr(probe, "copy_rate", lambda device: 1000)
    monkeypatch.setattr(probe, "load", lambda device: None)
    monkeypatch.setattr(probe, "gather_ms", lambda *arguments: 7)
    limits = suite.Limits(CPU, None)
    bounds = suite.Case("tiny", "float16", draw_sets("tiny", CPU, 1), limits).bounds
    assert bounds("forward") == {"floor_ms": once / 1000, "ceiling_ms": 7}
    assert bounds("backward")["ceiling_ms"] == 14 and bounds("latency") == suite.NO_LIMITS
    limits.no_ceiling = "nvcc is missing"
    bounds = suite.Case("tiny", "float16", draw_sets("tiny", CPU, 1), limits).bounds
    assert bounds("forward")["ceiling_ms"] is None


@pytest.mark.parametrize("split", probe.SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_probe_loads_every_corner_in_the_map(dtype, split):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        probe.load(torch.device("cuda", 0))
    except NvccMissing as error:
        pytest.skip(str(error))
    workload = Workload(2, 715, 8, 16, 4, ((20, 27), (10, 14), (5, 7)), "encoder")
    inputs = benchmark.make_inputs(workload, dtype, "cuda:0")
    output = inputs.value.new_empty(2, 715, 8, 16)
    probe.gather(
        inputs, workload.points_per_level, output, split, probe.strips(workload.shapes).cuda()
    )
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    value = inputs.value.view(integer).cpu().permute(0, 2, 1, 3)  # (batch, heads, pixels, channels)
    expected = torch.zeros(2, 8, 715, 16, dtype=integer)
    for level, (height, width) in enumerate(workload.shapes):
        place = inputs.sampling_locations[:, :, :, level].cpu().double().permute(0, 2, 1, 3, 4)
        left = (place[..., 0] * width - 0.5).floor().long()  # in float64 both are exact
        top = (place[..., 1] * height - 0.5).floor().long()
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = (row * width + column).where(inside, 0) + int(inputs.level_start_index[level])
            for point in range(4):
                index = pixel[..., point, None].expand(-1, -1, -1, 16)
                expected ^= value.gather(2, index) * inside[..., point, None]
    assert torch.equal(output.view(integer).cpu().permute(0, 2, 1, 3), expected)


def test_an_encoder_looks_around_its_own_pixel():
    locations = make_inputs("mask2former_b2", torch.float32, "cpu").sampling_locations
    # Level 1 is 64 x 64; its own queries follow the 32 x 32 of level 0.
    row, column = torch.arange(4096) // 64, torch.arange(4096) % 64
    own_pixel = torch.stack((column, row), -1)[:, None, None]
    offset = locations[:, 1024 : 1024 + 4096, :, 1] * 64 - 0.5 - own_pixel
    assert offset.std((0, 1)).sub(1).abs().max() < 0.05
    for head in range(8):  # they look in eight directions, point p to p + 1 pixels away
        x, y = (math.cos(math.pi * head / 4), math.sin(math.pi * head / 4))
        bias = 4 * torch.tensor((x, y)) / max(abs(x), abs(y))
        torch.testing.assert_close(offset.mean((0, 1))[head, 3], bias, atol=0.06, rtol=0)


@pytest.mark.parametrize("name", ["Forward", "Backward", "ForwardFloat16"])
def test_kernels_benchmark_verifies(name):
    instance = getattr(benchmark, name)()
    instance.kernel, instance.device = get_project_kernel(), "cpu"
    instance.setup_seed_b1_q100()
    instance.benchmark_seed_b1_q100()
    assert torch.allclose(instance.out, instance.verify_seed_b1_q100(), atol=1e-2)
