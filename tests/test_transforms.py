"""Derivatives of every order and kind, vmap, checkpointing, autocast: against the eager definition.

Both operators, in eager mode and, where torch.func derives, compiled. First derivatives of every
case and dtype are in test_operator.py and test_fused.py.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import HALF_DTYPES, OPERATORS, SMALL, TOLERANCES, Case, relative_error
from torch.autograd import forward_ad
from torch.autograd import functional as AF
from torch.utils._pytree import tree_leaves

# Small, as Jacobians and Hessians have the square of it.
TINY = Case("tiny", ((3, 4), (2, 2)), batch=1, queries=2, heads=1, channels=2, points=2)
OPTIONS = {
    "bilinear": {},
    "points_per_level": {"points_per_level": (2, 1)},
    "nearest": {"method": "nearest"},
}


def as_function(module, operator, inputs):
    """The operator as a function of its floating-point tensors alone."""

    def function(*tensors):
        replaced = iter(tensors)
        args = [next(replaced) if x.is_floating_point() else x for x in inputs.args]
        return getattr(module, operator)(*args, **inputs.options)

    return function


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def tangents_of(tensors):
    """A direction for each tensor: numbers in [-1, 1] without order or sign."""
    return tuple(
        torch.arange(1, 1 + x.numel(), dtype=torch.float64).square().sin().view(x.shape).to(x)
        for x in tensors
    )


def loss(function):
    """A scalar whose derivatives of every order need those of the operator."""
    return lambda *tensors: function(*tensors).square().sum()


def norm(function):
    """The same of a function with several results."""
    return lambda *tensors: sum(x.square().sum() for x in function(*tensors))


def every(tensors):
    return tuple(range(len(tensors)))


# ---------------------------------------------------------------------------------- with torch.func


def grad(function, x):
    return torch.func.grad(function, every(x))


DERIVATIVES = {
    "grad": lambda f, x: grad(loss(f), x)(*x),
    "vjp": lambda f, x: torch.func.vjp(f, *x)[1](f(*x)),
    "jvp": lambda f, x: torch.func.jvp(f, x, tangents_of(x)),
    "jacrev": lambda f, x: torch.func.jacrev(f, every(x))(*x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f, every(x))(*x),
    "hessian": lambda f, x: torch.func.hessian(loss(f), every(x))(*x),
    "third": lambda f, x: grad(norm(grad(norm(grad(loss(f), x)), x)), x)(*x),
    "jvp_of_grad": lambda f, x: torch.func.jvp(grad(loss(f), x), x, tangents_of(x)),
    "grad_of_jvp": lambda f, x: grad(
        lambda *x: torch.func.jvp(f, x, tangents_of(x))[1].square().sum(), x
    )(*x),
    "vmap_of_grad": lambda f, x: torch.vmap(grad(loss(f), x))(*stacked(x)),
    "grad_of_vmap": lambda f, x: grad(loss(torch.vmap(f)), x)(*stacked(x)),
}
# Compiled, the others take longer than what they add is worth: up to 15 s.
COMPILED = [
    "grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "vmap_of_grad", "grad_of_vmap",
]  # fmt: skip


def stacked(tensors):
    """Three problems."""
    return tuple(torch.stack([x, x * 0.9, x * 1.1]) for x in tensors)


def check(derivative, kernel, operator, inputs, compiled=None, tolerance=1e-11):
    """A derivative of the operator against that of its eager definition.

    compiled: how torch.compile is called, if it is.
    """
    x = tuple(inputs.differentiable())
    expected = derivative(as_function(kernel.reference, operator, inputs), x)
    function = as_function(kernel, operator, inputs)
    if compiled:
        torch._dynamo.reset()
        actual = torch.compile(lambda *x: derivative(function, x), **compiled)(*x)
    else:
        actual = derivative(function, x)
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    assert len(actual) == len(expected)
    assert any(b is not None and b.any() for b in expected), "zeros would say nothing"
    for a, b in zip(actual, expected):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_torch_func(kernel, device, operator, name, options):
    case = replace(TINY, **OPTIONS[options])
    inputs = OPERATORS[operator](case, torch.float64, device)
    check(DERIVATIVES[name], kernel, operator, inputs)


def each(names, slow, of_both):
    """Each name with each operator. make test leaves to make test-all the slow names, and, of the
    second operator, which has the same derivatives' code, all but those given."""
    first = next(iter(OPERATORS))
    for operator in OPERATORS:
        for name in names:
            fast = name not in slow and (operator == first or name in of_both)
            yield pytest.param(operator, name, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(
    ("operator", "name"), each(COMPILED, slow=("hessian", "jacfwd"), of_both=("grad", "vjp"))
)
def test_torch_func_compiled(kernel, device, operator, name):
    inputs = OPERATORS[operator](TINY, torch.float64, device)
    # TorchDynamo of torch 2.11 breaks the graph inside of these two, whatever they derive.
    fullgraph = name not in ("jacfwd", "hessian")
    compiled = {"backend": "aot_eager", "fullgraph": fullgraph}
    check(DERIVATIVES[name], kernel, operator, inputs, compiled)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap_of_grad"])
def test_torch_func_of_compiled(kernel, device, operator, name):
    inputs = OPERATORS[operator](TINY, torch.float64, device)

    def derivative(function, x):
        torch._dynamo.reset()
        return DERIVATIVES[name](torch.compile(function, backend="aot_eager"), x)

    check(derivative, kernel, operator, inputs)


class Module(torch.nn.Module):
    """The operator as a module, whose parameter is value."""

    def __init__(self, function, value):
        super().__init__()
        self.function = function
        self.value = torch.nn.Parameter(torch.zeros_like(value))

    def forward(self, *rest):
        return self.function(self.value, *rest)


@pytest.mark.parametrize("compiled", [{}, {"backend": "aot_eager", "fullgraph": True}], ids=str)
def test_functional_call(kernel, device, operator, compiled):
    inputs = OPERATORS[operator](TINY, torch.float64, device)
    x = tuple(inputs.differentiable())

    def derivative(module):
        function = Module(as_function(module, operator, inputs), x[0])

        def called(value, *rest):
            return torch.func.functional_call(function, {"value": value}, rest).square().sum()

        return torch.func.grad(called, every(x))

    actual = derivative(kernel)
    if compiled:
        torch._dynamo.reset()
        actual = torch.compile(actual, **compiled)
    for a, b in zip(actual(*x), derivative(kernel.reference)(*x)):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("compiled", [{}, {"backend": "aot_eager", "fullgraph": True}], ids=str)
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap_of_grad"])
def test_torch_func_of_the_original_names(kernel, device, name, compiled):
    inputs = OPERATORS["ms_deform_attn"](TINY, torch.float64, device)

    class Both:
        """The original's forward, and the eager definition under its name."""

        ms_deform_attn_forward = staticmethod(kernel.ms_deform_attn_forward)
        reference = type("", (), {})
        reference.ms_deform_attn_forward = staticmethod(kernel.reference.ms_deform_attn)

    check(DERIVATIVES[name], Both, "ms_deform_attn_forward", inputs, compiled)


@pytest.mark.parametrize("name", ["grad", "jvp", "third", "vmap_of_grad"])
def test_torch_func_of_the_original_backward(kernel, device, name):
    inputs = OPERATORS["ms_deform_attn"](TINY, torch.float64, device)
    _, shapes, starts, _, _ = inputs.args
    x = (*inputs.differentiable(), inputs.grad_output)

    def backward(value, locations, weights, grad_output):
        args = (value, shapes, starts, locations, weights, grad_output)
        return torch.cat([g.flatten() for g in kernel.ms_deform_attn_backward(*args)])

    def expected(*tensors):
        function = as_function(kernel.reference, "ms_deform_attn", inputs)
        *tensors, grad_output = tensors
        return torch.cat([g.flatten() for g in torch.func.vjp(function, *tensors)[1](grad_output)])

    results = [tree_leaves(DERIVATIVES[name](f, x)) for f in (backward, expected)]
    for actual, wanted in zip(*results):
        assert relative_error(actual, wanted) < 1e-11


# ------------------------------------------------------------------------------ with torch.autograd


def dual(tensors, requires_grad=False):
    tensors = leaves(tensors) if requires_grad else tensors
    return [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents_of(tensors))]


