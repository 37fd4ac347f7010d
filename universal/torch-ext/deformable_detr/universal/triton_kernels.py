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
# Every result that is used exactly comes from an explicit fma. Compilers fuse a multiplication with
# the addition after it, and what that leaves of an error-compensated sum is its error, twice.


@triton.jit
def _multiply(a, b, b_rest):
    """a * (b + b_rest) in twice the precision: rounded, and what the rounding left."""
    product = tl.fma(a, b, 0.0)
    return product, tl.fma(a, b_rest, tl.fma(a, b, -product))


@triton.jit
def _moved_pixel(reference, size, move, move_rest):
    """Floor and fraction of reference * size + move + move_rest - 0.5."""
    start, start_rest = _multiply(reference, size, 0.0)
    total = start + move
    added = total - start
    total_rest = (start - (total - added)) + (move - added)
    shifted = total - 0.5
    error = (((total - shifted) - 0.5) + total_rest) + (start_rest + move_rest)
    pixel = shifted + error
    floor = tl.floor(pixel)
    return floor, (pixel - floor) + ((shifted - pixel) + error)


@triton.jit
def _axis(coordinates, reference, extent, length, unit, unit_rest, query,
          REFERENCE: tl.constexpr, NEAREST: tl.constexpr):  # fmt: skip
    """One axis of a point: the index of the pixel before it, or of the nearest; its distance from
    that, in [0, 1), or 0; whether that pixel and the next are inside; its coordinate; and the
    pixels to one of that.

    coordinates: pointers to locations or offsets. reference, extent: a reference point and the
    size of its box. length: the pixels of the level. unit: offset_scale / points of the level.
    """
    at = tl.load(coordinates, mask=query, other=0).to(tl.float32)
    size = length.to(tl.float32)
    reach = tl.zeros_like(at) + size
    if REFERENCE == 0:
        floor = tl.floor(tl.fma(at, reach, -0.5))
        fraction = tl.fma(at, reach, -0.5 - floor)  # of which the sum is exact, below 2^23
    else:
        move, move_rest = at, tl.zeros_like(at)
        if REFERENCE == 4:
            span, span_rest = _multiply(reach, unit, unit_rest)
            reach, reach_rest = _multiply(extent, span, span_rest)
            move, move_rest = _multiply(at, reach, reach_rest)
        else:
            reach = tl.zeros_like(at) + 1
        floor, fraction = _moved_pixel(reference, tl.zeros_like(at) + size, move, move_rest)
    below = fraction < 0  # the floor is that of a rounded pixel
    floor, fraction = tl.where(below, floor - 1, floor), tl.where(below, fraction + 1, fraction)
    if NEAREST:
        near = ((floor - floor) == 0) & (length > 0)
        floor = tl.minimum(tl.maximum(tl.where(near, floor + 1, 0), 0), size - 1)
        return floor.to(tl.int32), tl.zeros_like(at), near, near, at, reach
    touches = (floor >= -1) & (floor < size)  # not if it is NaN
    index = tl.where(touches, floor, -2).to(tl.int32)
    end = length.to(tl.uint32, bitcast=True)  # one comparison serves both bounds
    near = index.to(tl.uint32, bitcast=True) < end
    far = (index + 1).to(tl.uint32, bitcast=True) < end
    return index, tl.where(touches, fraction, 0), near, far, at, reach


@triton.jit
def _level(shapes, starts, level, pixels):
    """Height, width and start of a level; an empty one if it is not inside value."""
    height = tl.load(shapes + 2 * level).to(tl.int64)
    width = tl.load(shapes + 2 * level + 1).to(tl.int64)
    start = tl.load(starts + level).to(tl.int64)
    fits = (height > 0) & (width > 0) & (start >= 0) & (height <= pixels) & (width <= pixels)
    fits = fits & (height * width <= pixels - start)
    return tl.where(fits, height, 0).to(tl.int32), tl.where(fits, width, 0).to(tl.int32), start


