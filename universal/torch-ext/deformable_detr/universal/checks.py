"""The checks of a call's inputs, with the messages of deformable_detr/inputs.cpp.

Metadata on a CPU is read and checked. That of other devices is not read back, as nothing should
wait for them: there a level that does not fit into value is an empty one.
"""

from typing import Dict, List, NamedTuple, Optional

import torch

# The limits, and their reasons, are those of inputs.h. What only a native GPU kernel cannot do has
# no limit here.
_MAX_PIXELS = 2**31 - 1
_MAX_PIXEL_SIZE = 2**28 - 1
_MAX_LEVELS = 2**31 - 1
_MAX_POINTS = 2**30 - 1
_MAX_SIDE = 2**24
_MAX_UNEQUAL_LEVELS = 32

# As C++ writes them.
_DTYPE_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    """A call, checked. The points of all levels are in one dimension."""

    value: torch.Tensor  # (batch, pixels, heads, channels)
    spatial_shapes: torch.Tensor  # (levels, 2) as (height, width)
    level_start_index: torch.Tensor  # (levels,)
    coordinates: torch.Tensor  # (batch, queries, heads, points, 2): locations, or fused offsets
    weights: torch.Tensor  # (batch, queries, heads, points): attention weights, or fused logits
    counts: List[int]  # the points of each level
    nearest: bool
    reference_points: Optional[torch.Tensor]  # (batch, queries, levels or 1, 2 or 4), fused
    offset_scale: float
    grad_output: Optional[torch.Tensor]  # (batch, queries, heads * channels)
    levels: Optional[list] = None  # those with points, as grid_sample.Level

    @property
    def acc_dtype(self) -> torch.dtype:
        """Of weights and sums."""
        return torch.float64 if self.value.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in (self.value.shape[0], self.value.shape[2], self.value.shape[3]) or (
            0 in self.weights.shape
        )


def check(
    value,
    spatial_shapes,
    level_start_index,
    coordinates,
    weights,
    points_per_level=None,
    nearest=False,
    fused=(),
    grad_outputs=(),
) -> Inputs:
    """Raises RuntimeError with the argument's name, what it has, and what is expected.

    Args:
        fused: (reference_points, offset_scale), of a fused call.
        grad_outputs: (grad_output,), of a backward.
    """
    tensors = (value, spatial_shapes, level_start_index, coordinates, weights)
    others = (*fused[:1], *grad_outputs)
    for tensor in (*tensors, *others):
        if tensor is None or tensor.layout != torch.strided or _is_special(tensor):
            raise RuntimeError("no dense tensor")  # autograd.py says which, and what it is
    # All but levels are told by this, and it takes a quarter of the time to compare it.
    key = (
        None if points_per_level is None else tuple(points_per_level), len(fused),
        *[(tensor.shape, tensor.dtype, tensor.device) for tensor in (*tensors, *others)],
    )  # fmt: skip
    counts = _counts_of_right_calls.get(key)
    if counts is None:
        counts = _check_call(tensors, points_per_level, fused[:1], grad_outputs)
        if len(_counts_of_right_calls) >= 1000:
            _counts_of_right_calls.clear()
        _counts_of_right_calls[key] = counts
    if points_per_level is None:
        coordinates, weights = coordinates.flatten(3, 4), weights.flatten(3)
    if value.device.type == "cpu":
        _check_levels(spatial_shapes.tolist(), level_start_index.tolist(), value)
    return Inputs(
        value, spatial_shapes, level_start_index, coordinates, weights, counts, nearest,
        *(fused or (None, 0.0)), *(grad_outputs or (None,)),
    )  # fmt: skip


_counts_of_right_calls: Dict[tuple, List[int]] = {}


