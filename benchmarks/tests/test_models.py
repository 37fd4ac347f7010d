"""Whole models, small: a time is that of the implementation named, and only of a right one."""

import pytest
from models import MODELS as SMALL
from test_transformers import transformers_that_uses_kernels

from benchmarks import models
from benchmarks.implementations import FUSED, KERNEL


@pytest.fixture
def run(command, monkeypatch):
    """On the model of tests/models.py in the place of the real one, by the same name."""
    transformers_that_uses_kernels()
    models._pretrained.cache_clear()
    spec = next(spec for spec in SMALL if spec.name == "deformable_detr")
    small = models.Model(spec.config, spec.model, spec.settings, spec.image, spec.attentions)
    monkeypatch.setitem(models.MODELS, spec.name, small)
    options = ("models", "--models", spec.name, "--reps", "2", "--impls")
    yield lambda *implementations: command(*options, *implementations)
    models._pretrained.cache_clear()


def test_models_take_turns_and_are_judged(run, monkeypatch):
    steps, time = [], models.Subject.time
    monkeypatch.setattr(models.Subject, "time", lambda s: steps.append(id(s)) or time(s))
    status, records = run("eager", FUSED, KERNEL)
    first, second, third = steps[:3]
    assert len({first, second, third}) == 3 and steps[3:6] == [second, third, first]
    assert status == 0 and len(records) == 3
    for record in records:
        assert record["ok"] and not record["corr"]["not_finite"]
        assert 0 < record["corr"]["error"]["operator"] < 2e-5
    eager, fused, _ = (record["lat_ms"]["raw_times"] for record in records)
    ratio = sum(slow / fast for slow, fast in zip(eager, fused)) / 2  # of two the median
    assert records[0]["ratio"] is None and records[1]["ratio"]["p50"] == pytest.approx(ratio)


def test_a_wrong_model_is_not_right(run, monkeypatch):
    def doubled(self, reference, output, *arguments, original=models.Observer._compare, **options):
        original(self, reference, 2 * output, *arguments, **options)

    def overflow(case, device, build=models.build):
        model = build(case, device)
        for parameter in model.bbox_embed.parameters():
            parameter.data.fill_(float("inf"))
        return model

    fakes = [(models.Observer, "_compare", doubled), (models, "build", overflow)]
    for owner, name, fake in [*fakes, (models, "place", lambda *_: models.nullcontext)]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fake)
            status, records = run(FUSED)
        assert status == 1 and not records[-1]["ok"]
    wrong, infinite, not_ours = records
    assert wrong["corr"]["error"]["operator"] > 0.9 and not_ours["lat_ms"] is None
    assert infinite["corr"]["not_finite"][0] == "pred_boxes"
