"""The commands that time whole models and the kernels-benchmarks protocol, run small."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from models import MODELS as SMALL
from test_transformers import transformers_that_uses_kernels

from benchmarks import models, seed
from benchmarks.__main__ import main
from benchmarks.implementations import FUSED, KERNEL, REPOSITORY, seed_eager


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The models of tests/models.py in the place of real ones, by the same names."""
    transformers_that_uses_kernels()
    models._pretrained.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small models gain nothing from more
    for name, real in models.MODELS.items():
        spec = next((spec for spec in SMALL if spec.name == name), None)
        if spec is None:
            continue
        model = models.Model(
            spec.config, spec.model, spec.settings | {"num_labels": 91}, spec.image,
            spec.attentions, real.function, real.masks,
        )  # fmt: skip
        monkeypatch.setitem(models.MODELS, name, model)
    yield
    torch.set_num_threads(threads)
    models._pretrained.cache_clear()


@pytest.fixture
def run(tmp_path):
    def run(*options):
        out = tmp_path / "models.jsonl"
        options = ("--device", "cpu", "--reps", "2", "--out", str(out), *options)
        status = main(["models", *options])
        return status, [json.loads(line) for line in out.read_text().splitlines()]

    return run


@pytest.mark.parametrize("name", ["deformable_detr", "mask2former", "d_fine", "rf_detr"])
def test_models(run, name, capsys):
    options = ("--models", name, "--dtypes", "float32", "--impls", "eager", FUSED, KERNEL)
    status, records = run(*options, "--modes", "all")
    assert status == 0
    assert [(r["impl"], r["wl"]["pass"]) for r in records] == [
        (impl, mode) for mode in ("inference", "training") for impl in ("eager", FUSED, KERNEL)
    ]
    for record in records:
        assert record["ok"] and record["corr"]["not_finite"] == [] and record["err"] is None
        assert record["corr"]["calls"] == models.MODELS[name].attentions
        assert 0 < record["corr"]["error"]["operator"] < 2e-5
        assert record["images_per_s"] == pytest.approx(1e3 / record["lat_ms"]["p50"])
        assert record["env"]["transformers"].startswith("5.22")
        ratio = record["ratio"]
        if record["impl"] == "eager":
            assert ratio is None
            eager = record["lat_ms"]["raw_times"]
        else:
            assert ratio["to"] == "eager" and ratio["rounds"] == record["lat_ms"]["reps"] == 2
            pairs = sorted(a / b for a, b in zip(eager, record["lat_ms"]["raw_times"]))
            assert ratio["p50"] == pytest.approx(sum(pairs) / 2)
            assert pairs[0] <= ratio["p25"] <= ratio["p75"] <= pairs[1]
    assert f"{ratio['p50']:.2f}x" in capsys.readouterr().out
    _, again = run(*options, "--resume")
    assert again == records


def test_implementations_take_turns(run, monkeypatch):
    """Step by step, and each round in another order."""
    steps = []
    time = models.Subject.time

    def noted(subject):
        steps.append(id(subject))
        return time(subject)

    monkeypatch.setattr(models.Subject, "time", noted)
    run("--models", "deformable_detr", "--impls", "eager", FUSED, KERNEL)
    first, second, third = steps[:3]
    assert len({first, second, third}) == 3
    assert steps[3:] == [second, third, first]


