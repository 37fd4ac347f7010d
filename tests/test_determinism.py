"""Gradients repeat bit for bit: in torch's deterministic mode, and on the CPU always."""

import pytest
import torch
from cases import CASES, DTYPES, OPERATORS, Case
from test_operator import check_against_reference

# Many points sample few pixels, so that many additions meet in each pixel. In the last three cases
# a level has more points than a block of the GPU holds: in the order of the pixels, in any order,
# and so many that the block halves its range of pixels, next to levels one pixel thin.
CROWDED = [
    Case("crowded", ((2, 3), (12, 17)), queries=500, heads=4, channels=32),
    Case("crowded_encoder", ((30, 40), (1, 1), (15, 20)), queries=1501, heads=4, channels=32,
         locations="encoder"),
    Case("crowded_any_order", ((30, 40), (2, 3)), queries=2100, heads=3, channels=30,
         points_per_level=(1, 4)),
    Case("crowded_parts", ((12, 17), (1, 900), (700, 1)), queries=1000, heads=4, channels=32),
]  # fmt: skip
OTHERS = [case for case in CASES if case.name in ("pyramid", "d_fine", "thin_maps", "nearest")]
RUNS = 20


@pytest.fixture
def deterministic_mode():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def gradients(kernel, operator, inputs):
    output = getattr(kernel, operator)(*inputs.args, **inputs.options)
    grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    return [output.detach(), *grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_repeat_bit_for_bit(kernel, device, operator, dtype, deterministic_mode):
    for case in CROWDED if device == "cuda" else CROWDED[:1]:  # the CPU has one strategy for all
        inputs = OPERATORS[operator](case, dtype, device).require_grad()
        first = gradients(kernel, operator, inputs)
        for _ in range(RUNS - 1):
            for again, before in zip(gradients(kernel, operator, inputs), first):
                assert torch.equal(again, before), case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CROWDED + OTHERS, ids=lambda case: case.name)
def test_gradients_are_right(kernel, device, operator, case, dtype, deterministic_mode):
    if device == "cpu" and case is not CROWDED[0]:
        pytest.skip("a CPU has one strategy for all, which test_operator.py compares")
    check_against_reference(kernel, OPERATORS[operator](case, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_gradients_repeat_with_any_number_of_threads(kernel, operator, dtype):
    inputs = OPERATORS[operator](CROWDED[0], dtype).require_grad()
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 5, 1):
            torch.set_num_threads(number)
            results.append(gradients(kernel, operator, inputs))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
