"""Wrong calls: what each is told, and that the next good one gives the right answer."""

from typing import Callable, NamedTuple

import pytest
import torch
from cases import SMALL, Case, assert_close, make_fused_inputs, make_inputs

PLAIN, FUSED, BACKWARD = "ms_deform_attn", "fused_ms_deform_attn", "ms_deform_attn_backward"


class Wrong(NamedTuple):
    """A wrong call, of SMALL's tensors: value (2, 83, 2, 16), two levels of (7, 9) and (4, 5)
    pixels, 13 queries, 4 points.

    change: the argument's name and what becomes of it. parts: of the message, which names the
    argument, what it has and what is expected.
    """

    function: str
    argument: str
    change: Callable
    parts: tuple[str, ...]
    error: type[Exception] = RuntimeError


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
    """Level metadata on the CPU, where it is checked."""
    return lambda tensor: torch.tensor(numbers, device=tensor.device).view(-1, *tensor.shape[1:])


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


def nested(tensor):
    return torch.nested.nested_tensor(list(tensor.float()))


def csr(tensor):
    return tensor.reshape(tensor.shape[0], -1).to_sparse_csr()


def meta(tensor):
    return tensor.to("meta")


FLOATS = "Float, Half, BFloat16 or Double"
DENSE = "expected a dense tensor"
every = slice(None)

