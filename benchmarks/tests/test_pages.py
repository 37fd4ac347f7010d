"""Every published figure is that of its record, and records are sound."""

import json
import re

import pytest

from benchmarks import render
from benchmarks.__main__ import main
from benchmarks.implementations import KERNEL
from benchmarks.operators import ROOT
from benchmarks.records import RESULTS, read

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
    read_by_code = ("operator", "peers", "models", "accuracy", "cpu", ".gitignore")
    for file in RESULTS.iterdir():
        kind = file.stem.split("-")[-1]  # quoted as in h100-2026-11-26-{lists,counters}.txt
        known = kind in read_by_code or kind in text or "local" in file.name
        assert known, f"nothing reads {file.name}"


@pytest.mark.parametrize(
    ("ours", "unit", "options", "status"),
    [(1, 1, (), 0), (3, 1, (), 1), (0, 1, (), 1), (3, 3, ("--relative-to", "grid_sample"), 0)],
)
def test_compare(tmp_path, ours, unit, options, status):
    records = read([GUARD])
    for record in records:
        factor, times = ours if record["impl"] == KERNEL else unit, record["lat_ms"]
        times["raw_times"] = [factor * time for time in times["raw_times"]]
        record["ok"] = factor > 0  # else as wrong as it is fast
    after = tmp_path / "after.jsonl"
    after.write_text("\n".join(map(json.dumps, records)))
    assert main(["compare", str(GUARD), str(after), *options]) == status
