"""The operators and their gradients as Triton kernels, for GPUs that no native variant serves.

A program takes some queries of one (batch, head), and all their channels. Its points are placed
as in deformable_detr/bilinear.h, whose names these functions have. Locations, weights and sums are
float32. The softmax of a fused call is PyTorch's. Not run on AMD or Intel hardware.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .checks import Inputs

# ------------------------------------------------------------------------------- where a point lies
# A number in twice the precision is a pair: rounded, and what the rounding left.


@triton.jit
def _multiply(a, b):
    product = a * b
    return product, tl.fma(a, b, -product)


@triton.jit
def _pixel(location, size):
    product, error = _multiply(location, size)
    pixel = product - 0.5
    return pixel, error + ((product - pixel) - 0.5)


@triton.jit
def _moved_pixel(reference, size, move, move_rest):
    start, start_rest = _multiply(reference, size)
    total = start + move
    added = total - start
    total_rest = (start - (total - added)) + (move - added)
    shifted = total - 0.5
    error = (((total - shifted) - 0.5) + total_rest) + (start_rest + move_rest)
    pixel = shifted + error
    return pixel, (shifted - pixel) + error


@triton.jit
def _split(pixel, rest):
    """Its floor, and the fraction in [0, 1)."""
    floor = tl.floor(pixel)
    floor = tl.where((pixel == floor) & (rest < 0), floor - 1, floor)
    return floor, (pixel - floor) + rest


@triton.jit
def _axis(coordinates, reference, extent, size, unit, unit_rest, query,
          FUSED: tl.constexpr, BOXES: tl.constexpr):  # fmt: skip
    """One axis of a point: its floor and fraction, its coordinate, and the pixels to one of that.

    coordinates: pointers to locations or offsets. reference, extent: a reference point and the
    size of its box. unit: offset_scale / points of the level.
    """
    at = tl.load(coordinates, mask=query, other=0).to(tl.float32)
    reach = tl.zeros_like(at) + size
    if not FUSED:
        pixel, rest = _pixel(at, reach)
    else:
        move, move_rest = at, tl.zeros_like(at)
        if BOXES:
            span, span_rest = _multiply(reach, unit)
            span_rest += size * unit_rest
            reach, reach_rest = _multiply(extent, span)
            reach_rest += extent * span_rest
            move, move_rest = _multiply(at, reach)
            move_rest += at * reach_rest
        else:
            reach = tl.zeros_like(at) + 1
        pixel, rest = _moved_pixel(reference, tl.zeros_like(at) + size, move, move_rest)
    floor, fraction = _split(pixel, rest)
    return floor, fraction, at, reach


@triton.jit
def _touching(x, right, y, down, height, width, NEAREST: tl.constexpr):
    """Column and row of the nw corner, the fractions, and whether a corner may be inside.

    Nearest sampling has its pixel as nw, with fractions of zero.
    """
    if NEAREST:
        touches = ((x - x) == 0) & ((y - y) == 0)
        x = tl.minimum(tl.maximum(x + 1, 0), (width - 1).to(tl.float32))
        y = tl.minimum(tl.maximum(y + 1, 0), (height - 1).to(tl.float32))
        right, down = tl.zeros_like(right), tl.zeros_like(down)
    else:
        touches = (x >= -1) & (x < width.to(tl.float32)) & (y >= -1) & (y < height.to(tl.float32))
    column, row = tl.where(touches, x, 0).to(tl.int32), tl.where(touches, y, 0).to(tl.int32)
    return column, tl.where(touches, right, 0), row, tl.where(touches, down, 0), touches


@triton.jit
def _corner(corner: tl.constexpr, column, right, row, down, height, width, touches):
    """nw, ne, sw or se: its pixel in the level, whether it is inside, its weights in x and y."""
    column, row = column + corner % 2, row + corner // 2
    inside = touches & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    x_share = right if corner % 2 == 1 else 1 - right
    y_share = down if corner // 2 == 1 else 1 - down
    return row * width + column, inside, x_share, y_share


@triton.jit
def _level(shapes, starts, level, pixels):
    """Height, width and start of a level; an empty one if it is not inside value."""
    height = tl.load(shapes + 2 * level).to(tl.int64)
    width = tl.load(shapes + 2 * level + 1).to(tl.int64)
    start = tl.load(starts + level).to(tl.int64)
    fits = (height > 0) & (width > 0) & (start >= 0) & (height <= pixels) & (width <= pixels)
    fits = fits & (height * width <= pixels - start)
    return tl.where(fits, height, 0), tl.where(fits, width, 0), start


@triton.jit
def _reference(references, row, there, FUSED: tl.constexpr, BOXES: tl.constexpr):
    """x and y of the reference points of a level, and the width and height of their boxes."""
    x = there.to(tl.float32) * 0
    y, width, height = x, x, x
    if FUSED:
        at = references + row * (4 if BOXES else 2)
        x = tl.load(at, mask=there, other=0).to(tl.float32)
        y = tl.load(at + 1, mask=there, other=0).to(tl.float32)
        if BOXES:
            width = tl.load(at + 2, mask=there, other=0).to(tl.float32)
            height = tl.load(at + 3, mask=there, other=0).to(tl.float32)
    return x, y, width, height


@triton.jit
def _program(queries, heads, blocks, BLOCK_Q: tl.constexpr):
    """Its head and its batch, whether its queries exist, and they, counted over all batches."""
    program = tl.program_id(0)
    batch = (program // heads // blocks).to(tl.int64)
    query = program // heads % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return program % heads, batch, query < queries, batch * queries + query


# -------------------------------------------------------------------------------------- the kernels
# Every tensor is contiguous. POINTS counts those of all levels.


@triton.jit
def _forward(
    value,  # [batch, pixels, heads, channels]
    shapes,  # [levels, 2] as (height, width)
    starts,  # [levels]
    coordinates,  # [batch, queries, heads, POINTS, 2]: locations, or with FUSED offsets
    weights,  # [batch, queries, heads, POINTS]
    references,  # [batch, queries, reference_levels, 2 or with BOXES 4], with FUSED
    output,  # [batch, queries, heads, channels]
    pixels, queries, heads, channels, reference_levels, blocks,
    COUNTS: tl.constexpr, UNITS: tl.constexpr, UNIT_RESTS: tl.constexpr, POINTS: tl.constexpr,
    FUSED: tl.constexpr, BOXES: tl.constexpr, NEAREST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    head, batch, there, query = _program(queries, heads, blocks, BLOCK_Q)
    channel = tl.arange(0, BLOCK_C)
    some = (channel < channels)[None, :]
    row = query * heads + head
    of_image = (batch * pixels * heads + head) * channels
    total = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    point = 0
    for level in tl.static_range(len(COUNTS)):
        height, width, start = _level(shapes, starts, level, pixels)
        x_size, y_size = width.to(tl.float32), height.to(tl.float32)
        of_level = query * reference_levels + tl.minimum(level, reference_levels - 1)
        x0, y0, w0, h0 = _reference(references, of_level, there, FUSED, BOXES)
        unit, rest = UNITS[level], UNIT_RESTS[level]
        for _ in range(COUNTS[level]):
            at = row * POINTS + point
            x, right, _0, _1 = _axis(coordinates + 2 * at, x0, w0, x_size, unit, rest, there,
                                     FUSED, BOXES)  # fmt: skip
            y, down, _0, _1 = _axis(coordinates + 2 * at + 1, y0, h0, y_size, unit, rest, there,
                                    FUSED, BOXES)  # fmt: skip
            x, right, y, down, touches = _touching(x, right, y, down, height, width, NEAREST)
            weight = tl.load(weights + at, mask=there, other=0).to(tl.float32)
            for corner in tl.static_range(1 if NEAREST else 4):
                pixel, inside, x_share, y_share = _corner(
                    corner, x, right, y, down, height, width, touches & there
                )
                places = ((start + pixel) * heads * channels)[:, None] + channel[None, :]
                mask = inside[:, None] & some
                corners = tl.load(value + of_image + places, mask=mask, other=0)
                total += (weight * x_share * y_share)[:, None] * corners.to(tl.float32)
            point += 1
    places = output + row[:, None] * channels + channel[None, :]
    tl.store(places, total, mask=there[:, None] & some)


@triton.jit
def _times(gradient, x):
    """Their product; zero where the gradient is, as it is of a point that is not finite."""
    return tl.where(gradient == 0, 0, gradient * x)


@triton.jit
def _backward(
    value, shapes, starts, coordinates, weights, references, grad_output,
    grad_value,  # as value, in float32, zeros
    grad_coordinates, grad_weights,  # as coordinates and weights
    grad_references,  # [batch, queries, heads, levels, 2 or 4], float32
    pixels, queries, heads, channels, reference_levels, blocks,
    COUNTS: tl.constexpr, UNITS: tl.constexpr, UNIT_RESTS: tl.constexpr, POINTS: tl.constexpr,
    FUSED: tl.constexpr, BOXES: tl.constexpr, NEAREST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    FOR_VALUE: tl.constexpr, FOR_POINTS: tl.constexpr, FOR_REFERENCES: tl.constexpr,
):  # fmt: skip
    head, batch, there, query = _program(queries, heads, blocks, BLOCK_Q)
    channel = tl.arange(0, BLOCK_C)
    some = (channel < channels)[None, :]
    row = query * heads + head
    of_image = (batch * pixels * heads + head) * channels
    places = row[:, None] * channels + channel[None, :]
    grad = tl.load(grad_output + places, mask=there[:, None] & some, other=0).to(tl.float32)
    point = 0
    for level in tl.static_range(len(COUNTS)):
        height, width, start = _level(shapes, starts, level, pixels)
        x_size, y_size = width.to(tl.float32), height.to(tl.float32)
        of_level = query * reference_levels + tl.minimum(level, reference_levels - 1)
        x0, y0, w0, h0 = _reference(references, of_level, there, FUSED, BOXES)
        unit, rest = UNITS[level], UNIT_RESTS[level]
        zero = tl.zeros([BLOCK_Q], tl.float32)
        grad_x0, grad_y0, grad_w0, grad_h0 = zero, zero, zero, zero
        for _ in range(COUNTS[level]):
            at = row * POINTS + point
            x, right, x_at, x_reach = _axis(coordinates + 2 * at, x0, w0, x_size, unit, rest,
                                            there, FUSED, BOXES)  # fmt: skip
            y, down, y_at, y_reach = _axis(coordinates + 2 * at + 1, y0, h0, y_size, unit, rest,
                                           there, FUSED, BOXES)  # fmt: skip
            x, right, y, down, touches = _touching(x, right, y, down, height, width, NEAREST)
            weight = tl.load(weights + at, mask=there, other=0).to(tl.float32)
            grad_weight, grad_x, grad_y = zero, zero, zero  # of the pixel x and y
            for corner in tl.static_range(1 if NEAREST else 4):
                pixel, inside, x_share, y_share = _corner(
                    corner, x, right, y, down, height, width, touches & there
                )
                places = ((start + pixel) * heads * channels)[:, None] + channel[None, :]
                places, mask = places + of_image, inside[:, None] & some
                if FOR_VALUE:
                    share = (weight * x_share * y_share)[:, None] * grad
                    tl.atomic_add(grad_value + places, share, mask=mask, sem="relaxed")
                if FOR_POINTS or FOR_REFERENCES:
                    corners = tl.load(value + places, mask=mask, other=0).to(tl.float32)
                    # A corner outside has no part in it, even if grad_output is not finite.
                    dot = tl.where(inside, tl.sum(corners * grad, 1), 0)
                    grad_weight += x_share * y_share * dot
                    if not NEAREST:
                        grad_x += (y_share if corner % 2 == 1 else -y_share) * dot
                        grad_y += (x_share if corner // 2 == 1 else -x_share) * dot
            grad_x, grad_y = weight * grad_x, weight * grad_y
            if FOR_POINTS:
                tl.store(grad_weights + at, grad_weight, mask=there)
                tl.store(grad_coordinates + 2 * at, _times(grad_x, x_reach), mask=there)
                tl.store(grad_coordinates + 2 * at + 1, _times(grad_y, y_reach), mask=there)
            if FOR_REFERENCES:
                grad_x0, grad_y0 = grad_x0 + grad_x * x_size, grad_y0 + grad_y * y_size
                grad_w0 += _times(grad_x, x_at) * x_size * unit
                grad_h0 += _times(grad_y, y_at) * y_size * unit
            point += 1
        if FOR_REFERENCES:
            to = grad_references + (row * len(COUNTS) + level) * (4 if BOXES else 2)
            tl.store(to, grad_x0, mask=there)
            tl.store(to + 1, grad_y0, mask=there)
            if BOXES:
                tl.store(to + 2, grad_w0, mask=there)
                tl.store(to + 3, grad_h0, mask=there)


# ------------------------------------------------------------------------------------------- launch


def runs(inputs: Inputs) -> bool:
    """Whether the kernels take these inputs. Levels are unrolled, and channels are in registers."""
    return inputs.value.shape[3] <= 512 and len(inputs.counts) <= 16


def _launch(kernel, inputs: Inputs, pointers: list, **flags):
    batch, pixels, heads, channels = inputs.value.shape
    queries = inputs.weights.shape[1]
    block_q, warps = block_size(inputs, queries)
    blocks = triton.cdiv(queries, block_q)
    fused = inputs.reference_points is not None
    reference_levels, size = inputs.reference_points.shape[2:] if fused else (1, 2)
    units = [inputs.offset_scale / max(count, 1) for count in inputs.counts]
    rounded = torch.tensor(units, dtype=torch.float32, device="cpu").tolist()
    device, guard = inputs.value.device, contextlib.nullcontext()
    if device.type != "cpu":  # Triton launches on the current device
        guard = getattr(torch, device.type).device(device)
    with guard:
        kernel[(batch * blocks * heads,)](
            *pointers, pixels, queries, heads, channels, reference_levels, blocks,
            COUNTS=tuple(inputs.counts), POINTS=inputs.weights.shape[3], UNITS=tuple(rounded),
            UNIT_RESTS=tuple(unit - x for unit, x in zip(units, rounded)),
            FUSED=fused, BOXES=size == 4, NEAREST=inputs.nearest, BLOCK_Q=block_q,
            BLOCK_C=triton.next_power_of_2(channels), num_warps=warps, **flags,
        )  # fmt: skip


def block_size(inputs: Inputs, queries: int) -> tuple:
    """Queries and warps of a program."""
    row = triton.next_power_of_2(inputs.value.shape[3]) * inputs.value.element_size()
    return max(1, min(2048 // row, triton.next_power_of_2(queries))), 4


def _pointers(inputs: Inputs) -> list:
    """The arguments that both kernels have. The weights of a fused call are float32."""
    value, weights, references = inputs.value, inputs.weights, inputs.reference_points
    if references is not None:
        weights = weights.softmax(-1, dtype=torch.float32)
    tensors = (value, inputs.spatial_shapes, inputs.level_start_index, inputs.coordinates, weights)
    tensors += (value if references is None else references,)
    return [tensor.contiguous() for tensor in tensors]


def forward(inputs: Inputs) -> torch.Tensor:
    """(batch, queries, heads * channels), in value's dtype."""
    batch, _, heads, channels = inputs.value.shape
    output = inputs.value.new_empty(batch, inputs.weights.shape[1], heads * channels)
    _launch(_forward, inputs, [*_pointers(inputs), output])
    return output


