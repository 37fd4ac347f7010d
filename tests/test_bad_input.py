"""Wrong calls: what each is told, and that the next good one gives the right answer."""

import re
from functools import cache
from typing import Callable, NamedTuple

import pytest
import torch
from cases import SMALL, Case, assert_close, make_fused_inputs, make_inputs
from conftest import KERNEL

# What a public function takes. ("im2col_step" is ignored.)
LEVELS = "spatial_shapes level_start_index"
FUNCTIONS = {
    "ms_deform_attn":
        f"value {LEVELS} sampling_locations attention_weights points_per_level method",
    "fused_ms_deform_attn":
        f"value {LEVELS} reference_points sampling_offsets attention_logits points_per_level "
        "method offset_scale",
    "ms_deform_attn_backward":
        f"value {LEVELS} sampling_locations attention_weights grad_output",
}  # fmt: skip
FUSED, BACKWARD = "fused_ms_deform_attn", "ms_deform_attn_backward"

LOCATIONS = "sampling_locations sampling_offsets"
WEIGHTS = "attention_weights attention_logits"
OPERANDS = f"{LOCATIONS} {WEIGHTS} reference_points grad_output"
TENSORS = f"value {LEVELS} {OPERANDS}"

# The expected shapes, of SMALL: value (2, 83, 2, 16), levels of (7, 9) and (4, 5) pixels.
_LOCATIONS = "(batch=2, queries, heads=2, levels=2, points, 2=2)"
_WEIGHTS = "(batch=2, queries=13, heads=2, levels=2, points=4)"
SHAPES = {
    "value": "(batch, sum(h*w), heads, channels)",
    "spatial_shapes": "(levels, 2=2)",
    "level_start_index": "(levels=2)",
    "sampling_locations": _LOCATIONS,
    "sampling_offsets": _LOCATIONS,
    "attention_weights": _WEIGHTS,
    "attention_logits": _WEIGHTS,
    "reference_points": "(batch=2, queries=13, levels or 1, 2 or 4)",
    "grad_output": "(batch=2, queries=13, heads*channels=32)",
}
LISTED = Case("listed", points_per_level=(4, 4))  # 8 points, in one dimension
MANY_LEVELS = Case("many_levels", ((1, 1),) * 33, points_per_level=(1,) * 33)


class Wrong(NamedTuple):
    """What is wrong with one argument, of every function that has it.

    arguments: any of these. change: what becomes of it. has, expected: what the message, which
    names the argument, says that it has and should have; by default the two shapes. only_on: the
    device where it is wrong.
    """

    arguments: str
    what: str
    change: Callable
    has: str = ""
    expected: str = ""
    error: type[Exception] = RuntimeError
    case: Case = SMALL
    only_on: str | None = None


def sliced(*index):
    return lambda tensor: tensor[index]


def to(dtype):
    return lambda tensor: tensor.to(dtype)


def repeated(dim, times=2):
    """Longer in one dimension."""
    return lambda tensor: torch.cat([tensor] * times, dim)


def expanded(*size):
    """Sizes that no memory has to hold."""
    return lambda tensor: tensor[(0,) * tensor.dim()].expand(size)


def constant(x):
    return lambda _: x


def integers(*numbers):
    return lambda tensor: torch.tensor(numbers, device=tensor.device).view(-1, *tensor.shape[1:])


def scalar(tensor):
    return tensor[(0,) * tensor.dim()]


def meta(tensor):
    return tensor.to("meta")


def csr(tensor):
    return tensor.reshape(tensor.shape[0], -1).to_sparse_csr()


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


def nested(tensor):
    return torch.nested.nested_tensor(list(tensor.float()))


FLOATS = "expected Float, Half, BFloat16 or Double"
FLOAT = "expected Float, "  # the dtype of value; an operand may be Half or BFloat16 beside it
DENSE = "expected a dense tensor"
every = slice(None)