@forward_ad.dual_level()
def forward_mode(f, x):
    return tuple(forward_ad.unpack_dual(f(*dual(x))))


@forward_ad.dual_level()
def forward_mode_without_grad(f, x):
    with torch.no_grad():
        return forward_ad.unpack_dual(f(*dual(x))).tangent


@forward_ad.dual_level()
def forward_mode_of_one_input(f, x):
    (last,) = dual(x[-1:])
    return forward_ad.unpack_dual(f(*x[:-1], last)).tangent


@forward_ad.dual_level()
def forward_over_reverse(f, x):
    inputs = dual(x, requires_grad=True)
    grads = torch.autograd.grad(loss(f)(*inputs), inputs)
    return [forward_ad.unpack_dual(grad).tangent for grad in grads]


@forward_ad.dual_level()
def reverse_over_forward(f, x):
    inputs = dual(x, requires_grad=True)
    tangent = forward_ad.unpack_dual(f(*inputs)).tangent
    return torch.autograd.grad(tangent.square().sum(), inputs, allow_unused=True)


def orders(count):
    """The derivatives of each order up to count, each of the norm of the one before."""

    def derivatives(f, x):
        x, results, value = leaves(x), [], None
        value = loss(f)(*x)
        for _ in range(count):
            grads = torch.autograd.grad(value, x, create_graph=True)
            value = sum(grad.square().sum() for grad in grads)
            results += [grad.detach() for grad in grads]
        return results

    return derivatives


