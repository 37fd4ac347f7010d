"""The conventions of projects that bring an extension or an eager function of their own.

Each is written down here in a small package that is made for the test.
"""

import importlib
import sys
import textwrap
import threading

import pytest
import torch
from cases import Case, assert_close, make_inputs

CASE = Case("conventions", ((6, 9), (4, 3)), queries=7, heads=2, channels=8)
DTYPES = [torch.float64, torch.float32]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that writes files of packages, which are forgotten after the test."""
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / (name.replace("__DOT__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    yield write
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(autouse=True)
def fresh(kernel):
    """What one test has loaded of an extension is not there for the next."""
    kernel.integrations.extensions._load.cache_clear()


def check_step(kernel, function, dtype, device, case=CASE):
    """Forward and gradients of a function of value, locations and weights, and of the inputs."""
    inputs = make_inputs(case, dtype, device).require_grad()
    reference = inputs.double().require_grad()
    expected = kernel.reference.ms_deform_attn(*reference.args, **reference.options)
    output = function(inputs)
    assert_close(output, expected, "output")
    grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    expected_grads = torch.autograd.grad(
        expected, reference.differentiable(), reference.grad_output
    )
    for name, grad, wanted in zip(inputs.gradient_names(), grads, expected_grads):
        assert_close(grad, wanted, name)


# -------------------------------------------------------------------------------------- extensions

RETURNS_GRADIENTS = """
import torch
from torch.autograd.function import once_differentiable
{imports}

class Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return {extension}.ms_deform_attn_forward(
            value, shapes, starts, locations, weights, ctx.im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_value, grad_locations, grad_weights = {extension}.ms_deform_attn_backward(
            *ctx.saved_tensors, grad_output, ctx.im2col_step)
        return grad_value, None, None, grad_locations, grad_weights, None
"""
WRITES_GRADIENTS = """
import torch
from mmcv.utils import load_ext

extension = load_ext("_ext", ["ms_deform_attn_backward", "ms_deform_attn_forward"])

class Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return extension.ms_deform_attn_forward(
            value, shapes, starts, locations, weights, im2col_step=ctx.im2col_step)

    @staticmethod
    def backward(ctx, grad_output):
        value, shapes, starts, locations, weights = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (value, locations, weights)]
        nothing = extension.ms_deform_attn_backward(
            value, shapes, starts, locations, weights, grad_output.contiguous(), *grads,
            im2col_step=ctx.im2col_step)
        assert nothing is None
        return grads[0], None, None, grads[1], grads[2], None
