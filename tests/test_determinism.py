"""Gradients repeat bit for bit: in torch's deterministic mode, and on the CPU always."""

import pytest
import torch
from cases import DTYPES, OPERATORS, Case

# Many points on few pixels, so that many additions meet in each.
CASE = Case("crowded", ((2, 3), (12, 17)), queries=500, heads=4, channels=32)
RUNS = 20


@pytest.fixture
def deterministic_mode():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def gradients(kernel, operator, inputs):
    output = getattr(kernel, operator)(*inputs.args)
    grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    return [output.detach(), *grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_repeat_bit_for_bit(kernel, device, operator, dtype, deterministic_mode):
    inputs = OPERATORS[operator](CASE, dtype, device).require_grad()
    first = gradients(kernel, operator, inputs)
    for _ in range(RUNS - 1):
        for again, before in zip(gradients(kernel, operator, inputs), first):
            assert torch.equal(again, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_gradients_repeat_with_any_number_of_threads(kernel, operator, dtype):
    inputs = OPERATORS[operator](CASE, dtype).require_grad()
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
