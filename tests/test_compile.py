"""PyTorch's compilers, exporters, graphs, operator checks and counters, on the ops."""

import shutil
import subprocess
import sys

import pytest
import torch
from cases import OPERATORS, SMALL, Case, relative_error
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode


def ops(kernel):
    return kernel.functional.ops


# Each op with its inputs of a Problem.
def forward_args(operator, inputs):
    fused = operator == "fused_ms_deform_attn"
    return (*inputs.args, None, False, 0.5) if fused else inputs.args


def backward_args(operator, inputs):
    fused = operator == "fused_ms_deform_attn"
    args = (*inputs.args, inputs.grad_output)
    return (*args, None, False, 0.5, True) if fused else args


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_forward(kernel, device, operator, dtype):
    inputs = OPERATORS[operator](SMALL, dtype, device).require_grad()
    op = getattr(ops(kernel), f"{operator}_forward")
    torch.library.opcheck(op.default, forward_args(operator, inputs))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_backward(kernel, device, operator, dtype):
    inputs = OPERATORS[operator](SMALL, dtype, device)
    torch.library.opcheck(
        getattr(ops(kernel), f"{operator}_backward").default,
        backward_args(operator, inputs),
        atol=1e-3 if dtype == torch.float16 else 1e-5,
        rtol=1e-3 if dtype == torch.float16 else 1e-5,
    )


@pytest.mark.parametrize("name", ["d_fine", "nearest"])
def test_opcheck_with_options(kernel, device, name):
    options = {"d_fine": ([3, 6, 3], False), "nearest": (None, True)}[name]
    case = Case(name, ((9, 14), (5, 7), (3, 4)), points_per_level=options[0])
    for operator, make in OPERATORS.items():
        inputs = make(case, torch.float32, device).require_grad()
        scale = (0.5,) if operator == "fused_ms_deform_attn" else ()
        op = getattr(ops(kernel), f"{operator}_forward")
        torch.library.opcheck(op.default, (*inputs.args, *options, *scale))


# ---------------------------------------------------------------------------------------- compile

# The modes that use CUDA graphs, and max-autotune's timing of matrix products, are for the GPU.
MODES = {
    "cpu": ["default", "max-autotune-no-cudagraphs"],
    "cuda": ["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"],
}


def training_step(kernel, operator, options):
    function = getattr(kernel, operator)
    return lambda *args: function(*args, **options).square().sum()


def check_training_step(kernel, operator, device, case=SMALL, **how):
    torch._dynamo.reset()
    inputs = OPERATORS[operator](case, torch.float32, device).require_grad()
    step = training_step(kernel, operator, inputs.options)
    expected = torch.autograd.grad(step(*inputs.args), inputs.differentiable())
    compiled = torch.compile(step, fullgraph=True, **how)
    # A CUDA graph is recorded in the second run and replayed in the third.
    for _ in range(3):
        actual = torch.autograd.grad(compiled(*inputs.args), inputs.differentiable())
        for a, b in zip(actual, expected):
            assert relative_error(a, b.double()) < 1e-6


def test_fullgraph_without_inductor(kernel, device, operator):
    check_training_step(kernel, operator, device, backend="aot_eager")


@pytest.mark.parametrize("mode", sorted({mode for modes in MODES.values() for mode in modes}))
def test_fullgraph_training_step(kernel, device, operator, mode):
    if mode not in MODES[device]:
        pytest.skip(f"{mode} needs a GPU")
    check_training_step(kernel, operator, device, mode=mode)


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_fullgraph_with_options(kernel, device, operator, method):
    case = Case("d_fine", ((9, 14), (5, 7), (3, 4)), points_per_level=(3, 6, 3))
    torch._dynamo.reset()
    inputs = OPERATORS[operator](case, torch.float32, device)
    function = getattr(kernel, operator)

    def run(*args):
        return function(*args, points_per_level=[3, 6, 3], method=method) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs.args), run(*inputs.args))


def test_one_compilation_serves_any_batch_and_number_of_queries(kernel, device, operator):
    torch._dynamo.reset()
    step = training_step(kernel, operator, {})
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    def run(batch, queries):
        case = Case("dynamic", batch=batch, queries=queries)
        inputs = OPERATORS[operator](case, torch.float32, device).require_grad()
        for tensor in inputs.differentiable():
            torch._dynamo.mark_dynamic(tensor, 0)
        for tensor in inputs.differentiable()[1:]:
            torch._dynamo.mark_dynamic(tensor, 1)
        actual = torch.autograd.grad(compiled(*inputs.args), inputs.differentiable())
        expected = torch.autograd.grad(step(*inputs.args), inputs.differentiable())
        for a, b in zip(actual, expected):
            assert relative_error(a, b.double()) < 1e-6

    run(2, 13)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, queries in ((3, 13), (2, 40), (5, 7)):
            run(batch, queries)