WRONG = {
    # value
    "value rank": Wrong(PLAIN, "value", sliced(0), ("(83, 2, 16)", "(batch, sum(h*w)")),
    "value rank 5": Wrong(PLAIN, "value", sliced(None), ("(1, 2, 83, 2, 16)", "(batch, sum(h*w)")),
    "value scalar": Wrong(PLAIN, "value", sliced(0, 0, 0, 0), ("shape ()", "(batch, sum(h*w)")),
    "value int": Wrong(PLAIN, "value", to(torch.int32), ("Int", FLOATS)),
    "value bool": Wrong(PLAIN, "value", to(torch.bool), ("Bool", FLOATS)),
    "value uint8": Wrong(PLAIN, "value", to(torch.uint8), ("Byte", FLOATS)),
    "value float8": Wrong(PLAIN, "value", to(torch.float8_e4m3fn), ("Float8_e4m3fn", FLOATS)),
    "value complex": Wrong(PLAIN, "value", to(torch.complex64), ("ComplexFloat", FLOATS)),
    "value complex double": Wrong(FUSED, "value", to(torch.complex128), ("ComplexDouble", FLOATS)),
    "value pixels": Wrong(
        PLAIN, "value", expanded(2, 2**31, 2, 16), ("2147483648 pixels", "fewer than 2^31")),
    "value heads": Wrong(
        PLAIN, "value", expanded(2, 83, 2**28, 1), ("268435456 heads of 1 channels", "2^28")),
    "value channels": Wrong(
        PLAIN, "value", expanded(2, 83, 2, 2**27), ("2 heads of 134217728 channels", "2^28")),
    "value heads that overflow": Wrong(
        PLAIN, "value", lambda t: t.new_empty(0, 83, 2**32, 0), ("4294967296 heads", "2^28")),
    "value sparse": Wrong(
        PLAIN, "value", torch.Tensor.to_sparse, ("torch.sparse_coo", DENSE), NotImplementedError),
    "value csr": Wrong(PLAIN, "value", csr, ("torch.sparse_csr", DENSE), NotImplementedError),
    "value quantized": Wrong(PLAIN, "value", quantized, ("quint8", DENSE), NotImplementedError),
    "value nested": Wrong(PLAIN, "value", nested, ("nested", DENSE), NotImplementedError),
    "value none": Wrong(PLAIN, "value", constant(None), ("shape (0)", "(batch, sum(h*w)")),
    "value list": Wrong(PLAIN, "value", constant([1.0]), ("'list'", "'Tensor'")),
    "value text": Wrong(FUSED, "value", constant("value"), ("'str'", "'Tensor'")),

    # spatial_shapes
    "shapes rank": Wrong(PLAIN, "spatial_shapes", sliced(0), ("shape (2)", "(levels, 2=2)")),
    "shapes columns": Wrong(
        PLAIN, "spatial_shapes", sliced(every, slice(1)), ("shape (2, 1)", "(levels, 2=2)")),
    "shapes more": Wrong(
        PLAIN, "spatial_shapes", repeated(0), ("level_start_index has shape (2)", "levels=4")),
    "shapes too many": Wrong(
        PLAIN, "spatial_shapes", expanded(2**32 + 2, 2), ("4294967298 levels", "2^31")),
    "shapes float": Wrong(PLAIN, "spatial_shapes", to(torch.float32), ("Float", "Long or Int")),
    "shapes short": Wrong(PLAIN, "spatial_shapes", to(torch.int16), ("Short", "Long or Int")),
    "shapes complex": Wrong(
        FUSED, "spatial_shapes", to(torch.complex64), ("ComplexFloat", "Long or Int")),
    "shapes meta": Wrong(PLAIN, "spatial_shapes", meta, ("on meta", "expected {device}")),
    "shapes sparse": Wrong(PLAIN, "spatial_shapes", torch.Tensor.to_sparse,
                           ("torch.sparse_coo", DENSE), NotImplementedError),
    "shapes tuples": Wrong(PLAIN, "spatial_shapes", constant([(7, 9), (4, 5)]),
                           ("'list'", "'Tensor'")),

    # level_start_index
    "starts rank": Wrong(
        PLAIN, "level_start_index", sliced(None), ("shape (1, 2)", "(levels=2)")),
    "starts length": Wrong(
        PLAIN, "level_start_index", sliced(slice(1)), ("shape (1)", "(levels=2)")),
    "starts float": Wrong(
        FUSED, "level_start_index", to(torch.float64), ("Double", "Long or Int")),
    "starts bool": Wrong(PLAIN, "level_start_index", to(torch.bool), ("Bool", "Long or Int")),
    "starts meta": Wrong(FUSED, "level_start_index", meta, ("on meta", "expected {device}")),
    "starts none": Wrong(PLAIN, "level_start_index", constant(None), ("shape (0)", "(levels=2)")),

    # sampling_locations
    "locations rank": Wrong(PLAIN, "sampling_locations", sliced(0),
                            ("(13, 2, 2, 4, 2)", "(batch=2, queries, heads=2, levels=2")),
    "locations batch": Wrong(
        PLAIN, "sampling_locations", sliced(slice(1)), ("(1, 13, 2, 2, 4, 2)", "batch=2")),
    "locations heads": Wrong(
        PLAIN, "sampling_locations", repeated(2), ("(2, 13, 4, 2, 4, 2)", "heads=2")),
    "locations levels": Wrong(
        PLAIN, "sampling_locations", repeated(3), ("(2, 13, 2, 4, 4, 2)", "levels=2")),
    "locations coordinates": Wrong(
        PLAIN, "sampling_locations", sliced(..., slice(1)), ("(2, 13, 2, 2, 4, 1)", "2=2")),
    "locations dtype": Wrong(
        PLAIN, "sampling_locations", to(torch.float64), ("Double", "Float, the dtype of value")),
    "locations half": Wrong(
        PLAIN, "sampling_locations", to(torch.float16), ("Half", "Float, the dtype of value")),
    "locations int": Wrong(PLAIN, "sampling_locations", to(torch.int64), ("Long", "Float, the")),
    "locations meta": Wrong(PLAIN, "sampling_locations", meta, ("on meta", "expected {device}")),
    "locations sparse": Wrong(PLAIN, "sampling_locations", torch.Tensor.to_sparse,
                              ("torch.sparse_coo", DENSE), NotImplementedError),
    "locations quantized": Wrong(
        PLAIN, "sampling_locations", quantized, ("quint8", DENSE), NotImplementedError),
    "locations number": Wrong(PLAIN, "sampling_locations", constant(0.5), ("'float'", "'Tensor'")),

    # attention_weights
    "weights rank": Wrong(PLAIN, "attention_weights", sliced(..., 0),
                          ("(2, 13, 2, 2)", "(batch=2, queries=13, heads=2, levels=2, points=4)")),
    "weights queries": Wrong(
        PLAIN, "attention_weights", sliced(every, slice(5)), ("(2, 5, 2, 2, 4)", "queries=13")),
    "weights points": Wrong(
        PLAIN, "attention_weights", sliced(..., slice(3)), ("(2, 13, 2, 2, 3)", "points=4")),
    "weights dtype": Wrong(
        PLAIN, "attention_weights", to(torch.float64), ("Double", "Float, the dtype of value")),
    "weights complex": Wrong(
        PLAIN, "attention_weights", to(torch.complex64), ("ComplexFloat", "Float, the dtype")),
    "weights meta": Wrong(PLAIN, "attention_weights", meta, ("on meta", "expected {device}")),
    "weights nested": Wrong(
        PLAIN, "attention_weights", nested, ("nested", DENSE), NotImplementedError),
    "weights none": Wrong(PLAIN, "attention_weights", constant(None), ("shape (0)", "batch=2")),

    # the fused operator's
    "reference rank": Wrong(FUSED, "reference_points", sliced(every, every, 0),
                            ("(2, 13, 2)", "(batch=2, queries=13, levels or 1, 2 or 4)")),
    "reference batch": Wrong(
        FUSED, "reference_points", sliced(slice(1)), ("(1, 13, 2, 2)", "batch=2")),
    "reference queries": Wrong(
        FUSED, "reference_points", sliced(every, slice(5)), ("(2, 5, 2, 2)", "queries=13")),
    "reference levels": Wrong(
        FUSED, "reference_points", repeated(2), ("4 levels", "levels=2 or 1")),
    "reference levels that overflow": Wrong(
        FUSED, "reference_points", expanded(2, 13, 2**32 + 2, 2),
        ("4294967298 levels", "levels=2 or 1")),
    "reference coordinates": Wrong(
        FUSED, "reference_points", repeated(3, 3), ("6 coordinates", "2 (x, y) or 4")),
    "reference dtype": Wrong(
        FUSED, "reference_points", to(torch.float64), ("Double", "Float, the dtype of value")),
    "reference meta": Wrong(FUSED, "reference_points", meta, ("on meta", "expected {device}")),
    "reference none": Wrong(
        FUSED, "reference_points", constant(None), ("shape (0)", "levels or 1")),
    "offsets rank": Wrong(
        FUSED, "sampling_offsets", sliced(0), ("(13, 2, 2, 4, 2)", "(batch=2, queries, heads=2")),
    "offsets dtype": Wrong(
        FUSED, "sampling_offsets", to(torch.bfloat16), ("BFloat16", "Float, the dtype of value")),
    "logits points": Wrong(
        FUSED, "attention_logits", repeated(4), ("(2, 13, 2, 2, 8)", "points=4")),
    "logits int": Wrong(FUSED, "attention_logits", to(torch.int32), ("Int", "Float, the dtype")),

    # options
    "points number": Wrong(PLAIN, "points_per_level", constant(4), ("'int'", "List[int]")),
    "points fractions": Wrong(
        PLAIN, "points_per_level", constant([4.5, 3.5]), ("[4.5, 3.5]", "List[int]")),
    "points without one dimension": Wrong(
        PLAIN, "points_per_level", constant([4, 4]),
        ("sampling_locations has shape (2, 13, 2, 2, 4, 2)", "heads=2, points, 2=2)")),
    "offsets without one dimension": Wrong(
        FUSED, "points_per_level", constant([4, 4]),
        ("sampling_offsets has shape (2, 13, 2, 2, 4, 2)", "heads=2, points, 2=2)")),
    "method discrete": Wrong(
        PLAIN, "method", constant("discrete"), ("'discrete'", "'bilinear' or"), ValueError),
    "method none": Wrong(FUSED, "method", constant(None), ("None", "'bilinear' or"), ValueError),
    "scale text": Wrong(FUSED, "offset_scale", constant("0.5"), ("'str'", "'float'")),

    # grad_output
    "gradient rank": Wrong(
        BACKWARD, "grad_output", sliced(0),
        ("(13, 32)", "(batch=2, queries=13, heads*channels=32)")),
    "gradient queries": Wrong(
        BACKWARD, "grad_output", sliced(every, slice(3)), ("(2, 3, 32)", "queries=13")),
    "gradient channels": Wrong(
        BACKWARD, "grad_output", sliced(..., slice(3)), ("(2, 13, 3)", "heads*channels=32")),
    "gradient dtype": Wrong(
        BACKWARD, "grad_output", to(torch.float64), ("Double", "Float, the dtype of value")),
    "gradient meta": Wrong(BACKWARD, "grad_output", meta, ("on meta", "expected {device}")),
    "gradient sparse": Wrong(BACKWARD, "grad_output", torch.Tensor.to_sparse,
                             ("torch.sparse_coo", DENSE), NotImplementedError),
    "gradient none": Wrong(BACKWARD, "grad_output", constant(None), ("shape (0)", "batch=2")),
}  # fmt: skip

