"""Level metadata on a GPU that describes no value: no access outside of any tensor.

For outputs, which an operator allocates itself, see `python tools/sanitize.py memcheck`.
"""

import random

import pytest
import torch
from cases import OPERATORS, Case, assert_close

GUARD = 2**20  # bytes on either side of each tensor


def guarded(tensor):
    """A copy, with NaN before and after it, and the whole of it in bytes."""
    size = tensor.numel() * tensor.element_size()
    whole = torch.full((size + 2 * GUARD,), 255, dtype=torch.uint8, device=tensor.device)
    copy = whole[GUARD : GUARD + size].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy, whole


def draw_levels(rng, levels, pixels):
    """(shapes, starts): any numbers, a few of them sensible."""
    sizes = [-(2**62), -(2**31), -5, -1, 0, 1, 2, 3, 5, 9, pixels, pixels + 1, 2**16, 2**31 - 1,
             2**31, 2**32 + 3, 2**62, 2**63 - 1]  # fmt: skip
    shapes = [[rng.choice(sizes), rng.choice(sizes)] for _ in range(levels)]
    starts = [rng.choice([*sizes, rng.randint(-9, pixels + 9)]) for _ in range(levels)]
    if rng.random() < 0.5:  # levels that fit, and overlap
        shapes = [[rng.randint(1, 9), rng.randint(1, 9)] for _ in range(levels)]
        starts = [rng.randint(0, pixels - 1) for _ in range(levels)]
    return shapes, starts


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("queries", [20, 83], ids=["few_queries", "queries_are_pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_access_outside_on_a_gpu(kernel, operator, dtype, queries, deterministic):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: level metadata on the CPU is refused")
    rng = random.Random(0)
    case = Case("bad_levels", queries=queries, channels=32)
    good = OPERATORS[operator](case, dtype, "cuda").require_grad()
    expected = getattr(kernel.reference, operator)(*good.double().args)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(50):
            inputs = OPERATORS[operator](case, dtype, "cuda")
            shapes, starts = draw_levels(rng, len(case.shapes), case.pixels)
            inputs.spatial_shapes = torch.tensor(shapes, device="cuda")
            inputs.level_start_index = torch.tensor(starts, device="cuda")
            wholes = []
            for name in [*vars(inputs)]:
                if name != "options":
                    copy, whole = guarded(getattr(inputs, name))
                    setattr(inputs, name, copy)
                    wholes.append((name, copy.clone(), whole))
            inputs.require_grad()
            output = getattr(kernel, operator)(*inputs.args)
            grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
            where = f"levels {shapes} at {starts}"
            for name, result in zip(["output", *inputs.gradient_names()], [output, *grads]):
                assert result.isfinite().all(), (
                    f"{name} has read a guard or is not written: {where}"
                )
            for name, copy, whole in wholes:
                edges = torch.cat([whole[:GUARD], whole[-GUARD:]])
                assert (edges == 255).all(), f"written beside {name}: {where}"
                assert torch.equal(getattr(inputs, name), copy), f"{name} was written: {where}"
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(getattr(kernel, operator)(*good.args), expected, "output afterwards")


def test_levels_that_overlap_leave_nothing_unwritten(kernel):
    """More pixels in the levels than value has, so that the last level comes late."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: level metadata on the CPU is refused")
    case = Case("overlapping", ((50, 100), (5, 100), (5, 100)), channels=32, queries=900)
    inputs = OPERATORS["ms_deform_attn"](case, torch.float32, "cuda").require_grad()
    inputs.spatial_shapes = torch.tensor([[50, 100], [50, 100], [10, 100]], device="cuda")
    inputs.level_start_index = torch.tensor([0, 0, 5000], device="cuda")
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN, then
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        output = kernel.ms_deform_attn(*inputs.args)
        grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    for name, grad in zip(inputs.gradient_names(), grads):
        assert grad.isfinite().all(), name