def backward(inputs: Inputs, for_value: bool, for_points: bool, for_reference: bool) -> tuple:
    """The gradients of value, reference points, coordinates and weights; None if not asked for."""
    value, references = inputs.value, inputs.reference_points
    pointers = _pointers(inputs)
    weights = pointers[4]
    grad_value = value.new_zeros(value.shape if for_value else 0, dtype=torch.float32)
    grad_coordinates = inputs.coordinates.new_empty(inputs.coordinates.shape)
    grad_weights = torch.empty_like(weights)
    shape = (*weights.shape[:3], len(inputs.counts), references.shape[3]) if for_reference else 0
    grad_references = value.new_empty(shape, dtype=torch.float32)
    pointers += [inputs.grad_output.contiguous(), grad_value, grad_coordinates, grad_weights]
    pointers += [grad_references]
    flags = {"FOR_VALUE": for_value, "FOR_POINTS": for_points, "FOR_REFERENCES": for_reference}
    _launch(_backward, inputs, pointers, **flags)
    if for_reference:
        over = (2, 3) if references.shape[2] == 1 else 2  # heads, and levels that share a point
        grad_references = grad_references.sum(over).view(references.shape).to(references.dtype)
    if references is not None:  # of the logits, from those of their softmax
        mean = (grad_weights * weights).sum(-1, keepdim=True)
        grad_weights = (grad_weights - mean).mul_(weights).to(inputs.weights.dtype)
    return grad_value.to(value.dtype), grad_references, grad_coordinates, grad_weights