def locations_that_depend_on_value(f, x):
    """Where one input is a function of another, each partial derivative is of that input alone."""
    x = leaves(x)
    inputs = [x[0], x[1] + 0.01 * x[0].sum(), *x[2:]]
    grads = torch.autograd.grad(loss(f)(*inputs), x, create_graph=True)
    seconds = torch.autograd.grad(norm(lambda: grads)(), x, create_graph=True)
    return torch.autograd.grad(norm(lambda: seconds)(), x)


def batched_gradients(create_graph):
    def gradients(f, x):
        x = leaves(x)
        output = f(*x)
        (many,) = tangents_of([output.expand(3, *output.shape)])
        grads = torch.autograd.grad(
            output, x, many, is_grads_batched=True, create_graph=create_graph
        )
        return [grad.detach() for grad in grads]

    return gradients


def with_saved_tensors_elsewhere(f, x):
    x = leaves(x)
    hooks = (lambda t: (t.detach().clone(), t.requires_grad), lambda p: p[0].requires_grad_(p[1]))
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        value = loss(f)(*x)
    return torch.autograd.grad(value, x)


def one_gradient_at_a_time(f, x):
    results = []
    for i in range(len(x)):
        inputs = [t.clone().requires_grad_(i == j) for j, t in enumerate(x)]
        (grad,) = torch.autograd.grad(loss(f)(*inputs), inputs[i], create_graph=True)
        results += [grad.detach(), torch.autograd.grad(grad.square().sum(), inputs[i])[0]]
    return results