@triton.jit
def _reference(references, query, level, own_levels, there, REFERENCE: tl.constexpr):
    """x and y of the reference points of a level, and the width and height of their boxes."""
    zero = there.to(tl.float32) * 0
    if REFERENCE == 0:
        return zero, zero, zero, zero
    at = references + (query * own_levels + tl.minimum(level, own_levels - 1)) * REFERENCE
    x = tl.load(at, mask=there, other=0).to(tl.float32)
    y = tl.load(at + 1, mask=there, other=0).to(tl.float32)
    boxed = there & (REFERENCE == 4)
    width = tl.load(at + 2, mask=boxed, other=0).to(tl.float32)
    return x, y, width, tl.load(at + 3, mask=boxed, other=0).to(tl.float32)


@triton.jit
def _point(coordinates, weights, x0, y0, w0, h0, height, width, unit, unit_rest, query,
           PIXEL: tl.constexpr, LARGE: tl.constexpr, REFERENCE: tl.constexpr,
           NEAREST: tl.constexpr):  # fmt: skip
    """A point's weight, the elements from its level's first pixel to nw and from there to sw, and
    both axes. PIXEL: the elements of a pixel."""
    x, right, west, east, x_at, x_reach = _axis(
        coordinates, x0, w0, width, unit, unit_rest, query, REFERENCE, NEAREST
    )
    y, down, north, south, y_at, y_reach = _axis(
        coordinates + 1, y0, h0, height, unit, unit_rest, query, REFERENCE, NEAREST
    )
    weight = tl.load(weights, mask=query, other=0).to(tl.float32)
    pitch = (width.to(tl.int64) if LARGE else width) * PIXEL
    nw = y * pitch + x.to(pitch.dtype) * PIXEL
    return (weight, nw, pitch, right, down, west, east, north, south, x_at, x_reach, y_at, y_reach)


