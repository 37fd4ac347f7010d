"""The operators and their gradients by ``grid_sample`` on each level, as eager models sample.

grid_sample takes coordinates in [-1, 1], and in float32 so places a point on a map 334 pixels wide
with an error of up to 1e-5 pixels. It keeps every sample: a training call takes as much memory as
an eager one, and with few queries up to twice as much, as eager mode frees one map after the other.
"""

from typing import List, NamedTuple, Optional, Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .checks import Inputs
from .embedding_bag import box_fractions, spread

# grid_sample's arguments: bilinear, zeros outside, align_corners=False.
_OPTIONS = (0, 0, False)
_MINUS_ONE = torch.tensor(-1.0, dtype=torch.float64, device="cpu")


class Level(NamedTuple):
    height: int
    width: int
    start: int  # of its pixels in value
    first: int  # of its points
    count: int


# What levels_of found, and for what, by spatial_shapes.
_known = WeakIdKeyDictionary()


def levels_of(inputs: Inputs) -> Optional[List[Level]]:
    """Each level, or None if their sizes cannot be had, or are not those of all of value.

    Reading them waits for a GPU: once for all calls with the same tensors, unless these are of
    inference mode, which does not tell whether they were changed.
    """
    shapes, starts = inputs.spatial_shapes, inputs.level_start_index
    keep = not (shapes.is_inference() or starts.is_inference())
    if keep:
        call = shapes._version, starts._version, inputs.value.shape[1], inputs.counts
        known = _known.get(shapes)
        if known is not None and known[0] is starts and known[1] == call:
            return known[2]
    if shapes.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    levels = _read_levels(inputs)
    if keep:
        _known[shapes] = starts, call, levels
    return levels


def _read_levels(inputs: Inputs) -> Optional[List[Level]]:
    shapes, starts, counts = inputs.spatial_shapes, inputs.level_start_index, inputs.counts
    numbers = torch.cat([shapes.flatten().long(), starts.long()]).tolist()
    heights, widths = numbers[: 2 * len(counts) : 2], numbers[1 : 2 * len(counts) : 2]
    starts = numbers[2 * len(counts) :]
    end = 0
    for start, height, width in sorted(zip(starts, heights, widths)):
        if start != end or height <= 0 or width <= 0:
            return None
        end += height * width
    if end != inputs.value.shape[1]:
        return None
    firsts = [sum(counts[:level]) for level in range(len(counts))]
    return [Level(*level) for level in zip(heights, widths, starts, firsts, counts)]


class Operands:
    """A call's inputs, with a row for each (batch, head), contiguous, in float32 or float64.

    Attributes:
        maps: (rows, channels, pixels).
        grid: (rows, queries, points, 2), grid_sample's coordinates: coordinates * reach + start.
        weights: (rows, 1, queries, points).
        samples: (rows, channels, queries, points).
        reach: a number or (batch or 1, 1, queries or 1, points, 2).
        of_box: with reference boxes, reach / their size.
    """

    def __init__(self, inputs: Inputs, kept: Sequence[torch.Tensor] = ()):
        """kept: the first four of a call with the same inputs, which are not computed again."""
        self.inputs, self.dtype = inputs, inputs.acc_dtype
        self.reach, start = 2, -1
        if inputs.reference_points is not None:
            self.reach, start = self._frame()
        if kept:
            self.maps, self.grid, self.weights, self.samples = kept
            return
        weights, coordinates = inputs.weights, inputs.coordinates.transpose(1, 2).to(self.dtype)
        self.grid = coordinates.new_empty(coordinates.shape)
        if inputs.reference_points is None:
            torch.add(_MINUS_ONE, coordinates, alpha=2, out=self.grid)
        else:
            weights = weights.softmax(-1, dtype=self.dtype)
            torch.mul(coordinates, self.reach, out=self.grid).add_(start)
        # What is not finite is put outside. (A GPU makes the nearest integer of one that is large.)
        self.grid = self.grid.nan_to_num_(-4, 4, -4).flatten(0, 1)
        self.maps = self.by_row(inputs.value.permute(0, 2, 3, 1))
        self.weights = self.by_row(weights.transpose(1, 2)).unsqueeze(1)
        sample = torch.grid_sampler_2d
        samples = [sample(*self.of(level), *_OPTIONS) for level in inputs.levels if level.count]
        self.samples = samples[0] if len(samples) == 1 else torch.cat(samples, -1)

    def _frame(self) -> tuple:
        """Of a fused call: reach and start."""
        inputs = self.inputs
        references = inputs.reference_points.to(self.dtype).transpose(-1, -2)
        references = references.expand(-1, -1, -1, len(inputs.counts))
        references = spread(references, inputs.counts).transpose(-1, -2).unsqueeze(1)
        if references.shape[-1] == 4:
            self.of_box = 2 * box_fractions(inputs, references)
            reach = (references[..., 2:].transpose(-1, -2) * self.of_box).transpose(-1, -2)
        else:
            sizes = inputs.spatial_shapes.flip(1).t().to(self.dtype)
            reach = 2 / spread(sizes, inputs.counts).t()
        return reach, references[..., :2] * 2 - 1

    def by_row(self, tensor: torch.Tensor) -> torch.Tensor:
        """(batch, heads, ...) to (rows, ...)."""
        return _contiguous(tensor, self.dtype).flatten(0, 1)

    def of(self, level: Level) -> tuple:
        """Of maps and of grid: (rows, channels, height, width), (rows, queries, count, 2)."""
        rows, channels, pixels = self.maps.shape
        _, queries, points, _ = self.grid.shape
        height, width, start, first, count = level
        strides = (channels * pixels, pixels, width, 1)
        maps = self.maps.as_strided((rows, channels, height, width), strides, start)
        strides = (queries * points * 2, points * 2, 2, 1)
        return maps, self.grid.as_strided((rows, queries, count, 2), strides, first * 2)