AUTOGRAD = {
    "forward_mode": forward_mode,
    "forward_mode_without_grad": forward_mode_without_grad,
    "forward_mode_of_one_input": forward_mode_of_one_input,
    "forward_over_reverse": forward_over_reverse,
    "fourth_order": orders(4),
    "hvp": lambda f, x: AF.hvp(loss(f), x, tangents_of(x)),
    "jvp": lambda f, x: AF.jvp(f, x, tangents_of(x)),
    "jacobian_forward": lambda f, x: AF.jacobian(f, x, strategy="forward-mode", vectorize=True),
    "jacobian_vectorized": lambda f, x: AF.jacobian(f, x, vectorize=True),
    "hessian": lambda f, x: AF.hessian(
        loss(f), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "linearize": lambda f, x: torch.func.linearize(f, *x)[1](*tangents_of(x)),
    "locations_that_depend_on_value": locations_that_depend_on_value,
    "batched_gradients": batched_gradients(False),
    "batched_gradients_recorded": batched_gradients(True),
    "with_saved_tensors_elsewhere": with_saved_tensors_elsewhere,
    "one_gradient_at_a_time": one_gradient_at_a_time,
}


@pytest.mark.parametrize(
    ("operator", "name"), each(AUTOGRAD, slow=(), of_both=AUTOGRAD.keys() - {"linearize"})
)
def test_autograd(kernel, device, operator, name):
    inputs = OPERATORS[operator](TINY, torch.float64, device)
    check(AUTOGRAD[name], kernel, operator, inputs)


def test_reverse_over_forward_mode(kernel, device, operator):
    """Against the same derivative by torch.func: torch's softmax fails at it in eager mode."""
    inputs = OPERATORS[operator](TINY, torch.float64, device)
    x = tuple(inputs.differentiable())
    actual = reverse_over_forward(as_function(kernel, operator, inputs), x)
    expected = DERIVATIVES["grad_of_jvp"](as_function(kernel.reference, operator, inputs), x)
    for a, b in zip(actual, expected):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("name", ["jvp", "second"])
def test_derivatives_of_each_dtype(kernel, device, operator, name, dtype):
    """Against float64, of the stored inputs."""
    results = []
    for module, inputs in (
        (kernel, OPERATORS[operator](TINY, dtype, device)),
        (kernel.reference, OPERATORS[operator](TINY, dtype, device).double()),
    ):
        function, x = as_function(module, operator, inputs), tuple(inputs.differentiable())
        if name == "jvp":
            tangents = [t.to(dtype).to(a) for t, a in zip(tangents_of(x), x)]
            results.append([torch.func.jvp(function, x, tuple(tangents))[1]])
        else:
            # The gradients of the dot products of the gradients with directions.
            x = leaves(x)
            grads = torch.autograd.grad(function(*x), x, inputs.grad_output, create_graph=True)
            directions = [t.to(dtype).to(a) for t, a in zip(tangents_of(x), x)]
            results.append(torch.autograd.grad(grads, x, directions))
    for actual, expected in zip(*results):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= TOLERANCES[dtype]


def test_a_tensor_that_outlived_its_transform(kernel, device, operator):
    """Its gradient is that of the tensor it was made of."""
    results = []
    for module in (kernel, kernel.reference):
        inputs = OPERATORS[operator](TINY, torch.float64, device)
        value, *others = leaves(inputs.differentiable())
        kept = []
        torch.func.grad(lambda value: kept.append(value) or value.sum())(value)  # noqa: B023
        output = as_function(module, operator, inputs)(*kept, *others)
        results.append(torch.autograd.grad(output.square().sum(), [value, *others]))
    for actual, expected in zip(*results):
        assert relative_error(actual, expected) < 1e-11


def test_inference_mode(kernel, device, operator):
    inputs = OPERATORS[operator](SMALL, torch.float32, device)
    expected = getattr(kernel, operator)(*inputs.args)
    with torch.inference_mode():
        output = getattr(kernel, operator)(*inputs.args)
    assert output.is_inference() and torch.equal(output, expected)


@pytest.mark.parametrize("index", range(3))
def test_what_needs_no_gradient_is_not_asked_for(kernel, device, index):
    """The fused backward can leave out the gradient of the reference points."""
    inputs = OPERATORS["fused_ms_deform_attn"](SMALL, torch.float32, device)
    inputs.differentiable()[index].requires_grad_()
    asked = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "fused_ms_deform_attn_backward" in str(op):
                asked.append(args[10])
            return op(*args, **(kwargs or {}))

    output = kernel.fused_ms_deform_attn(*inputs.args)
    with Calls():
        output.sum().backward()
    assert asked == [index == 1]


# ------------------------------------------------------------------- names that torch may take away


RUN_WITHOUT = """
import operator, sys
import pytest, torch
import torch.autograd.forward_ad
names, *arguments = sys.argv[1:]
taken = []
for name in names.split():
    owner, name = operator.attrgetter(name.rpartition(".")[0])(torch), name.rpartition(".")[2]
    taken.append((owner, name, getattr(owner, name)))
    delattr(owner, name)
import conftest
for attribute in taken:
    setattr(*attribute)  # torch itself uses it
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *arguments]))
"""


@pytest.mark.parametrize(
    "names",
    [
        "_C._AutoDispatchBelowAutograd",
        pytest.param("_C._are_functorch_transforms_active", marks=pytest.mark.slow),
        pytest.param("autograd.forward_ad._current_level", marks=pytest.mark.slow),
        pytest.param("_C._is_tracing _C._functorch.is_dead_tensor_wrapper", marks=pytest.mark.slow),
    ],
)
def test_without_private_names_of_torch(names):
    """Derivatives of all kinds in eager mode, and some calls that are compiled or traced."""
    here = Path(__file__).parent
    tests = [
        f"{here / 'test_transforms.py'}",
        f"{here / 'test_compile.py'}::test_fullgraph_without_inductor",
        f"{here / 'test_compile.py'}::test_trace_that_records_gradients",
        "-k",
        "(bilinear or test_autograd or test_vmap or outlived or test_compile) "
        "and not hessian and not linearize and not third and not fused",
    ]
    run = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT, names, *tests],
        cwd=here, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]


# --------------------------------------------------------------------------------------------- vmap


def problems(operator, device, number=3, dtype=torch.float64):
    """Inputs of several problems, and each tensor stacked over them but the level metadata."""
    each = [OPERATORS[operator](SMALL, dtype, device, seed=seed) for seed in range(number)]
    stacked = [
        torch.stack(tensors) if tensors[0].is_floating_point() else tensors[0]
        for tensors in zip(*(inputs.args for inputs in each))
    ]
    in_dims = tuple(0 if tensor.is_floating_point() else None for tensor in each[0].args)
    return each, stacked, in_dims