WRONG = [
    # no tensor, or none of this kind
    Wrong(TENSORS, "none", constant(None), "None", "expected a tensor"),
    Wrong(TENSORS, "list", constant([1.0]), "'list'", "'Tensor'"),
    Wrong(TENSORS, "number", constant(0.5), "'float'", "'Tensor'"),
    Wrong(TENSORS, "text", constant("text"), "'str'", "'Tensor'"),
    Wrong(TENSORS, "sparse", torch.Tensor.to_sparse, "sparse_coo", DENSE, NotImplementedError),
    Wrong(TENSORS, "csr", csr, "sparse_csr", DENSE, NotImplementedError),
    Wrong(TENSORS, "nested", nested, "nested", DENSE, NotImplementedError),
    Wrong(TENSORS, "quantized", quantized, "torch.quint8", DENSE, NotImplementedError),

    # device
    Wrong(f"{LEVELS} {OPERANDS}", "meta", meta, "on meta", "expected {device}"),
    Wrong(f"{LEVELS} {OPERANDS}", "cpu", torch.Tensor.cpu, "on cpu", "expected {device}",
          only_on="cuda"),

    # dtype
    Wrong("value", "int32", to(torch.int32), "dtype Int,", FLOATS),
    Wrong("value", "uint8", to(torch.uint8), "dtype Byte", FLOATS),
    Wrong("value", "bool", to(torch.bool), "dtype Bool", FLOATS),
    Wrong("value", "float8", to(torch.float8_e4m3fn), "dtype Float8_e4m3fn", FLOATS),
    Wrong("value", "complex64", to(torch.complex64), "dtype ComplexFloat", FLOATS),
    Wrong("value", "complex128", to(torch.complex128), "dtype ComplexDouble", FLOATS),
    Wrong(OPERANDS, "float64", to(torch.float64), "dtype Double", FLOAT),
    Wrong("grad_output", "float16", to(torch.float16), "dtype Half", FLOAT),
    Wrong(OPERANDS, "int64", to(torch.int64), "dtype Long", FLOAT),
    Wrong(OPERANDS, "complex64", to(torch.complex64), "dtype ComplexFloat", FLOAT),
    Wrong(LEVELS, "float32", to(torch.float32), "dtype Float", "expected Long or Int"),
    Wrong(LEVELS, "int16", to(torch.int16), "dtype Short", "expected Long or Int"),
    Wrong(LEVELS, "bool", to(torch.bool), "dtype Bool", "expected Long or Int"),
    Wrong(LEVELS, "complex64", to(torch.complex64), "dtype ComplexFloat", "expected Long or Int"),

    # rank and size
    Wrong(TENSORS, "scalar", scalar),
    Wrong(TENSORS, "fewer_dimensions", sliced(0)),
    Wrong(TENSORS, "more_dimensions", sliced(None)),
    Wrong(OPERANDS, "batch", sliced(slice(1))),
    Wrong(f"{WEIGHTS} reference_points grad_output", "queries", sliced(every, slice(5))),
    Wrong(f"{LOCATIONS} {WEIGHTS}", "heads", repeated(2)),
    Wrong(f"{LOCATIONS} {WEIGHTS}", "levels", repeated(3)),
    Wrong(f"{LOCATIONS} {WEIGHTS}", "no_levels", lambda tensor: tensor.flatten(3, 4)),
    Wrong(WEIGHTS, "points", sliced(..., slice(3))),
    Wrong(LOCATIONS, "coordinates", sliced(..., slice(1))),
    Wrong("grad_output", "channels", sliced(..., slice(3))),
    Wrong("spatial_shapes", "columns", sliced(every, slice(1))),
    Wrong("level_start_index", "length", sliced(slice(1))),
    Wrong("reference_points", "levels", repeated(2), "4 levels", "expected levels=2 or 1"),
    Wrong("reference_points", "coordinates", repeated(3, 3), "6 coordinates", "2 (x, y) or 4"),

    # sizes that would overflow
    Wrong("value", "pixels", expanded(2, 2**31, 2, 16), "2147483648 pixels", "fewer than 2^31"),
    Wrong("value", "many_heads", expanded(2, 83, 2**28, 1), "268435456 heads", "below 2^28"),
    Wrong("value", "many_channels", expanded(2, 83, 2, 2**27), "134217728 channels", "below 2^28"),
    Wrong("value", "endless_heads", lambda tensor: tensor.new_empty(0, 83, 2**32, 0),
          "4294967296 heads", "below 2^28"),
    Wrong("spatial_shapes", "many_levels", expanded(2**32 + 2, 2), "4294967298 levels",
          "fewer than 2^31"),
    Wrong(LOCATIONS, "many_points", expanded(2, 13, 2, 2, 2**29, 2), "536870912 points in each",
          "fewer than 2^30"),
    Wrong(LOCATIONS, "endless_points", expanded(2, 0, 2, 2, 2**62, 2), f"{2**62} points in each",
          "fewer than 2^30"),
    Wrong("reference_points", "many_levels", expanded(2, 13, 2**32 + 2, 2), "4294967298 levels",
          "expected levels=2 or 1"),

    # level metadata; a GPU's is never read back (test_memory.py)
    Wrong("spatial_shapes", "sum", integers(7, 9, 4, 4), "sums to 79", "value.size(1)=83",
          only_on="cpu"),
    Wrong("spatial_shapes", "too_large", integers(7, 9, 4, 6), "4 * 6", "expected at most 20",
          only_on="cpu"),
    Wrong("spatial_shapes", "negative", integers(7, 9, -4, -5), "(-4, -5)", "expected a positive",
          only_on="cpu"),
    Wrong("spatial_shapes", "zero", integers(7, 9, 0, 5), "(0, 5)", "expected a positive",
          only_on="cpu"),
    Wrong("spatial_shapes", "huge", integers(2**62, 2**62, 4, 5), f"{2**62} * {2**62}",
          "expected at most 83", only_on="cpu"),
    Wrong("level_start_index", "negative", integers(-1, 63), "-1 for level 0",
          "expected at least 0", only_on="cpu"),
    Wrong("level_start_index", "too_large", integers(0, 83), "83 for level 1",
          "less than value.size(1)=83", only_on="cpu"),
    Wrong("level_start_index", "huge", integers(0, 2**63 - 1), f"{2**63 - 1} for level 1",
          "less than value.size(1)=83", only_on="cpu"),
    Wrong("level_start_index", "overlap", integers(0, 10), "10 for level 1",
          "expected no overlap with level 0", only_on="cpu"),

    # options
    Wrong("points_per_level", "number", constant(4), "'int'", "List[int]"),
    Wrong("points_per_level", "fractions", constant([4.5, 3.5]), "[4.5, 3.5]", "List[int]"),
    Wrong("points_per_level", "sum", constant([3, 4]), "sums to 7", "expected 8", case=LISTED),
    Wrong("points_per_level", "shorter", constant([8]), "1 numbers", "levels=2", case=LISTED),
    Wrong("points_per_level", "longer", constant([3, 4, 1]), "3 numbers", "levels=2", case=LISTED),
    Wrong("points_per_level", "negative", constant([-1, 9]), "-1 for level 0",
          "expected at least 0", case=LISTED),
    Wrong("points_per_level", "too_large", constant([9, -1]), "9 for level 0", "at most 8",
          case=LISTED),
    Wrong("points_per_level", "huge", constant([2**62, 2**62]), f"{2**62} for level 0",
          "at most 8", case=LISTED),
    Wrong("points_per_level", "many_unequal", constant([2, 0] + [1] * 31), "33 levels",
          "expected at most 32", case=MANY_LEVELS),
    Wrong(LOCATIONS, "levels_beside_a_list", lambda tensor: tensor.unflatten(3, (2, 4)),
          expected="(batch=2, queries, heads=2, points, 2=2)", case=LISTED),
    Wrong("method", "discrete", constant("discrete"), "'discrete'", "expected 'bilinear' or",
          ValueError),
    Wrong("method", "none", constant(None), "None", "expected 'bilinear' or", ValueError),
    Wrong("offset_scale", "text", constant("0.5"), "'str'", "'float'"),
]  # fmt: skip