def test_checkpointing_inside_a_compiled_step(kernel, device, operator):
    function = getattr(kernel, operator)
    kernel_and_checkpoint = type("Checkpointed", (), {})()

    def checkpointed(*args, **options):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **options)

    setattr(kernel_and_checkpoint, operator, checkpointed)
    check_training_step(kernel_and_checkpoint, operator, device, backend="aot_eager")


def test_backward_compiled_alone(kernel, device, operator):
    """By compiled autograd, after a forward in eager mode."""
    torch._dynamo.reset()
    inputs = OPERATORS[operator](SMALL, torch.float32, device).require_grad()
    step = training_step(kernel, operator, {})
    expected = torch.autograd.grad(step(*inputs.args), inputs.differentiable())
    loss = step(*inputs.args)
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    for tensor, wanted in zip(inputs.differentiable(), expected):
        assert relative_error(tensor.grad, wanted.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_under_autocast(kernel, device, operator, dtype):
    torch._dynamo.reset()
    inputs = OPERATORS[operator](SMALL, torch.float32, device)
    function = getattr(kernel, operator)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype):
        output = compiled(*inputs.args)
        assert output.dtype == dtype and torch.equal(output, function(*inputs.args))
    assert compiled(*inputs.args).dtype == torch.float32


# ----------------------------------------------------------------------------------------- export


class Module(torch.nn.Module):
    """An operator between two projections, as a model has it."""

    def __init__(self, function, channels):
        super().__init__()
        self.function = function
        self.project = torch.nn.Linear(channels, channels)
        self.output = torch.nn.Linear(SMALL.heads * SMALL.channels, 5)

    def forward(self, value, *args):
        return self.output(self.function(self.project(value), *args))


def module_and_inputs(kernel, operator, device, **sizes):
    torch.manual_seed(0)
    module = Module(getattr(kernel, operator), SMALL.channels).to(device).eval()
    return module, OPERATORS[operator](Case("export", **sizes), torch.float32, device).args


def dynamic_shapes(args):
    """Batch and queries."""
    batch, queries = Dim("batch", min=2, max=64), Dim("queries", min=2, max=1000)
    levels = (None, None)
    rest = ({0: batch, 1: queries},) * (len(args) - 3)
    return ({0: batch}, (*levels, *rest))


def exported(kernel, operator, device):
    module, args = module_and_inputs(kernel, operator, device)
    with torch.no_grad():
        return torch.export.export(module, args, dynamic_shapes=dynamic_shapes(args))