def test_vmap_over_problems(kernel, device, operator):
    function = getattr(kernel, operator)
    each, stacked, in_dims = problems(operator, device)
    outputs = torch.func.vmap(function, in_dims)(*stacked)
    for output, inputs in zip(outputs, each):
        assert relative_error(output, function(*inputs.args)) < 1e-12


def test_vmap_with_a_shared_value_and_another_dimension(kernel, device, operator):
    function = getattr(kernel, operator)
    each, stacked, in_dims = problems(operator, device)
    value = each[0].value
    stacked[-1] = stacked[-1].movedim(0, 2)
    outputs = torch.func.vmap(function, (None, *in_dims[1:-1], 2), out_dims=1)(value, *stacked[1:])
    for i, inputs in enumerate(each):
        assert relative_error(outputs[:, i], function(value, *inputs.args[1:])) < 1e-12


def test_gradients_of_vmap(kernel, device, operator):
    function = getattr(kernel, operator)
    each, stacked, in_dims = problems(operator, device)
    expected = []
    for inputs in each:
        output = function(*inputs.require_grad().args)
        expected.append(torch.autograd.grad(output.square().sum(), inputs.differentiable()))
    floating = [tensor.requires_grad_() for tensor in stacked if tensor.is_floating_point()]
    output = torch.func.vmap(function, in_dims)(*stacked)
    grads = torch.autograd.grad(output.square().sum(), floating)
    for grad, wanted in zip(grads, zip(*expected)):
        assert relative_error(grad, torch.stack(wanted)) < 1e-12


def test_vmap_over_no_problems(kernel, device, operator):
    """An empty result of the right shape, as of the eager definition; gradients, too."""
    inputs = OPERATORS[operator](SMALL, torch.float32, device)
    x = [tensor.new_empty(0, *tensor.shape) for tensor in inputs.differentiable()]
    for transform in (torch.vmap, lambda f: torch.vmap(grad(loss(f), x))):
        results = [
            tree_leaves(transform(as_function(module, operator, inputs))(*x))
            for module in (kernel, kernel.reference)
        ]
        for actual, expected in zip(*results):
            assert actual.numel() == 0 and actual.shape == expected.shape


def test_vmap_over_level_metadata_is_refused(kernel, device, operator):
    _, stacked, in_dims = problems(operator, device)
    stacked[1] = stacked[1].expand(3, -1, -1)
    with pytest.raises(RuntimeError, match="spatial_shapes is vmapped"):
        torch.func.vmap(getattr(kernel, operator), (0, 0, *in_dims[2:]))(*stacked)


# ------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(kernel, device, operator, use_reentrant):
    function = getattr(kernel, operator)
    inputs = OPERATORS[operator](SMALL, torch.float64, device).require_grad()
    expected = torch.autograd.grad(function(*inputs.args).square().sum(), inputs.differentiable())
    torch.utils.checkpoint.checkpoint(
        function, *inputs.args, use_reentrant=use_reentrant
    ).square().sum().backward()
    for tensor, wanted in zip(inputs.differentiable(), expected):
        assert relative_error(tensor.grad, wanted) < 1e-12


# ----------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("rest", [torch.float32, "autocast"], ids=str)
def test_autocast_casts_value_and_nothing_else(kernel, device, operator, dtype, rest):
    inputs = OPERATORS[operator](SMALL, torch.float32, device)
    if rest == "autocast":
        for name, tensor in vars(inputs).items():
            if name not in ("value", "options", "grad_output") and tensor.is_floating_point():
                setattr(inputs, name, tensor.to(dtype))
    inputs.require_grad()
    function = getattr(kernel, operator)
    with torch.autocast(device, dtype):
        output = function(*inputs.args)
    assert output.dtype == dtype
    value, *others = inputs.args
    assert torch.equal(output, function(value.to(dtype), *others))
    output.float().sum().backward()
    assert all(tensor.grad.dtype == tensor.dtype for tensor in inputs.differentiable())


def test_autocast_leaves_float64_alone(kernel, device, operator):
    inputs = OPERATORS[operator](SMALL, torch.float64, device)
    with torch.autocast(device, torch.bfloat16):
        assert getattr(kernel, operator)(*inputs.args).dtype == torch.float64


def test_autocast_switched_off(kernel, device, operator):
    inputs = OPERATORS[operator](SMALL, torch.float32, device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert getattr(kernel, operator)(*inputs.args).dtype == torch.float32