CALLS = {
    f"{function}-{argument}-{wrong.what}": (function, argument, wrong)
    for wrong in WRONG
    for function, parameters in FUNCTIONS.items()
    for argument in wrong.arguments.split()
    if argument in parameters.split()
    if wrong.case == SMALL or function != BACKWARD  # which has no options
}


def inputs_of(function, case, device):
    make = make_fused_inputs if function == FUSED else make_inputs
    return make(case, torch.float32, device)


def call(kernel, function, inputs):
    if function == BACKWARD:
        return kernel.ms_deform_attn_backward(*inputs.args, inputs.grad_output)
    return getattr(kernel, function)(*inputs.args, **inputs.options)


def all_results(kernel, function, inputs):
    """Also the gradients."""
    output = call(kernel, function, inputs)
    return [output, *torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)]


@cache
def right_answer(reference, function, device):
    inputs = inputs_of(function, SMALL, device).double().require_grad()
    if function == BACKWARD:
        return all_results(reference, "ms_deform_attn", inputs)[1:]
    return all_results(reference, function, inputs)


def check_a_good_call(kernel, function, device):
    inputs = inputs_of(function, SMALL, device)
    if function == BACKWARD:
        results = call(kernel, function, inputs)
    else:
        results = all_results(kernel, function, inputs.require_grad())
    for result, expected in zip(results, right_answer(kernel.reference, function, device)):
        assert_close(result, expected, "a result afterwards")