@pytest.mark.parametrize("mode", models.MODES)
def test_compiled_models_get_code_of_their_own(run, monkeypatch, mode):
    """Of one class, in one process; with a stand-in for Inductor."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph.forward)
    compilers = []

    class Noted(models.Compiler):
        def __init__(self):
            super().__init__()
            compilers.append(self)

    monkeypatch.setattr(models, "Compiler", Noted)
    names = ["eager_compiled", f"{KERNEL}_compiled", f"{FUSED}_compiled"]
    status, records = run("--models", "deformable_detr", "--modes", mode, "--impls", *names)
    assert status == 0 and all(record["ok"] for record in records), records
    # In training, layers of which there are several are compiled once, in frames of their own.
    calls = [compiler.calls for compiler in compilers]
    assert calls[0] == 0 < min(calls[1:]) <= models.MODELS["deformable_detr"].attentions
    assert {record["impl"] for record in records} == set(names)
    assert [record["ratio"] and record["ratio"]["to"] for record in records] == [
        None,
        "eager_compiled",
        "eager_compiled",
    ]


def test_a_model_that_was_compiled_without_the_kernel_has_no_time(run, monkeypatch):
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph.forward)
    monkeypatch.setattr(models, "KERNEL", "no name of an operator")
    status, (record,) = run("--models", "deformable_detr", "--impls", f"{FUSED}_compiled")
    assert status == 1 and record["lat_ms"] is None
    assert "0 calls of no name of an operator were compiled" in record["err"]["msg"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_train_under_autocast(run, dtype):
    status, records = run("--models", "deformable_detr", "--modes", "all", "--dtypes", dtype)
    assert status == 0 and all(record["ok"] for record in records)
    assert [(r["impl"], r["wl"]["dtype"]) for r in records] == [
        (impl, name) for name in (dtype, f"{dtype}_autocast") for impl in ("eager", FUSED)
    ]
    kernel = records[1::2]
    assert all(record["corr"]["tolerance"]["operator"] == 8e-3 for record in kernel)
    assert all(1e-5 < record["corr"]["error"]["operator"] < 3e-3 for record in kernel)


@pytest.mark.parametrize("implementation", ["eager", KERNEL])
def test_a_model_that_is_not_finite_is_wrong(run, monkeypatch, capsys, implementation):
    build = models.build

    def overflow(case, device):
        model = build(case, device)
        with torch.no_grad():
            for parameter in model.bbox_embed.parameters():
                parameter.fill_(float("inf"))
        return model

    monkeypatch.setattr(models, "build", overflow)
    options = ("--models", "deformable_detr", "--dtypes", "float16", "--impls", implementation)
    status, (inference, training) = run(*options, "--modes", "all")
    assert status == (implementation == KERNEL)
    assert not inference["ok"] and inference["err"] is None and inference["lat_ms"]["p50"] > 0
    assert inference["corr"]["not_finite"][0] == "pred_boxes"
    # What the loss says of boxes that are no numbers.
    assert not training["ok"] and training["lat_ms"] is None and training["err"]["msg"]
    shown = capsys.readouterr().out
    assert "WRONG: pred_boxes" in shown and "failed: " in shown


def test_a_model_that_is_not_kernelized_has_no_time(run, monkeypatch):
    monkeypatch.setattr(models, "kernelize", lambda model, **options: model)
    status, (record,) = run("--models", "deformable_detr", "--impls", KERNEL)
    assert status == 1 and record["lat_ms"] is None
    assert "keeps transformers' layer" in record["err"]["msg"]


@pytest.mark.parametrize("implementation", [KERNEL, FUSED])
def test_a_wrong_operator_is_shown_as_wrong(run, monkeypatch, capsys, implementation):
    original = models.Observer._compare

    def doubled(self, reference, output, *arguments, **options):
        original(self, reference, 2 * output, *arguments, **options)

    monkeypatch.setattr(models.Observer, "_compare", doubled)
    status, (record,) = run("--models", "mask2former", "--impls", implementation)
    assert status == 1 and not record["ok"]
    assert record["corr"]["error"]["operator"] == pytest.approx(1, rel=1e-3)
    assert "WRONG: 1e+00" in capsys.readouterr().out


def test_what_is_not_finite_is_named():
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.bias.fill_(float("inf"))
    outputs = {"logits": torch.tensor(float("nan")), "loss": None, "other": torch.tensor(0.0)}
    assert models.not_finite(layer, outputs) == ["logits", "bias"]


class TestSeed:
    """The protocol's records, field by field."""

    @pytest.fixture
    def records(self, monkeypatch, tmp_path):
        def records(*options):
            out = tmp_path / "deformable_detr.jsonl"
            status = main(["seed", "--device", "cpu", "--out", str(out), *options])
            return status, [json.loads(line) for line in out.read_text().splitlines()]

        every = seed.workloads
        monkeypatch.setattr(seed, "workloads", lambda dtype, device: every(dtype, device)[:1])
        return records

    def test_workloads(self):
        names = [workload["name"] for workload in seed.workloads("float32", torch.device("cuda"))]
        assert names == [
            f"cuda_B{batch}_Q{queries}_H8_E256_L4_P4" for batch in (1, 2) for queries in (100, 300)
        ]

    def test_records(self, records, capsys):
        status, found = records("--impls", "torch_eager", KERNEL)
        assert status == 0 and [r["impl"] for r in found] == ["torch_eager", KERNEL]
        for record in found:
            assert list(record) == (
                "ts run impl tags wl env lat_ms compile_ms peak_bytes ok absmax corr err".split()
            )
            assert (
                list(record["wl"])
                == (
                    "name batch_size num_queries num_heads embed_dim num_levels num_points "
                    "spatial_shapes dtype device seed"
                ).split()
            )
            assert list(record["env"]) == "torch cuda gpu sm py plat".split()
            assert record["lat_ms"]["reps"] == len(record["lat_ms"]["raw_times"]) == 5
            assert record["lat_ms"]["warmup"] == 2
            assert record["ok"] and record["corr"]["rtol"] == record["corr"]["atol"] == 1e-5
        assert found[0]["absmax"] == 0 < found[1]["absmax"]
        assert "1.00x" in capsys.readouterr().out
        _, found = records("--impls", "torch_eager")
        assert len(found) == 1  # as there: an old file is not kept

    def test_tags(self):
        tags = {name: seed.tags(name) for name in seed.NAMES}
        assert tags["torch_eager"] == {"family": "pytorch", "backend": "eager"}
        assert tags["hf_kernels_deformable_detr"] == {"family": "hf-kernels", "backend": "cuda"}
        assert tags[KERNEL] == tags["hf_kernels_deformable_detr"]

    def test_page(self, monkeypatch):
        """The page for kernels-benchmarks, on a stand-in for its harness."""
        calls = []
        harness = types.ModuleType("kernels_benchmark_tools")
        harness.KernelTypeEnum = types.SimpleNamespace(DEFORMABLE_DETR="deformable_detr")
        harness.run_benchmark = lambda **options: calls.append(options)
        monkeypatch.setitem(sys.modules, harness.__name__, harness)
        page = Path(seed.__file__).with_name("kernels_benchmarks.md").read_text()
        cells = re.findall(r"^```python id=(\w+).*?\n(.*?)^```", page, re.M | re.S)
        assert [name for name, _ in cells] == ["nv", "benchmark"]
        exec(cells[1][1], {})
        assert page.count(f'"{REPOSITORY}"') == 1 and f"on_huggingface: {REPOSITORY}\n" in page
        (call,) = calls
        function = call.pop("impl_func")
        assert call == {
            "kernel_type": "deformable_detr",
            "impl_name": KERNEL,
            "impl_tags": seed.tags(KERNEL),
            "dtype": "float32",
        }
        inputs = seed.make_inputs(seed.workloads("float32", torch.device("cpu"))[0])
        assert seed.compare(function(*inputs), seed_eager(*inputs))["ok"]

    def test_tolerance(self):
        expected = torch.full((4,), 2.0)
        assert seed.compare(expected * (1 + 1e-5), expected)["ok"]
        assert not seed.compare(expected * (1 + 2e-5), expected)["ok"]
        assert seed.compare((expected * 1.004).half(), expected.half())["ok"]
        assert not seed.compare((expected * 1.01).half(), expected.half())["ok"]
        infinite = torch.tensor([float("inf")])
        assert not seed.compare(infinite, infinite)["ok"]

    def test_failure_is_recorded(self, records):
        status, (record,) = records("--impls", "hf_kernels_deformable_detr")
        assert status == 0 and not record["ok"] and record["lat_ms"] is None and record["err"]