@triton.jit
def _corner(corner: tl.constexpr, weight, right, down, west, east, north, south):
    """Whether it is inside, its share of the point's output, and its shares in x and in y."""
    inside = (east if corner % 2 == 1 else west) & (south if corner // 2 == 1 else north)
    x_share = right if corner % 2 == 1 else 1 - right
    y_share = down if corner // 2 == 1 else 1 - down
    return inside, weight * x_share * y_share, x_share, y_share


@triton.jit
def _program(queries, heads, blocks, BLOCK_Q: tl.constexpr):
    """Its head and its batch, whether its queries exist, and they, counted over all batches."""
    program = tl.program_id(0)
    batch = (program // heads // blocks).to(tl.int64)
    query = program // heads % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return program % heads, batch, query < queries, batch * queries + query


# -------------------------------------------------------------------------------------- the kernels
# Every tensor is contiguous. POINTS counts those of all levels, STEP divides each level's count.
# REFERENCE: 0, or of a fused call the coordinates of a reference point, 2 or 4. LARGE: an image has
# more elements than 32 bits count.
_SIZES = ["pixels", "queries", "own_levels", "blocks"]  # of which any value takes one kernel


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    value,  # [batch, pixels, HEADS, CHANNELS]
    shapes,  # [levels, 2] as (height, width)
    starts,  # [levels]
    coordinates,  # [batch, queries, HEADS, POINTS, 2]: locations, or if REFERENCE offsets
    weights,  # [batch, queries, HEADS, POINTS]
    references,  # [batch, queries, own_levels, REFERENCE], of a fused call
    output,  # [batch, queries, HEADS, CHANNELS]
    pixels, queries, own_levels, blocks,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, COUNTS: tl.constexpr, POINTS: tl.constexpr,
    UNITS: tl.constexpr, UNIT_RESTS: tl.constexpr, REFERENCE: tl.constexpr, NEAREST: tl.constexpr,
    LARGE: tl.constexpr, STEP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    head, batch, there, query = _program(queries, HEADS, blocks, BLOCK_Q)
    channel = tl.arange(0, BLOCK_C)[None, :]
    some = channel < CHANNELS
    row = query * HEADS + head
    total = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    point = 0
    for level in tl.static_range(len(COUNTS)):
        height, width, start = _level(shapes, starts, level, pixels)
        x0, y0, w0, h0 = _reference(references, query, level, own_levels, there, REFERENCE)
        image = value + ((batch * pixels + start) * HEADS + head) * CHANNELS + channel
        for _ in range(COUNTS[level] // STEP):
            for _1 in tl.static_range(STEP):
                at = row * POINTS + point
                weight, nw, pitch, right, down, west, east, north, south, _2, _3, _4, _5 = _point(
                    coordinates + 2 * at, weights + at, x0, y0, w0, h0, height, width, UNITS[level],
                    UNIT_RESTS[level], there, HEADS * CHANNELS, LARGE, REFERENCE, NEAREST,
                )  # fmt: skip
                corners = image + nw[:, None]
                for corner in tl.static_range(1 if NEAREST else 4):
                    inside, share, x_share, y_share = _corner(
                        corner, weight, right, down, west, east, north, south
                    )
                    place = corners + corner // 2 * pitch + corner % 2 * HEADS * CHANNELS
                    texel = tl.load(place, mask=inside[:, None] & some, other=0).to(tl.float32)
                    total = tl.fma(share[:, None], texel, total)
                point += 1
    tl.store(output + row[:, None] * CHANNELS + channel, total, mask=there[:, None] & some)


@triton.jit
def _times(gradient, x):
    """Their product; zero where the gradient is, as it is of a point that is not finite."""
    return tl.where(gradient == 0, 0, gradient * x)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    value, shapes, starts, coordinates, weights, references, grad_output,
    grad_value,  # as value, in float32, zeros
    grad_coordinates, grad_weights,  # as coordinates and weights
    grad_references,  # [batch, queries, HEADS, levels, REFERENCE], float32
    pixels, queries, own_levels, blocks,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, COUNTS: tl.constexpr, POINTS: tl.constexpr,
    UNITS: tl.constexpr, UNIT_RESTS: tl.constexpr, REFERENCE: tl.constexpr, NEAREST: tl.constexpr,
    LARGE: tl.constexpr, STEP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    FOR_VALUE: tl.constexpr, FOR_POINTS: tl.constexpr, FOR_REFERENCES: tl.constexpr,
):  # fmt: skip
    head, batch, there, query = _program(queries, HEADS, blocks, BLOCK_Q)
    channel = tl.arange(0, BLOCK_C)[None, :]
    some = channel < CHANNELS
    row = query * HEADS + head
    places = grad_output + row[:, None] * CHANNELS + channel
    grad = tl.load(places, mask=there[:, None] & some, other=0).to(tl.float32)
    point = 0
    for level in tl.static_range(len(COUNTS)):
        height, width, start = _level(shapes, starts, level, pixels)
        x0, y0, w0, h0 = _reference(references, query, level, own_levels, there, REFERENCE)
        zero = tl.zeros([BLOCK_Q], tl.float32)
        grad_x0, grad_y0, grad_w0, grad_h0 = zero, zero, zero, zero
        image = ((batch * pixels + start) * HEADS + head) * CHANNELS
        for _ in range(COUNTS[level] // STEP):
            for _1 in tl.static_range(STEP):
                at = row * POINTS + point
                (weight, nw, pitch, right, down, west, east, north, south, x_at, x_reach, y_at,
                 y_reach) = _point(
                    coordinates + 2 * at, weights + at, x0, y0, w0, h0, height, width, UNITS[level],
                    UNIT_RESTS[level], there, HEADS * CHANNELS, LARGE, REFERENCE, NEAREST,
                )  # fmt: skip
                corners = image + nw[:, None] + channel
                grad_weight, grad_x, grad_y = zero, zero, zero  # of the pixel x and y
                for corner in tl.static_range(1 if NEAREST else 4):
                    inside, share, x_share, y_share = _corner(
                        corner, weight, right, down, west, east, north, south
                    )
                    place = corners + corner // 2 * pitch + corner % 2 * HEADS * CHANNELS
                    mask = inside[:, None] & some
                    if FOR_VALUE:
                        terms = share[:, None] * grad
                        tl.atomic_add(grad_value + place, terms, mask=mask, sem="relaxed")
                    if FOR_POINTS or FOR_REFERENCES:
                        texel = tl.load(value + place, mask=mask, other=0).to(tl.float32)
                        # A corner outside has no part in it, even if grad_output is not finite.
                        dot = tl.where(inside, tl.sum(texel * grad, 1), 0)
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
                    grad_x0, grad_y0 = grad_x0 + grad_x * width, grad_y0 + grad_y * height
                    grad_w0 += _times(grad_x, x_at) * width * UNITS[level]
                    grad_h0 += _times(grad_y, y_at) * height * UNITS[level]
                point += 1
        if FOR_REFERENCES:
            to = grad_references + (row * len(COUNTS) + level) * REFERENCE
            tl.store(to, grad_x0, mask=there)
            tl.store(to + 1, grad_y0, mask=there)
            tl.store(to + 2, grad_w0, mask=there & (REFERENCE == 4))
            tl.store(to + 3, grad_h0, mask=there & (REFERENCE == 4))


# ------------------------------------------------------------------------------------------- launch


def runs(inputs: Inputs) -> bool:
    """Channels are in registers, levels unrolled, and coordinates exact on sides below 2^23."""
    _, pixels, _, channels = inputs.value.shape
    return channels <= 512 and len(inputs.counts) <= 16 and pixels < 2**23


STEPS = (1,)


def _launch(kernel, inputs: Inputs, pointers: list, **flags):
    batch, pixels, heads, channels = inputs.value.shape
    queries = inputs.weights.shape[1]
    block_q, warps = block_size(inputs, queries)
    blocks = triton.cdiv(queries, block_q)
    step = next(n for n in STEPS if all(count % n == 0 for count in inputs.counts))
    references = inputs.reference_points
    own_levels, reference = (1, 0) if references is None else references.shape[2:]
    units = [inputs.offset_scale / max(count, 1) for count in inputs.counts]
    rounded = torch.tensor(units, dtype=torch.float32, device="cpu").tolist()
    device, guard = inputs.value.device, contextlib.nullcontext()
    if device.type != "cpu":  # Triton launches on the current device
        guard = getattr(torch, device.type).device(device)
    with guard:
        kernel[(batch * blocks * heads,)](
            *pointers, pixels, queries, own_levels, blocks,
            HEADS=heads, CHANNELS=channels, COUNTS=tuple(inputs.counts), STEP=step,
            POINTS=inputs.weights.shape[3], UNITS=tuple(rounded), REFERENCE=reference,
            UNIT_RESTS=tuple(unit - x for unit, x in zip(units, rounded)), NEAREST=inputs.nearest,
            LARGE=pixels * heads * channels >= 2**31, BLOCK_Q=block_q,
            BLOCK_C=triton.next_power_of_2(channels), num_warps=warps, **flags,
        )  # fmt: skip


def block_size(inputs: Inputs, queries: int) -> tuple:
    """Queries and warps of a program: 2 KB of each corner, of which a thread loads 16 bytes."""
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
    pointers += [inputs.grad_output.contiguous(), grad_value]
    pointers += [grad_coordinates, grad_weights, grad_references]
    flags = {"FOR_VALUE": for_value, "FOR_POINTS": for_points, "FOR_REFERENCES": for_reference}
    _launch(_backward, inputs, pointers, **flags)
    if for_reference:
        over = (2, 3) if references.shape[2] == 1 else 2  # heads, and levels that share a point
        grad_references = grad_references.sum(over).view(references.shape).to(references.dtype)
    if references is not None:  # of the logits, from those of their softmax
        mean = (grad_weights * weights).sum(-1, keepdim=True)
        grad_weights = (grad_weights - mean).mul_(weights).to(inputs.weights.dtype)
    return grad_value.to(value.dtype), grad_references, grad_coordinates, grad_weights
