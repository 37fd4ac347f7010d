"""Random problems against float64: a few here, `make fuzz` runs 20,000. See fuzz.py."""

import random

import fuzz
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given, note, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

settings.register_profile("default", max_examples=200)
settings.register_profile("fuzz", max_examples=20_000)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The problems are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@given(rng=st.randoms(use_true_random=False))
@settings(
    deadline=None,
    database=None,
    print_blob=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
def test_cpu(kernel, rng):
    """Hypothesis draws the problem, shrinks one that fails, and prints how to repeat it."""
    problem = fuzz.draw(rng)
    note(problem.text)
    fuzz.check(problem, kernel, "cpu")


def test_seeds_repeat():
    """A seed is enough to have a case again."""
    first, again = (fuzz.draw(random.Random(7)) for _ in range(2))
    assert first.text == again.text
    for a, b in zip(first.inputs.args, again.inputs.args):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_gpu(kernel):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    results = [fuzz.run_seed(seed, "cuda") for seed in range(settings.default.max_examples)]
    failures = [(seed, text) for seed, _, text in results if text]
    assert not failures, f"{len(failures)} of {len(results)}, the first: {failures[0]}"


@pytest.mark.parametrize("name", ["output", "value", "last"])
def test_an_error_is_found(kernel, name):
    """What is off by some roundings more than it may be, in one element, fails."""

    class Off:
        """A kernel whose result is."""

        reference = kernel.reference

        @staticmethod
        def ms_deform_attn(*args, **options):
            output = kernel.ms_deform_attn(*args, **options)
            if name == "output":
                return output + 1e-4 * (torch.arange(output.numel()) == 3).view(output.shape)
            tensor = args[0] if name == "value" else args[-1]
            return output + 1e-4 * (tensor - tensor.detach()).flatten()[3]

    rng = random.Random(0)
    problem = next(
        p for p in (fuzz.draw(rng) for _ in range(1000))
        if p.operator == "ms_deform_attn" and p.inputs.value.dtype == torch.float32
        and p.inputs.grad_output.numel() > 9 and p.inputs.args[-1].numel() > 9
    )  # fmt: skip
    fuzz.check(problem, kernel, "cpu")
    with pytest.raises(AssertionError, match="off by"):
        fuzz.check(problem, Off, "cpu")