def _check_call(tensors, points_per_level, references, grad_outputs) -> List[int]:
    """The points of each level, if all is as expected."""
    value, spatial_shapes, level_start_index, coordinates, weights = tensors
    names = ("sampling_offsets", "attention_logits") if references else (
        "sampling_locations", "attention_weights",
    )  # fmt: skip
    tensors = dict(zip(("value", "spatial_shapes", "level_start_index", *names), tensors))
    _check_value(value)
    batch, pixels, heads, channels = value.shape
    _check_shape("spatial_shapes", spatial_shapes, ("levels", None), ("2", 2))
    levels = spatial_shapes.shape[0]
    _check(levels <= _MAX_LEVELS, f"spatial_shapes has {levels} levels, expected fewer than 2^31")
    _check_shape("level_start_index", level_start_index, ("levels", levels))
    if points_per_level is None:
        counts = _equal_counts(tensors, names, batch, heads, levels)
    else:
        counts = _listed_counts(tensors, names, batch, heads, levels, list(points_per_level))
    for name in ("spatial_shapes", "level_start_index"):
        _check_dtype(name, tensors[name], (torch.int64, torch.int32), "Long or Int")
    for name in ("spatial_shapes", "level_start_index"):
        _check_device(name, tensors[name], value)
    for name in names:
        _check_operand(name, tensors[name], value)
    queries = coordinates.shape[1]
    for reference_points in references:
        _check_reference_points(reference_points, value, queries, levels)
    for grad_output in grad_outputs:
        _check_shape(
            "grad_output", grad_output,
            ("batch", batch), ("queries", queries), ("heads*channels", heads * channels),
        )  # fmt: skip
        name = f"{_DTYPE_NAMES[value.dtype]}, the dtype of value"
        _check_dtype("grad_output", grad_output, (value.dtype,), name)
        _check_device("grad_output", grad_output, value)
    return counts


def _is_special(tensor):
    return tensor.is_nested or tensor.is_quantized


def _check(condition, message):
    if not condition:
        raise RuntimeError(message)


def _check_shape(name, tensor, *expected):
    """expected: the name of each dimension, and its size where the inputs so far fix it."""
    sizes = tensor.shape
    if len(sizes) == len(expected) and all(
        size is None or size == actual for actual, (_, size) in zip(sizes, expected)
    ):
        return
    wanted = ", ".join(n if size is None else f"{n}={size}" for n, size in expected)
    _check(False, f"{name} has shape ({', '.join(map(str, sizes))}), expected ({wanted})")


def _check_device(name, tensor, value):
    _check(
        tensor.device == value.device,
        f"{name} is on {tensor.device}, expected {value.device}, the device of value",
    )


def _check_dtype(name, tensor, dtypes, expected):
    if tensor.dtype not in dtypes:
        actual = _DTYPE_NAMES.get(tensor.dtype)
        if actual is None:  # float8_e4m3fn is Float8_e4m3fn
            actual = str(tensor.dtype).split(".")[1].capitalize()
        _check(False, f"{name} has dtype {actual}, expected {expected}")


def _check_operand(name, tensor, value):
    if value.dtype == torch.float64:
        _check_dtype(name, tensor, (torch.float64,), "Double, the dtype of value")
    else:
        _check_dtype(name, tensor, _FLOATS, "Float, Half or BFloat16, as value is not Double")
    _check_device(name, tensor, value)


def _check_value(value):
    dimensions = (("batch", None), ("sum(h*w)", None), ("heads", None), ("channels", None))
    _check_shape("value", value, *dimensions)
    _check_dtype("value", value, (*_FLOATS, torch.float64), "Float, Half, BFloat16 or Double")
    _, pixels, heads, channels = value.shape
    _check(
        pixels <= _MAX_PIXELS,
        f"value has {pixels} pixels in dimension 1, expected fewer than 2^31",
    )
    _check(
        heads * channels <= _MAX_PIXEL_SIZE and max(heads, channels) <= _MAX_PIXEL_SIZE,
        f"value has {heads} heads of {channels} channels, expected a product below 2^28",
    )