@pytest.mark.kernels_ci
@pytest.mark.filterwarnings("ignore")  # of torch, that nested, quantized and csr tensors are young
@pytest.mark.parametrize("name", CALLS)
def test_wrong_call(kernel, device, name):
    function, argument, wrong = CALLS[name]
    if wrong.only_on not in (None, device):
        pytest.skip(f"wrong on {wrong.only_on} only, not on {device}")
    on = "cuda:0" if device == "cuda" else device
    for requires_grad in (False, True):
        inputs = inputs_of(function, wrong.case, device)
        if requires_grad:
            inputs.require_grad()
        changed = wrong.change(getattr(inputs, argument, None))
        if hasattr(inputs, argument):
            setattr(inputs, argument, changed)
        else:
            inputs.options = inputs.options | {argument: changed}
        with pytest.raises(wrong.error) as error:
            call(kernel, function, inputs)
        assert type(error.value) is wrong.error
        message = str(error.value)
        assert re.search(rf"\b{argument} (has|is|sums)\b|argument '{argument}'", message), message
        has = wrong.has or f"shape ({', '.join(map(str, changed.shape))})"
        expected = wrong.expected or f"expected {SHAPES[argument]}"
        assert has in message and expected.format(device=on) in message, message
        if kernel is not KERNEL and device == "cpu":  # the other implementations say the same
            with pytest.raises(wrong.error) as native:
                call(KERNEL, function, inputs)
            assert (
                str(native.value).replace(KERNEL.native.ops.name, kernel.native.ops.name) == message
            )
    check_a_good_call(kernel, function, device)


def test_the_table_is_long_enough():
    assert len(CALLS) >= 60


def test_all_on_meta_gives_the_shape(kernel, operator):
    inputs = inputs_of(operator, SMALL, "meta")
    output = getattr(kernel, operator)(*inputs.args)
    assert output.shape == (2, 13, 32) and output.device.type == "meta"