def forward(inputs: Inputs, keep: Optional[list] = None) -> torch.Tensor:
    """(batch, queries, heads * channels), in value's dtype.

    keep: a list, for tensors that backward may be given.
    """
    operands = Operands(inputs)
    samples, weights = operands.samples, operands.weights
    if keep is None:
        total = samples.mul_(weights).sum(-1)
    else:
        keep += operands.maps, operands.grid, weights, samples
        total = (samples * weights).sum(-1)
    batch, _, heads, channels = inputs.value.shape
    output = total.view(batch, heads, channels, -1).permute(0, 3, 1, 2)
    return _contiguous(output, inputs.value.dtype).flatten(2)


def backward(
    inputs: Inputs,
    for_value: bool,
    for_points: bool,
    for_reference: bool,
    kept: Sequence[torch.Tensor] = (),
) -> tuple:
    """The gradients of value, reference points, coordinates and weights; None if not asked for."""
    operands = Operands(inputs, kept)
    weights, levels = operands.weights, [level for level in inputs.levels if level.count]
    batch, _, heads, channels = inputs.value.shape
    of_output = inputs.grad_output.view(batch, -1, heads, channels).permute(0, 2, 3, 1)
    of_output = operands.by_row(of_output).unsqueeze(-1)
    of_places = for_points or for_reference
    of_weights = (operands.samples * of_output).sum(1) if of_places else None
    of_samples = (of_output * weights).split([level.count for level in levels], -1)
    grids, of_maps = [], {}
    for level, of_level in zip(levels, of_samples):
        of_map, of_grid = torch.ops.aten.grid_sampler_2d_backward.default(
            of_level, *operands.of(level), *_OPTIONS, (for_value, of_places)
        )
        grids.append(of_grid)
        of_maps[level.start] = of_map
    grad_value = _of_value(inputs, of_maps, bool(kept)) if for_value else None
    if not of_places:
        return grad_value, None, None, None
    grid = grids[0] if len(grids) == 1 else torch.cat(grids, 2)
    grid = grid.unflatten(0, (batch, heads))
    if inputs.reference_points is not None:
        weights = weights.squeeze(1)
        of_weights = (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * weights
    of_weights = of_weights.unflatten(0, (batch, heads)).transpose(1, 2)
    reach = operands.reach
    if isinstance(reach, torch.Tensor):  # zero times infinity is not zero
        reach = reach.nan_to_num(0, 0, 0)
    return (
        grad_value,
        _of_references(operands, grid) if for_reference else None,
        _contiguous((grid * reach).transpose(1, 2), inputs.coordinates.dtype),
        _contiguous(of_weights, inputs.weights.dtype),
    )


def _of_value(inputs: Inputs, of_maps: dict, as_maps: bool) -> torch.Tensor:
    """The gradient of value.

    Args:
        of_maps: those of the levels with points, by start.
        as_maps: whether it may lie in memory as maps do, a channel's pixels together: so do the
            gradients of eager models. (ddetr_decoder_b4's training call takes 954 us on an H100,
            and 1084 if the gradient is contiguous, which callers of the op itself expect.)
    """
    batch, _, heads, channels = inputs.value.shape
    maps = []
    for level in sorted(inputs.levels, key=lambda level: level.start):
        size = level.height * level.width
        if level.count:
            of_map = of_maps[level.start].view(batch, heads, channels, size).permute(0, 3, 1, 2)
        else:
            of_map = inputs.value.new_zeros(batch, size, heads, channels)
        maps.append(of_map)
    grad_value = torch.cat(maps, 1)
    if as_maps:
        return grad_value.to(inputs.value.dtype)
    return _contiguous(grad_value, inputs.value.dtype)


def _of_references(operands: Operands, of_grid: torch.Tensor) -> torch.Tensor:
    """The gradient of reference points. of_grid: (batch, heads, queries, points, 2)."""
    inputs = operands.inputs
    references = inputs.reference_points
    grads = of_grid.sum(1) * 2
    if references.shape[-1] == 4:
        offsets = inputs.coordinates.to(operands.dtype).nan_to_num(0, 0, 0)
        of_boxes = (of_grid.transpose(1, 2) * offsets).sum(2)
        of_boxes = (of_boxes.transpose(-1, -2) * operands.of_box).transpose(-1, -2)
        grads = torch.cat([grads, of_boxes], -1)
    grads = torch.stack([x.sum(2) for x in grads.split(inputs.counts, 2)], 2)
    if references.shape[2] == 1:
        grads = grads.sum(2, keepdim=True)
    return grads.to(references.dtype)


def _contiguous(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of its own."""
    return tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