# Level metadata is checked on the CPU. (A GPU's is never read back: test_memory.py.)
WRONG_LEVELS = {
    "sum": Wrong(PLAIN, "spatial_shapes", integers(7, 9, 4, 4), ("79", "value.size(1)=83")),
    "too large": Wrong(PLAIN, "spatial_shapes", integers(7, 9, 4, 6), ("4 * 6", "at most 20")),
    "negative": Wrong(FUSED, "spatial_shapes", integers(7, 9, -4, -5), ("(-4, -5)", "positive")),
    "zero": Wrong(PLAIN, "spatial_shapes", integers(7, 9, 0, 5), ("(0, 5)", "positive")),
    "huge": Wrong(
        PLAIN, "spatial_shapes", integers(2**62, 2**62, 4, 5), (str(2**62), "at most 83")),
    "start negative": Wrong(
        PLAIN, "level_start_index", integers(-1, 63), ("-1", "at least 0 and less than")),
    "start too large": Wrong(
        FUSED, "level_start_index", integers(0, 83), ("83 for level 1", "value.size(1)=83")),
    "start huge": Wrong(PLAIN, "level_start_index", integers(0, 2**63 - 1), (str(2**63 - 1), "83")),
    "overlapping": Wrong(
        PLAIN, "level_start_index", integers(0, 10), ("10 for level 1", "no overlap with level 0")),
}  # fmt: skip