@pytest.mark.parametrize("sizes", [{}, {"batch": 5, "queries": 7}], ids=str)
def test_export_saved_and_loaded(kernel, device, operator, tmp_path, sizes):
    torch.export.save(exported(kernel, operator, device), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    assert any(f"{operator}_forward" in str(node.target) for node in program.graph.nodes)
    module, args = module_and_inputs(kernel, operator, device, **sizes)
    assert torch.allclose(program.module()(*args), module(*args), atol=1e-6)


LOADS_A_PACKAGE = """
import sys, torch
class Double(torch.nn.Module):
    def forward(self, x):
        return x * 2
x = torch.ones(3, device=sys.argv[1])
program = torch.export.export(Double(), (x,))
path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[2])
assert torch.equal(torch._inductor.aoti_load_package(path)(x), 2 * x)
"""


def check_that_torch_loads_packages(device, folder):
    """Skips where AOTInductor cannot run the simplest program: that may end the process."""
    command = [sys.executable, "-c", LOADS_A_PACKAGE, device, str(folder / "double.pt2")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"AOTInductor cannot run x * 2 here: exit status {run.returncode}, {last}")


class Both(torch.nn.Module):
    """Both operators, so that one package, which takes half a minute to compile, has both."""

    def __init__(self, plain, fused):
        super().__init__()
        self.plain, self.fused = plain, fused

    def forward(self, plain_args, fused_args):
        return self.plain(*plain_args), self.fused(*fused_args)


@pytest.mark.slow
def test_aot_inductor_package(kernel, device, tmp_path):
    """The package calls the op by name, so the process that runs it must have loaded the kernel."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here: AOTInductor needs one")
    # Imported here, as it imports setuptools, which kernel-builder's environment may not have.
    if device == "cuda" and pytest.importorskip("torch.utils.cpp_extension").CUDA_HOME is None:
        pytest.skip("no CUDA toolkit here: AOTInductor needs its headers for a GPU")
    check_that_torch_loads_packages(device, tmp_path)

    def both(**sizes):
        pairs = [module_and_inputs(kernel, name, device, **sizes) for name in OPERATORS]
        modules, args = zip(*pairs)
        return Both(*modules).eval(), args

    module, args = both()
    shapes = tuple((value, *rest) for value, rest in map(dynamic_shapes, args))
    with torch.no_grad():
        program = torch.export.export(module, args, dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for sizes in ({}, {"batch": 5, "queries": 7}):
        module, args = both(**sizes)
        with torch.no_grad():
            for actual, expected in zip(run(*args), module(*args)):
                assert torch.allclose(actual, expected, atol=1e-5)


# ------------------------------------------------------------------------------------- TorchScript


def layer_and_args(kernel, device):
    inputs = OPERATORS["ms_deform_attn"](SMALL, torch.float32, device).require_grad()
    value, shapes, *rest = inputs.args
    layer = kernel.layers.MultiScaleDeformableAttention()
    return layer, inputs, (value, shapes, list(SMALL.shapes), *rest, 64)


def test_script_of_the_layer(kernel, device, tmp_path):
    layer, inputs, args = layer_and_args(kernel, device)
    torch.jit.script(layer).save(tmp_path / "layer.pt")
    scripted = torch.jit.load(tmp_path / "layer.pt")
    assert torch.equal(scripted(*args), layer(*args))
    grads, expected = (
        torch.autograd.grad(f(*args), inputs.differentiable(), inputs.grad_output)
        for f in (scripted, layer)
    )
    for a, b in zip(grads, expected):
        assert relative_error(a, b.double()) < 1e-6


def test_trace_that_records_gradients(kernel, device, operator, tmp_path):
    """A trace holds the op: a Python function could not be saved."""
    inputs = OPERATORS[operator](SMALL, torch.float32, device).require_grad()
    function = getattr(kernel, operator)
    path = str(tmp_path / "trace.pt")
    torch.jit.trace(lambda *args: function(*args) * 2, inputs.args).save(path)
    traced = torch.jit.load(path)
    assert torch.equal(traced(*inputs.args), function(*inputs.args) * 2)
    traced(*inputs.args).sum().backward()
    assert all(tensor.grad.any() for tensor in inputs.differentiable())


# ----------------------------------------------------------------------- calls of the op by others


def test_transforms_of_an_exported_program(kernel, device, operator):
    """It calls the op itself, where a transform is computed or refused, never ignored."""
    module, args = module_and_inputs(kernel, operator, device)
    with torch.no_grad():
        run = torch.export.export(module, args).module()
    value, *rest = args
    ones = torch.ones_like(value)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(value, ones), *rest)).tangent
    expected = torch.func.jvp(lambda value: module(value, *rest), (value,), (ones,))[1]
    assert relative_error(tangent.detach(), expected.detach().double()) < 1e-5
    with pytest.raises(NotImplementedError, match="under a transform of torch.func"):
        torch.func.jvp(lambda value: run(value, *rest), (value,), (ones,))
    with pytest.raises(NotImplementedError, match="under a transform of torch.func"):
        torch.func.grad(lambda value: run(value, *rest).sum())(value)
    many = torch.stack([value, value * 2])
    outputs = torch.vmap(lambda value: run(value, *rest))(many)
    for output, value in zip(outputs, many):
        assert torch.allclose(output, run(value, *rest), atol=1e-6)


# ------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    "options, corners", [({}, 4), ({"method": "nearest"}, 1), ({"points_per_level": (3, 1)}, 4)]
)
def test_counted_operations(kernel, device, operator, options, corners):
    case = Case("flops", **options)
    inputs = OPERATORS[operator](case, torch.float32, device).require_grad()
    with FlopCounterMode(display=False) as counter:
        output = getattr(kernel, operator)(*inputs.args, **inputs.options)
        forward = counter.get_total_flops()
        output.backward(inputs.grad_output)
    samples = case.batch * case.queries * case.heads * sum(case.numbers_of_points)
    assert forward == 2 * corners * samples * case.channels
    assert counter.get_total_flops() == 3 * forward


# ------------------------------------------------------------------------------------- CUDA graphs


def test_cuda_graph(kernel, operator):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    make, op = OPERATORS[operator], getattr(ops(kernel), f"{operator}_backward")
    inputs = make(SMALL, torch.float32, "cuda")
    function = getattr(kernel, operator)
    function(*inputs.args)
    op(*backward_args(operator, inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs.args)
        grads = op(*backward_args(operator, inputs))
    inputs.value.copy_(make(SMALL, torch.float32, "cuda", seed=5).value)
    graph.replay()
    assert torch.equal(output, function(*inputs.args))
    for a, b in zip(grads, op(*backward_args(operator, inputs))):
        assert relative_error(a, b.double()) < 1e-6


def test_cuda_graph_of_a_training_step(kernel, operator):
    """Through autograd: warm up on a side stream, capture, replay with other values."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    inputs = OPERATORS[operator](SMALL, torch.float32, "cuda").require_grad()
    step = training_step(kernel, operator, {})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(step(*inputs.args), inputs.differentiable())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(step(*inputs.args), inputs.differentiable())
    other = OPERATORS[operator](SMALL, torch.float32, "cuda", seed=5)
    with torch.no_grad():
        for tensor, values in zip(inputs.differentiable(), other.differentiable()):
            tensor.copy_(values)
    graph.replay()
    expected = torch.autograd.grad(step(*inputs.args), inputs.differentiable())
    for a, b in zip(grads, expected):
        assert relative_error(a, b.double()) < 1e-6
