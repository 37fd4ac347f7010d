"""What PyTorch's compiler and its operator checks make of the ops."""

import pytest
import torch
from cases import SMALL, Case, make_inputs, relative_error


def ops(kernel):
    return kernel.functional.ops


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_forward(kernel, device, dtype):
    inputs = make_inputs(SMALL, dtype, device).require_grad()
    torch.library.opcheck(ops(kernel).ms_deform_attn_forward.default, inputs.args)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_backward(kernel, device, dtype):
    inputs = make_inputs(SMALL, dtype, device)
    torch.library.opcheck(
        ops(kernel).ms_deform_attn_backward.default,
        (*inputs.args, inputs.grad_output),
        atol=1e-3 if dtype == torch.float16 else 1e-5,
        rtol=1e-3 if dtype == torch.float16 else 1e-5,
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_forward_and_backward(kernel, device, backend):
    torch._dynamo.reset()
    inputs = make_inputs(SMALL, torch.float32, device).require_grad()

    def step(*args):
        return kernel.ms_deform_attn(*args).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    expected = torch.autograd.grad(step(*inputs.args), inputs.differentiable())
    actual = torch.autograd.grad(compiled(*inputs.args), inputs.differentiable())
    for a, b in zip(actual, expected):
        assert relative_error(a, b.double()) < 1e-6


def test_one_compilation_serves_any_batch_and_number_of_queries(kernel, device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: kernel.ms_deform_attn(*args) * 2, fullgraph=True, backend="aot_eager"
    )

    def run(batch, queries):
        inputs = make_inputs(Case("dynamic", batch=batch, queries=queries), torch.float32, device)
        for tensor in inputs.differentiable():
            torch._dynamo.mark_dynamic(tensor, 0)
        for tensor in (inputs.sampling_locations, inputs.attention_weights):
            torch._dynamo.mark_dynamic(tensor, 1)
        output = compiled(*inputs.args)
        assert torch.equal(output, kernel.ms_deform_attn(*inputs.args) * 2)

    run(2, 13)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, queries in ((3, 13), (2, 40), (5, 7)):
            run(batch, queries)


def test_cuda_graph(kernel):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    inputs = make_inputs(SMALL, torch.float32, "cuda")
    kernel.ms_deform_attn(*inputs.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernel.ms_deform_attn(*inputs.args)
        grads = kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)
    inputs.value.copy_(make_inputs(SMALL, torch.float32, "cuda", seed=5).value)
    graph.replay()
    assert torch.equal(output, kernel.ms_deform_attn(*inputs.args))
    expected = kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output, 64)
    for a, b in zip(grads, expected):
        assert relative_error(a, b.double()) < 1e-6
