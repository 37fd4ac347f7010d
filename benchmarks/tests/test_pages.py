"""Every published figure is that of its record, and records are sound."""

import json
import re
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from benchmarks import render, seed
from benchmarks.__main__ import main
from benchmarks.checks import TOLERANCES
from benchmarks.implementations import IMPLEMENTATIONS, KERNEL, OURS
from benchmarks.operators import ROOT
from benchmarks.records import RESULTS, publish, read
from benchmarks.suite import Case
from benchmarks.workloads import draw_sets

GUARD = RESULTS / "guard-cpu.jsonl"  # records as they are measured


def test_pages_are_those_of_their_records(capsys):
    assert main(["readme", "--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_is_noticed():
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text("utf-8")
    changed = re.sub(r"\| ddetr_encoder_b4 \| \d", "| ddetr_encoder_b4 | 0", text)
    assert render.rendered(changed, page) == text != changed
    for bad in (text.replace("end of cpu", "end"), text.replace("cpu", "nothing")):
        with pytest.raises(ValueError, match="benchmarks.md: the block"):
            render.rendered(bad, page)


def test_results_are_read_or_quoted():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    text = "".join(page.read_text("utf-8") for page in pages)
    files = [file for file in RESULTS.iterdir() if "local" not in file.name]
    for file in files:
        kind = file.stem.split("-")[-1]  # quoted as in h100-2026-11-26-{lists,counters}.txt
        read_by_code = ("operator", "peers", "models", "accuracy", "cpu", ".gitignore")
        assert kind in read_by_code or kind in text, f"nothing reads {file.name}"
    assert sum(file.stat().st_size for file in files) < 1_500_000


def test_publishing_keeps_figures(tmp_path):
    file = Path(shutil.copy(GUARD, tmp_path / "cpu-2026-11-28-operator.jsonl"))
    shown = partial(render.time_of, form=render.format_ms)  # three digits
    columns = {"x": render.of(KERNEL, shown), "y": render.of("grid_sample", shown)}
    before = render.by_workload(read([file]), columns)
    assert publish(file, check=True) and publish(file) and not publish(file)
    assert "raw_times" not in file.read_text() and file.read_text().count('"env"') == 1
    assert render.by_workload(read([file]), columns) == before


@pytest.mark.parametrize(
    ("status", "factors", "options"),
    [
        (0, {KERNEL: 1}, ()),
        (1, {KERNEL: 3}, ()),
        (0, {KERNEL: 3}, ("--threshold", "4")),
        (1, {KERNEL: 3}, ("--relative-to", "grid_sample")),
        (0, {KERNEL: 3, "grid_sample": 3}, ("--relative-to", "grid_sample")),
        (1, {KERNEL: 0}, ()),  # as wrong as it is fast
    ],
)
def test_compare(tmp_path, status, factors, options):
    records = read([GUARD])
    for record in records:
        factor, times = factors.get(record["impl"], 1), record["lat_ms"]
        times["raw_times"] = [factor * time for time in times["raw_times"]]
        record["ok"] = factor > 0
    after = tmp_path / "after.jsonl"
    after.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert main(["compare", str(GUARD), str(after), *options]) == status


@cache
def recorded():
    """The largest error by implementation, dtype and tensor, of records that are all sound."""
    worst = {}
    for item in read(RESULTS.glob("*-accuracy.jsonl")):
        for name, error in item["corr"]["error"].items() if item["impl"] in OURS else ():
            assert 0 < error <= TOLERANCES[getattr(torch, item["wl"]["dtype"])]
            key = (item["impl"], item["wl"]["dtype"], name)
            worst[key] = max(error, worst.get(key, 0))
    return worst


@pytest.mark.parametrize("implementation", OURS)
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