def _equal_counts(tensors, names, batch, heads, levels):
    """Each level has as many points as dimension 4 says."""
    coordinates, weights = (tensors[name] for name in names)
    rows = (("batch", batch), ("queries", None), ("heads", heads), ("levels", levels))
    _check_shape(names[0], coordinates, *rows, ("points", None), ("2", 2))
    points = coordinates.shape[4]
    _check(
        max(points, levels * points) <= _MAX_POINTS,
        f"{names[0]} has {points} points in each of {levels} levels, expected fewer than 2^30 "
        "in all",
    )
    rows = (rows[0], ("queries", coordinates.shape[1]), *rows[2:])
    _check_shape(names[1], weights, *rows, ("points", points))
    return [points] * levels


def _listed_counts(tensors, names, batch, heads, levels, counts):
    """Each level has as many points as counts says; dimension 3 runs over all of them."""
    coordinates, weights = (tensors[name] for name in names)
    rows = (("batch", batch), ("queries", None), ("heads", heads), ("points", None))
    _check_shape(names[0], coordinates, *rows, ("2", 2))
    queries, points = coordinates.shape[1], coordinates.shape[3]
    _check(points <= _MAX_POINTS, f"{names[0]} has {points} points, expected fewer than 2^30")
    rows = (rows[0], ("queries", queries), rows[2], ("points", points))
    _check_shape(names[1], weights, *rows)
    _check(
        len(counts) == levels,
        f"points_per_level has {len(counts)} numbers, expected levels={levels}",
    )
    for level, count in enumerate(counts):
        _check(
            0 <= count <= points,
            f"points_per_level has {count} for level {level}, expected at least 0 and at most "
            f"{points}, the points of {names[0]}",
        )
    _check(
        sum(counts) == points,
        f"points_per_level sums to {sum(counts)}, expected {points}, the points of {names[0]}",
    )
    _check(
        len(set(counts)) <= 1 or levels <= _MAX_UNEQUAL_LEVELS,
        f"points_per_level has different numbers for {levels} levels, expected at most "
        f"{_MAX_UNEQUAL_LEVELS} levels",
    )
    return counts


def _check_reference_points(reference_points, value, queries, levels):
    name = "reference_points"
    rows = (("batch", value.shape[0]), ("queries", queries))
    _check_shape(name, reference_points, *rows, ("levels or 1", None), ("2 or 4", None))
    own_levels, size = reference_points.shape[2:]
    _check(
        own_levels in (levels, 1),
        f"{name} has {own_levels} levels, expected levels={levels} or 1",
    )
    _check(
        size in (2, 4),
        f"{name} has {size} coordinates, expected 2 (x, y) or 4 (x, y, width, height)",
    )
    _check_operand(name, reference_points, value)


def _check_levels(shapes, starts, value):
    pixels, by_start, total = value.shape[1], [], 0
    for level, ((height, width), start) in enumerate(zip(shapes, starts)):
        _check(
            height > 0 and width > 0,
            f"spatial_shapes has ({height}, {width}) for level {level}, expected a positive "
            "height and width",
        )
        _check(
            0 <= start < pixels,
            f"level_start_index has {start} for level {level}, expected at least 0 and less than "
            f"value.size(1)={pixels}",
        )
        _check(
            height * width <= pixels - start,
            f"spatial_shapes has {height} * {width} pixels for level {level}, expected at most "
            f"{pixels - start}: value.size(1)={pixels} less its start {start}",
        )
        _check(
            max(height, width) <= _MAX_SIDE or value.dtype == torch.float64,
            f"spatial_shapes has ({height}, {width}) for level {level}, expected at most 2^24, "
            "which float32 can count (float64 values: any)",
        )
        total += height * width
        by_start.append((start, level))
    _check(
        total == pixels,
        f"spatial_shapes sums to {total} pixels over its levels, expected value.size(1)={pixels}",
    )
    by_start.sort()
    for (before_start, before), (start, level) in zip(by_start, by_start[1:]):
        height, width = shapes[before]
        _check(
            start >= before_start + height * width,
            f"level_start_index has {start} for level {level}, expected no overlap with level "
            f"{before}, which starts at {before_start}",
        )