"""
MMCV = {
    "mmcv__DOT____init__": "",
    "mmcv__DOT__utils": """
        import importlib

        def load_ext(name, functions):
            extension = importlib.import_module("mmcv." + name)
            for function in functions:
                assert hasattr(extension, function), f"{function} miss in module {name}"
            return extension
        """,
    "mmcv__DOT__sampling": WRITES_GRADIENTS,
}
MMCV_EXTENSION = """
def nms(): return "mmcv's own"
def ms_deform_attn_forward(*args): raise AssertionError
def ms_deform_attn_backward(*args): raise AssertionError
"""
PROJECTS = {
    "Deformable-DETR": (
        {
            "ops": RETURNS_GRADIENTS.format(
                imports="import MultiScaleDeformableAttention as MSDA", extension="MSDA"
            )
        },
        "ops",
    ),
    "GroundingDINO": (
        {
            "groundingdino__DOT____init__": "",
            "groundingdino__DOT__attention": RETURNS_GRADIENTS.format(
                imports="from groundingdino import _C", extension="_C"
            ),
        },
        "groundingdino.attention",
    ),
    "detrex": (
        {
            "detrex__DOT____init__": "from . import layers",
            "detrex__DOT__layers": RETURNS_GRADIENTS.format(
                imports="import detrex._C as _C", extension="_C"
            ),
        },
        "detrex.layers",
    ),
    "mmcv without its extension": (MMCV, "mmcv.sampling"),
    "mmcv": ({**MMCV, "mmcv__DOT___ext": MMCV_EXTENSION}, "mmcv.sampling"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_on_this_kernel(kernel, project, device, name, dtype):
    files, module = PROJECTS[name]
    project(**files)
    with kernel.integrations.replace_extensions():
        sample = importlib.import_module(module).Sample
        check_step(kernel, lambda inputs: sample.apply(*inputs.args, 64), dtype, device)


@pytest.mark.parametrize("before", [False, True], ids=["imported_after", "imported_before"])
def test_only_two_functions_of_mmcv_are_replaced(kernel, project, before):
    project(**PROJECTS["mmcv"][0])
    if before:
        importlib.import_module("mmcv._ext")
    with kernel.integrations.replace_extensions() as replaced:
        names = ["mmcv._ext"] if not before else ["mmcv._ext.ms_deform_attn_forward",
                                                  "mmcv._ext.ms_deform_attn_backward"]  # fmt: skip
        assert replaced.names[-len(names) :] == names
        extension = importlib.import_module("mmcv.utils").load_ext("_ext", ["nms"])
        assert extension.nms() == "mmcv's own"
        assert extension.ms_deform_attn_forward is kernel.ms_deform_attn_forward
    extension = importlib.import_module("mmcv._ext")
    assert extension.nms() == "mmcv's own"
    with pytest.raises(AssertionError):
        extension.ms_deform_attn_forward()


def test_what_an_extension_lacks_is_told(kernel, project):
    project(**MMCV)
    with kernel.integrations.replace_extensions():
        extension = importlib.import_module("mmcv._ext")
        with pytest.raises(AttributeError, match="mmcv._ext has no nms: the extension is not inst"):
            extension.nms  # noqa: B018
        with pytest.raises(AssertionError, match="nms miss in module _ext"):
            importlib.import_module("mmcv.utils").load_ext("_ext", ["nms"])


def test_refuses_functions_that_someone_has_bound(kernel, project):
    project(
        MultiScaleDeformableAttention=MMCV_EXTENSION,
        holder="from MultiScaleDeformableAttention import ms_deform_attn_backward as backward",
    )
    importlib.import_module("holder")
    with pytest.raises(RuntimeError, match="holder has imported ms_deform_attn_backward from Mult"):
        kernel.integrations.replace_extensions()
    assert "groundingdino._C" not in sys.modules, "nothing is replaced by halves"


def test_this_kernel_by_hand_first(kernel, project):
    sys.modules["MultiScaleDeformableAttention"] = kernel
    with kernel.integrations.replace_extensions():
        pass
    assert kernel.ms_deform_attn_backward.__module__.endswith("functional")


def test_replaced_until_the_last_has_undone(kernel, project):
    first = kernel.integrations.replace_extensions()
    assert "MultiScaleDeformableAttention" in repr(first) and "replaced" in repr(first)
    second = kernel.integrations.replace_extensions()
    first.undo()
    first.undo()
    assert "undone" in repr(first)
    importlib.import_module("MultiScaleDeformableAttention")
    second.undo()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("MultiScaleDeformableAttention")


def test_nested_with_other_integrations(kernel, project):
    """In any order, and each puts back its own."""
    project(functions=FUNCTIONS)
    module = importlib.import_module("functions")
    own = module.deformable_attention_core_func
    outer = kernel.integrations.replace_extensions()
    with kernel.integrations.replace_function(module, "deformable_attention_core_func"):
        inner = kernel.integrations.replace_extensions()
        outer.undo()
        extension = importlib.import_module("mmcv._ext")
        assert extension.ms_deform_attn_forward is kernel.ms_deform_attn_forward
        assert module.deformable_attention_core_func is not own
    assert module.deformable_attention_core_func is own
    assert "mmcv._ext" in sys.modules
    inner.undo()
    assert "mmcv._ext" not in sys.modules


def test_from_several_threads(kernel, project):
    failed = []

    def work():
        try:
            for _ in range(50):
                with kernel.integrations.replace_extensions():
                    extension = importlib.import_module("detrex._C")
                    assert extension.ms_deform_attn_forward is kernel.ms_deform_attn_forward
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert "detrex._C" not in sys.modules


@pytest.mark.parametrize("by_name", [False, True], ids=["by_position", "by_name"])
def test_gradients_are_written(kernel, device, by_name):
    backward = kernel.integrations.extensions.ms_deform_attn_backward
    inputs = make_inputs(CASE, torch.float32, device)
    expected = kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output)
    given = [torch.full_like(x, 7) for x in inputs.differentiable()]
    names = ("grad_value", "grad_sampling_loc", "grad_attn_weight")
    if by_name:
        backward(*inputs.args, inputs.grad_output, **dict(zip(names, given)), im2col_step=64)
    else:
        backward(*inputs.args, inputs.grad_output, *given, 64)
    for grad, wanted in zip(given, expected):
        assert_close(grad, wanted.double(), "gradient")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda grads: (grads[:2], {}), TypeError, "got 8 arguments, expected 6 or 7, or 9 or 10"),
        (lambda grads: ((), {"grad_value": grads[0]}), TypeError, "got some of grad_value"),
        (
            lambda grads: (grads, {"grad_value": grads[0]}),
            TypeError,
            "by position and by name",
        ),
        (
            lambda grads: ((grads[0][:1], *grads[1:]), {}),
            RuntimeError,
            r"grad_value has shape \(1, .*\), expected \(2, ",
        ),
    ],
    ids=["two_gradients", "one_by_name", "twice", "shape"],
)
def test_refuses_gradients_that_do_not_fit(kernel, change, error, message):
    inputs = make_inputs(CASE, torch.float32)
    grads = tuple(torch.zeros_like(x) for x in inputs.differentiable())
    args, kwargs = change(grads)
    with pytest.raises(error, match=message):
        kernel.integrations.extensions.ms_deform_attn_backward(
            *inputs.args, inputs.grad_output, *args, **kwargs
        )


@pytest.mark.kernels_ci
def test_names_of_arguments(kernel, device):
    """Version 1's, the callers' and mmcv's."""
    inputs = make_inputs(CASE, torch.float32, device)
    expected = kernel.ms_deform_attn(*inputs.args)
    for names in (
        ("value", "spatial_shapes", "level_start_index", "sampling_loc", "attn_weight"),
        ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"),
        ("value", "value_spatial_shapes", "value_level_start_index", "sampling_locations",
         "attention_weights"),
    ):  # fmt: skip
        kwargs = dict(zip(names, inputs.args))
        assert torch.equal(kernel.ms_deform_attn_forward(**kwargs, im2col_step=64), expected)
        grads = kernel.ms_deform_attn_backward(**kwargs, grad_output=inputs.grad_output)
        assert [grad.shape for grad in grads] == [x.shape for x in inputs.differentiable()]
    with pytest.raises(TypeError, match="got sampling_locations and sampling_loc, which are one"):
        kernel.ms_deform_attn_forward(
            *inputs.args[:3], sampling_loc=1, sampling_locations=1, attn_weight=1
        )


