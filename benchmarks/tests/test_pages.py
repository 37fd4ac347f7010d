"""Every published figure is that of its record, and records are sound."""

import json
import re
from functools import cache

import pytest
import torch

from benchmarks import render, seed
from benchmarks.__main__ import main
from benchmarks.checks import TOLERANCES
from benchmarks.implementations import FUSED, IMPLEMENTATIONS, KERNEL
from benchmarks.operators import ROOT
from benchmarks.records import RESULTS, by_case, latest, publish, read
from benchmarks.suite import Case
from benchmarks.workloads import draw_sets


def record(impl=KERNEL, times=(1.0, 1.1, 1.2), ok=True, name="seed_b1_q100", **more):
    workload = {"name": name, "dtype": "float16", "pass": "forward"}
    env = {"gpu": "A GPU", "torch": "2.13"}
    lat_ms = {"raw_times": [*times], "p50": sorted(times)[len(times) // 2], "iqr": 0.1}
    fields = {"ts": "2026-11-25", "impl": impl, "wl": workload, "env": env, "lat_ms": lat_ms}
    corr = {"error": {"output": 1e-7}, "tolerance": {"output": 2e-5}}
    return {**fields, "peak_bytes": 10**9, "ok": ok, "corr": corr, "err": None, **more}


def write(path, records):
    path.write_text("".join(f"{json.dumps(item)}\n" for item in records))
    return path


def test_pages_are_those_of_their_records(capsys):
    assert main(["readme", "--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_is_noticed():
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text("utf-8")
    assert render.rendered(text, page) == text
    assert (
        render.rendered(re.sub(r"\| ddetr_encoder_b4 \| \d", "| ddetr_encoder_b4 | 0", text), page)
        == text
    )
    for bad in (text.replace("end of cpu", "end"), text.replace("cpu", "nothing")):
        with pytest.raises(ValueError, match="benchmarks.md: the block"):
            render.rendered(bad, page)


def test_results_are_read_or_quoted():
    pages = "".join(
        page.read_text("utf-8") for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    )
    files = [file for file in RESULTS.iterdir() if "local" not in file.name]
    kinds = ("operator", "peers", "models", "accuracy")
    for file in files:
        read_by_code = file.stem.endswith(kinds) or file.name in ("guard-cpu.jsonl", ".gitignore")
        quoted = file.stem.split("-")[-1] in pages  # as in h100-2026-11-26-{lists,counters}.txt
        assert read_by_code or quoted, f"nothing reads {file.name}"
    assert sum(file.stat().st_size for file in files) < 1_500_000


def test_publishing_keeps_figures(tmp_path):
    records = [record(), record("grid_sample", (9.0, 9.1)), record(times=(2.0,), ok=False)]
    file = write(tmp_path / "h100-2026-11-28-peers.jsonl", records)
    before = render.by_workload(records, {"x": render.of(KERNEL)})
    assert publish(file, check=True) and publish(file) and not publish(file)
    after = read([file])
    assert "raw_times" not in file.read_text() and file.read_text().count('"env"') == 1
    assert render.by_workload(after, {"x": render.of(KERNEL)}) == before and "(2000)" in before[2]
    assert latest(after)[0]["lat_ms"]["p50"] == 2.0 and after[2]["env"] == records[0]["env"]


def test_the_best_peer_is_right_and_not_ours():
    rivals = {"mmcv": 2.0, "deformops": 1.5, "kernels_community": 4.0, "grid_sample": 0.2}
    records = [record(), *(record(name, (t,), name != "deformops") for name, t in rivals.items())]
    best = render.best_peer(next(iter(by_case(records).values())))
    assert best["impl"] == "mmcv"


def test_models_say_what_to_expect(monkeypatch):
    def model(impl, time, **ratio):
        more = {"images_per_s": 1.0, "ratio": ratio or None}
        item = record(impl, (time,), name="deformable_detr_b8", **more)
        return item | {"wl": item["wl"] | {"pass": "inference"}}

    quartiles = {"p25": 6.9, "p50": 7.0, "p75": 7.1}
    records = [model("eager", 160.0), model("eager_compiled", 147.0, **quartiles)]
    records += [model(FUSED, 44.0, **quartiles), model(f"{FUSED}_compiled", 21.0, **quartiles)]
    monkeypatch.setattr(render, "newest", lambda kind, on_gpu: records)
    text = "\n".join(render.models())
    assert "compiled, 7.0 to 7.0 times for Deformable DETR" in text.replace("\n", " ")
    assert "| 160 ms | 147 ms | 44.0 ms | 21.0 ms | 7.00x (6.90 to 7.10) | 7.00x" in text


def test_compare(tmp_path):
    slow, wrong = record(times=(3.0, 3.1)), record(times=(0.1, 0.1), ok=False)
    noisy, unit, as_slow = (
        record(times=(1.2, 0.9)),
        ("--relative-to", "x"),
        record("x", (30.0, 31.0)),
    )
    before = write(tmp_path / "before.jsonl", [record(), record("x", (10.0, 11.0))])
    for verdict, records, options in (
        (1, [slow], ()),
        (0, [slow], ("--threshold", "4")),
        (1, [wrong], ()),
        (0, [noisy], ()),
        (0, [slow, as_slow], unit),
        (1, [slow, record("x", (10.0, 10.1))], unit),
    ):
        after = write(tmp_path / "after.jsonl", records)
        assert main(["compare", str(before), str(after), *options]) == verdict, records


@cache
def recorded():
    """The largest error by implementation, dtype and tensor, of records that are all sound."""
    worst = {}
    for item in read(RESULTS.glob("*-accuracy.jsonl")):
        if item["impl"] in (KERNEL, FUSED):
            for name, error in item["corr"]["error"].items():
                assert 0 < error <= TOLERANCES[getattr(torch, item["wl"]["dtype"])]
                key = (item["impl"], item["wl"]["dtype"], name)
                worst[key] = max(error, worst.get(key, 0))
    return worst


@pytest.mark.parametrize("implementation", [KERNEL, FUSED])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_errors_are_no_larger_than_recorded(device, implementation, dtype):
    case = Case("seed_b1_q100", dtype, draw_sets("seed_b1_q100", torch.device(device), 1))
    operator = IMPLEMENTATIONS[implementation].load(case.workload)
    for name in ("forward", "backward"):
        calls = case.sets[0].prepare(name, operator)
        for tensor, error in calls.judge(calls.checked()).errors.items():
            # Between one processor and the next, sums have another order.
            assert error <= 1.25 * recorded()[implementation, dtype, tensor], tensor


def test_the_seed_protocol_judges_as_its_project_does():
    expected = torch.full((4,), 2.0)
    assert seed.compare(expected * (1 + 1e-5), expected)["ok"]
    assert not seed.compare(expected * (1 + 2e-5), expected)["ok"]
    assert seed.compare((expected * 1.004).half(), expected.half())["ok"]
    assert not seed.compare(expected * float("inf"), expected * float("inf"))["ok"]