# With one dimension for all points, of which SMALL has 8.
WRONG_POINTS = {
    "sum": ([3, 4], ("sums to 7", "expected 8")),
    "length": ([8], ("1 numbers", "levels=2")),
    "longer": ([3, 4, 1], ("3 numbers", "levels=2")),
    "negative": ([9, -1], ("9 for level 0", "at most 8")),
    "first negative": ([-1, 9], ("-1 for level 0", "at least 0")),
    "huge": ([2**62, 2**62], (str(2**62), "at most 8")),
}


def call(kernel, function, inputs, options):
    arguments = [*inputs.args, *([inputs.grad_output] if function == BACKWARD else [])]
    return getattr(kernel, function)(*arguments, **options)


def good_inputs(function, device):
    make = make_fused_inputs if function == FUSED else make_inputs
    return make(SMALL, torch.float32, device)


def check_wrong(kernel, device, wrong, requires_grad):
    inputs, options = good_inputs(wrong.function, device), {}
    if requires_grad:
        inputs.require_grad()
    if hasattr(inputs, wrong.argument):
        setattr(inputs, wrong.argument, wrong.change(getattr(inputs, wrong.argument)))
    else:
        options[wrong.argument] = wrong.change(None)
    on = "cuda:0" if device == "cuda" else device
    parts = [part.format(device=on) for part in wrong.parts]
    if "has shape" not in parts[0]:
        parts.append(wrong.argument)
    with pytest.raises(wrong.error) as error:
        call(kernel, wrong.function, inputs, options)
    assert type(error.value) is wrong.error
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"

    inputs = good_inputs(PLAIN, device)
    expected = kernel.reference.ms_deform_attn(*inputs.double().args)
    assert_close(kernel.ms_deform_attn(*inputs.args), expected, "output afterwards")


@pytest.mark.kernels_ci
@pytest.mark.filterwarnings("ignore")  # of torch, that nested, quantized and csr tensors are young
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(kernel, device, name, requires_grad):
    check_wrong(kernel, device, WRONG[name], requires_grad)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", WRONG_LEVELS)
def test_wrong_levels(kernel, name):
    check_wrong(kernel, "cpu", WRONG_LEVELS[name], requires_grad=False)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("function", [PLAIN, FUSED])
@pytest.mark.parametrize("name", WRONG_POINTS)
def test_wrong_points_per_level(kernel, device, name, function):
    points_per_level, parts = WRONG_POINTS[name]
    case = Case("listed", points_per_level=(4, 4))
    inputs = (make_fused_inputs if function == FUSED else make_inputs)(case, torch.float32, device)
    with pytest.raises(RuntimeError) as error:
        call(kernel, function, inputs, {"points_per_level": points_per_level})
    for part in ("points_per_level", *parts):
        assert part in str(error.value)


def test_unequal_points_over_too_many_levels(kernel, device):
    case = Case("levels", ((1, 1),) * 33, points_per_level=(1,) * 32 + (2,))
    inputs = make_inputs(case, torch.float32, device)
    with pytest.raises(RuntimeError, match="points_per_level .* 33 levels, expected at most 32"):
        kernel.ms_deform_attn(*inputs.args, **inputs.options)


@pytest.mark.parametrize("name", ["spatial_shapes", "level_start_index", "sampling_locations",
                                  "attention_weights"])  # fmt: skip
def test_tensors_on_different_devices(kernel, name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: there is one device only")
    inputs = make_inputs(SMALL, torch.float32, "cuda")
    setattr(inputs, name, getattr(inputs, name).cpu())
    with pytest.raises(RuntimeError, match=f"{name} is on cpu, expected cuda:0"):
        kernel.ms_deform_attn(*inputs.args)


def test_all_on_meta_gives_the_shape(kernel, operator):
    make = make_fused_inputs if operator == FUSED else make_inputs
    inputs = make(SMALL, torch.float32, "meta")
    output = getattr(kernel, operator)(*inputs.args)
    assert output.shape == (2, 13, 32) and output.device.type == "meta"


def test_the_table_is_not_short():
    assert len(WRONG) + len(WRONG_LEVELS) >= 60
