"""What is made of records: comparisons, pictures, pages, README.md's figures."""

import copy
import json
import sys
from html.parser import HTMLParser

import pytest

from benchmarks import compare, figures, readme, report
from benchmarks.__main__ import main
from benchmarks.implementations import KERNEL
from benchmarks.records import check_one_device, latest, read


def record(impl=KERNEL, times=(1.0, 1.1, 1.2), ok=True, name="seed_b1_q100", pass_name="forward"):
    """Of the suite, with only what is read here."""
    return {
        "ts": "2026-11-25T00:00:00Z",
        "impl": impl,
        "wl": {"name": name, "dtype": "float32", "pass": pass_name, "queries": 1, "batch": 1},
        "env": {"cpu": "some CPU", "gpu": "", "torch": "2.13", "threads": 2},
        "lat_ms": {"raw_times": list(times), "p50": sorted(times)[len(times) // 2], "iqr": 0.1},
        "peak_bytes": 1000000,
        "ok": ok,
        "corr": {"error": {"output": 1e-7}, "tolerance": {"output": 2e-5}},
        "err": None,
        "floor_ms": 0.5,
        "ceiling_ms": 0.8,
    }


def write(path, records):
    path.write_text("".join(f"{json.dumps(item)}\n" for item in records))
    return str(path)


class TestCompare:
    @pytest.fixture
    def status(self, tmp_path):
        def status(before, after, *options):
            files = [write(tmp_path / f"{i}.jsonl", file) for i, file in enumerate((before, after))]
            return main(["compare", *files, *options])

        return status

    def test_same_is_fine(self, status, capsys):
        assert status([record()], [record()]) == 0
        assert "1.000" in capsys.readouterr().out

    def test_slower_is_not(self, status, capsys):
        assert status([record()], [record(times=(2.0, 2.1, 2.2))]) == 1
        assert "slower" in capsys.readouterr().out
        assert status([record()], [record(times=(2.0, 2.1, 2.2))], "--threshold", "3") == 0

    def test_noise_alone_is_fine(self, status):
        noisy = record(times=(0.8, 1.0, 1.3, 1.0, 2.5, 0.9))
        assert status([noisy], [record(times=(1.2, 0.9, 1.3, 1.1, 2.0, 0.9))]) == 0

    def test_wrong_is_not(self, status, capsys):
        assert status([record()], [record(times=(0.1, 0.1), ok=False)]) == 1
        assert "wrong" in capsys.readouterr().out
        with pytest.raises(SystemExit):  # it was wrong before: nothing to compare
            status([record(ok=False)], [record(ok=False)])

    def test_relative_times_tell_of_the_kernel_alone(self, status):
        slow_machine = [record(times=(3.0, 3.1, 3.2)), record("grid_sample", (30.0, 31.0, 32.0))]
        before = [record(), record("grid_sample", (10.0, 11.0, 12.0))]
        assert status(before, slow_machine) == 1
        assert status(before, slow_machine, "--relative-to", "grid_sample") == 0
        slow_kernel = [slow_machine[0], before[1]]
        assert status(before, slow_kernel, "--relative-to", "grid_sample") == 1

    def test_interval_holds_the_ratio(self):
        times = compare.np.linspace(1, 2, 50)
        ratio = compare.ratio_of_medians([times], [2 * times])
        assert ratio.low < ratio.estimate == 2 < ratio.high < 3


class TestRecords:
    def test_latest_counts(self):
        first, second = record(), record(times=(9.0,))
        assert latest([first, record("grid_sample"), second])[0] is second

    def test_several_devices_are_not_compared(self, tmp_path, capsys):
        other = copy.deepcopy(record())
        other["env"]["cpu"] = "another"
        with pytest.raises(ValueError, match="the records are of another, some CPU"):
            check_one_device([record(), other])
        with pytest.raises(SystemExit):
            file = write(tmp_path / "two.jsonl", [record(), other])
            main(["report", file, "--out", str(tmp_path)])

    def test_what_is_no_record_is_named(self, tmp_path):
        (tmp_path / "bad.jsonl").write_text("{}\nnonsense\n")
        with pytest.raises(ValueError, match="bad.jsonl, line 2"):
            read([tmp_path / "bad.jsonl"])


class Page(HTMLParser):
    """Counts what a page is made of, and keeps what it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.counts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [x for name, x in attributes if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def records(tmp_path):
    """A file with something for every picture but that of models."""
    scaling = [record(name=f"scaling_b4_q{queries}") for queries in (100, 300)]
    for item, queries in zip(scaling, (100, 300)):
        item["wl"] |= {"queries": queries, "batch": 4}
    rivals = [record("grid_sample", (9.0,)), record("<b>", (0.1,), ok=False)]
    failed = record("seed_eager") | {"lat_ms": None, "err": {"type": "MemoryError", "msg": "no"}}
    failed["corr"] = {}
    backward = record(pass_name="backward")
    return write(
        tmp_path / "r.jsonl", [record(), *rivals, failed | {"ok": False}, backward, *scaling]
    )


def test_pictures_in_both_themes_and_formats(records, tmp_path):
    assert main(["figures", records, "--out", str(tmp_path / "p")]) == 0
    names = {file.name for file in (tmp_path / "p").iterdir()}
    assert names == {
        f"{name}-{theme}.{suffix}"
        for name in ("latency", "speedup", "roofline", "scaling")
        for theme in ("light", "dark")
        for suffix in ("svg", "png")
    }
    again = figures.draw(read([tmp_path / "r.jsonl"]), tmp_path / "again", ("svg",))
    for themes in again.values():
        for file in themes.values():
            assert file.read_bytes() == (tmp_path / "p" / file.name).read_bytes()
    assert ">8.2<" in (tmp_path / "p" / "speedup-light.svg").read_text()  # 9 over 1.1


def test_report_holds_all_it_shows(records, tmp_path):
    assert main(["report", records, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.open and page.counts["picture"] == 4
    assert all(load.startswith(("data:image/svg+xml;base64,", "#")) for load in page.loads)
    assert 'name="viewport"' in text and "<b>" not in text and "&lt;b&gt;" in text
    assert '<td class="bad">wrong</td>' in text and "MemoryError" in text
    markdown = (tmp_path / "report.md").read_text()
    for load in Page(markdown).loads:
        assert (tmp_path / load).exists()
    assert "| seed_b1_q100 | float32 | 1100 ± 100 | 9000 ± 100 | wrong | MemoryError |" in markdown


def test_report_without_matplotlib(records, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", records, "--out", str(tmp_path / "r")]) == 0
    assert "matplotlib is missing" in (tmp_path / "r" / "report.md").read_text()
    with pytest.raises(SystemExit):
        main(["figures", records, "--out", str(tmp_path / "p")])


def test_figures_in_readme_are_those_of_the_results(capsys):
    assert main(["readme", "--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_is_noticed(monkeypatch, tmp_path, capsys):
    page = tmp_path / "README.md"
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    text = readme.README.read_text()
    page.write_text(text.replace("| ddetr_encoder_b4 |", "| ddetr_encoder_b4 | 1.00 |", 1))
    monkeypatch.setattr(readme, "README", page)
    monkeypatch.setattr(readme, "REPORT", tmp_path / "benchmarks.md")
    monkeypatch.setattr(readme, "write", lambda before: text)
    monkeypatch.setattr(readme, "report", lambda: "")
    assert readme.main(["--check"]) == 1
    assert "| ddetr_encoder_b4 | 1.00 |" in capsys.readouterr().out
    assert readme.main([]) == 0 and page.read_text() == text


def test_readme_needs_its_marks():
    with pytest.raises(ValueError, match="0 blocks named operator"):
        readme.write("# No marks")


def test_report_of_every_committed_kind():
    tables = {table.title for table in report.sheets(readme.every_record())}
    assert {"Whole models", "Forward", "Backward", "Accuracy", "Memory"} <= tables
    assert "The kernels-benchmarks protocol" in tables