# --------------------------------------------------------------------------------------- functions

FUNCTIONS = """
import functools

def deformable_attention_core_func(
    value, value_spatial_shapes, sampling_locations, attention_weights
):
    raise AssertionError("RT-DETR's own")

def deformable_attention_core_func_v2(
    value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list,
    method="default",
):
    raise AssertionError("RT-DETRv2's and D-FINE's own")

def ms_deform_attn_core_pytorch(
    value, value_spatial_shapes, sampling_locations, attention_weights,
    value_spatial_shapes_hw=None,
):
    raise AssertionError("RF-DETR's own")

def other(value, shapes):
    pass

class Attention:
    def __init__(self, method):
        self.core = functools.partial(deformable_attention_core_func_v2, method=method)
"""
POINTS = Case("points", CASE.shapes, queries=7, heads=2, channels=8, points_per_level=(3, 2))


def levels_apart(value):
    """A tuple of the levels, (batch, heads, channels, pixels) each."""
    return value.permute(0, 2, 3, 1).split([h * w for h, w in CASE.shapes], -1)


CALLS = {
    "RT-DETR": (
        "deformable_attention_core_func",
        CASE,
        lambda call, value, *points: call(value, list(CASE.shapes), *points),
    ),
    "RT-DETRv2": (
        "deformable_attention_core_func_v2",
        POINTS,
        lambda call, value, *points: call(value, [list(x) for x in CASE.shapes], *points, [3, 2]),
    ),
    "D-FINE": (
        "deformable_attention_core_func_v2",
        POINTS,
        lambda call, value, *points: call(levels_apart(value), list(CASE.shapes), *points, (3, 2)),
    ),
    "LW-DETR": (
        "ms_deform_attn_core_pytorch",
        CASE,
        lambda call, value, locations, weights: call(
            value.permute(0, 2, 3, 1).contiguous(),
            torch.tensor(CASE.shapes, device=value.device),
            locations,
            weights.flatten(3),
        ),
    ),
    "RF-DETR": (
        "ms_deform_attn_core_pytorch",
        CASE,
        lambda call, value, locations, weights: call(
            value.permute(0, 2, 3, 1),
            None,
            locations,
            weights.flatten(3),
            value_spatial_shapes_hw=list(CASE.shapes),
        ),
    ),
    "Deformable-DETR": (
        "ms_deform_attn_core_pytorch",
        CASE,
        lambda call, value, *points: call(
            value, torch.tensor(CASE.shapes, device=value.device), *points
        ),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("project_name", CALLS)
def test_a_function_on_this_kernel(kernel, project, device, project_name, dtype):
    name, case, call = CALLS[project_name]
    project(functions=FUNCTIONS)
    module = importlib.import_module("functions")
    with kernel.integrations.replace_function("functions", name) as replaced:
        assert replaced.names == [f"functions.{name}"]

        def sample(inputs):
            return call(getattr(module, name), inputs.value, *inputs.args[3:])

        check_step(kernel, sample, dtype, device, case)
    with pytest.raises(AssertionError, match="own"):
        sample(make_inputs(case, dtype, device))


def test_discrete_in_a_module_that_keeps_the_function(kernel, project, device):
    project(functions=FUNCTIONS)
    module = importlib.import_module("functions")
    case = Case("discrete", CASE.shapes, queries=7, channels=8, points_per_level=(3, 2),
                method="nearest")  # fmt: skip
    inputs = make_inputs(case, torch.float32, device)
    replaced = kernel.integrations.replace_function(module, "deformable_attention_core_func_v2")
    attention = module.Attention("discrete")
    output = attention.core(inputs.value, list(case.shapes), *inputs.args[3:], [3, 2])
    assert torch.equal(output, kernel.ms_deform_attn(*inputs.args, **inputs.options))
    replaced.undo()


@pytest.mark.parametrize(
    ("module", "name", "error", "message"),
    [
        ("not_there", "f", ModuleNotFoundError, "not_there"),
        ("functions", "not_there", ValueError, "functions has no function not_there"),
        ("functions", "other", ValueError, r"functions.other takes \(value, shapes\), expected on"),
    ],
    ids=["module", "function", "arguments"],
)
def test_refuses_functions(kernel, project, module, name, error, message):
    project(functions=FUNCTIONS)
    with pytest.raises(error, match=message):
        kernel.integrations.replace_function(module, name)


def test_sizes_of_other_pixels_are_refused(kernel, device):
    inputs = make_inputs(CASE, torch.float32, device)
    with pytest.raises(ValueError, match="value has 66 pixels, expected 55, which the levels"):
        kernel.ms_deform_attn_list(inputs.value, [(6, 9), (1, 1)], *inputs.args[3:])
