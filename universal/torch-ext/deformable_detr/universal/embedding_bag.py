"""The operators and their gradients by ``embedding_bag``, for any device.

An output is a weighted sum of rows of value, which is what ``embedding_bag`` computes: each (batch,
query, head) is a bag, with an entry for each corner of each of its points. A corner outside its map
has the index of a row of zeros after those of value. Compared with ``grid_sample`` on each level,
this keeps no samples, rounds less, and never waits for sizes of levels that are on a GPU.
"""

from typing import List

import torch
from torch.nn import functional as F

from .checks import Inputs


def forward(inputs: Inputs) -> torch.Tensor:
    """(batch, queries, heads * channels), in value's dtype."""
    value = inputs.value
    batch, _, heads, channels = value.shape
    shape = (batch, inputs.weights.shape[1], heads * channels)
    if inputs.is_empty:
        return value.new_zeros(shape)
    points = Points(inputs)
    corners = Corners(inputs, points)
    output = F.embedding_bag(
        corners.index.view(-1, corners.per_bag),
        _table(inputs),
        mode="sum",
        per_sample_weights=corners.factors(points.weights).view(-1, corners.per_bag),
    )
    return output.view(shape).to(value.dtype)


def backward(inputs: Inputs, for_value: bool, for_points: bool, for_reference: bool) -> tuple:
    """The gradients of value, reference points, coordinates and weights; None if not asked for.

    Sums are in a fixed order. They are the same for every call with the same inputs.
    """
    value = inputs.value
    if inputs.is_empty:
        asked = (for_value, for_reference, for_points, for_points)
        tensors = (value, inputs.reference_points, inputs.coordinates, inputs.weights)
        return tuple(x.new_zeros(x.shape) if flag else None for x, flag in zip(tensors, asked))
    points = Points(inputs)
    corners = Corners(inputs, points)
    index, per_bag = corners.index.flatten(), corners.per_bag
    grad_rows = inputs.grad_output.reshape(-1, value.shape[3]).to(inputs.acc_dtype)
    bags = torch.arange(len(grad_rows), dtype=index.dtype, device=index.device)
    bag_of_entry = bags[:, None].expand(-1, per_bag).flatten().contiguous()

    grad_value = grad_reference = grad_coordinates = grad_weights = None
    if for_value:
        factors = corners.factors(points.weights).view(-1)
        grad_table = _grad_table(grad_rows, index, bag_of_entry, factors, corners.end)
        grad_value = grad_table.view(value.shape).to(value.dtype)
    if for_points or for_reference:
        # The gradient of a corner's factor is the product of grad_output and the corner's row.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_rows, _table(inputs), index, bags * per_bag, bag_of_entry, 0
        )
        dots = dots.view(corners.index.shape).where(corners.inside, 0)
        grad_weights = corners.grad_weights(dots)
        grad_pixels = corners.grad_pixels(dots) * points.weights[..., None, :]
        grad_reference, grad_coordinates = points.grad_coordinates(grad_pixels, for_reference)
        grad_weights = points.grad_weights(grad_weights)
    return grad_value, grad_reference, grad_coordinates, grad_weights


def _table(inputs: Inputs) -> torch.Tensor:
    """(batch * pixels * heads + 1, channels): value, and a row of zeros."""
    batch, pixels, heads, channels = inputs.value.shape
    table = inputs.value.new_empty(batch * pixels * heads + 1, channels, dtype=inputs.acc_dtype)
    table[:-1].view(inputs.value.shape).copy_(inputs.value)
    table[-1].zero_()
    return table


def _grad_table(grad_rows, index, bag_of_entry, factors, rows) -> torch.Tensor:
    """(rows, channels): for each row, the sum of the gradients of its entries' bags, by factor."""
    if index.device.type == "cpu":
        # The same operator, with a bag for each row: half the time of the one below.
        index, order = index.sort(stable=True)
        ends = torch.searchsorted(index, torch.arange(rows + 1, dtype=index.dtype))
        order = order[: ends[-1]]
        return F.embedding_bag(
            bag_of_entry[order],
            grad_rows,
            ends[:-1].to(index.dtype),
            mode="sum",
            per_sample_weights=factors[order],
        )
    bags, per_bag = len(grad_rows), len(index) // len(grad_rows)
    return torch.ops.aten._embedding_bag_dense_backward(
        grad_rows,
        index,
        bag_of_entry,
        index.new_full((bags,), per_bag),
        index.new_empty(0),  # of mode max
        rows + 1,
        False,  # scale_grad_by_freq
        0,  # mode: sum
        factors,
        rows,  # the entries to leave out
    )[:-1]


class Points:
    """Where points lie, and what they weigh. Points are last, so that loops over them are long.

    Attributes:
        sizes: (2, points), the (width, height) of each point's level; (0, 0) if it is not in value.
        pixels: (batch, queries, heads, 2, points) as (x, y). In float64, which holds the product
            of a float32 location and a size exactly, unless the device may have no float64.
        weights: (batch, queries, heads, points), the attention weights.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        has_float64 = inputs.value.device.type in ("cpu", "cuda")
        dtype = torch.float64 if has_float64 else torch.float32
        self.sizes = spread(_sizes(inputs).to(dtype), inputs.counts)
        coordinates = _points_last(inputs.coordinates, dtype)
        if inputs.reference_points is None:
            self.weights = inputs.weights.to(inputs.acc_dtype)
            self.pixels = coordinates.mul_(self.sizes).sub_(0.5)
            return
        self.weights = inputs.weights.softmax(-1, dtype=inputs.acc_dtype)
        references = _points_last(inputs.reference_points, dtype)
        references = references.expand(-1, -1, -1, len(inputs.counts))
        references = spread(references, inputs.counts).unsqueeze(2)
        if references.shape[3] == 4:
            # How far a reference box of size one moves a point whose offset is one, in pixels.
            self.reach = self.sizes * box_fractions(inputs, self.sizes)
            self.boxes = references[..., 2:, :] * self.reach
            coordinates *= self.boxes
        self.pixels = coordinates.add_((references[..., :2, :] * self.sizes).sub_(0.5))

    def grad_weights(self, grads: torch.Tensor) -> torch.Tensor:
        """Of the weights, or of the logits that they are the softmax of."""
        if self.inputs.reference_points is not None:
            mean = (grads * self.weights).sum(-1, keepdim=True)
            grads = (grads - mean) * self.weights
        return grads.to(self.inputs.weights.dtype)

    def grad_coordinates(self, grad_pixels: torch.Tensor, for_reference: bool) -> tuple:
        """Of the reference points (None if not asked for), and of the locations or offsets.

        Args:
            grad_pixels: as pixels.
        """
        inputs, acc_dtype = self.inputs, self.inputs.acc_dtype
        sizes, reference = self.sizes.to(acc_dtype), inputs.reference_points
        boxed = reference is not None and reference.shape[-1] == 4
        grads = grad_pixels
        if reference is None:
            grads = grads * sizes
        elif boxed:  # a point that is not finite has a gradient of zero, which 0 * inf is not
            grads = grads * self.boxes.to(acc_dtype).nan_to_num(0, 0, 0)
        grad_coordinates = _points_first(grads, inputs.coordinates.dtype)
        if not for_reference:
            return None, grad_coordinates
        grads = grad_pixels * sizes
        if boxed:
            offsets = _points_last(inputs.coordinates, acc_dtype).nan_to_num_(0, 0, 0)
            of_boxes = offsets.mul_(grad_pixels).mul_(self.reach.to(acc_dtype))
            grads = torch.cat([grads, of_boxes], 3)
        grads = [x.sum(-1) for x in grads.sum(2).split(inputs.counts, -1)]
        grads = torch.stack(grads, 2)
        if reference.shape[2] == 1:
            grads = grads.sum(2, keepdim=True)
        return grads.to(reference.dtype), grad_coordinates


class Corners:
    """The corners of each point: nw, ne, sw and se, or with nearest sampling its one pixel.

    Attributes:
        index: (batch, queries, heads, rows, columns, points), in the table; its last row if
            outside. There are two rows and columns, or one.
        inside: whether a corner is in its map; as index.
        shares: the bilinear weights; as index, or 1.
        end: the index of the table's last row.
        per_bag: the entries of a bag.
    """

    def __init__(self, inputs: Inputs, points: Points):
        batch, pixels, heads, _ = inputs.value.shape
        self.end = batch * pixels * heads
        device, acc_dtype = inputs.value.device, inputs.acc_dtype
        dtype = torch.int32 if self.end < 2**31 - 1 else torch.int64

        def steps(count, step, dim):  # along one of four dimensions
            steps = torch.arange(count, dtype=dtype, device=device) * step
            return steps.view([-1 if i == dim else 1 for i in range(4)])

        starts = spread(inputs.level_start_index.to(dtype), inputs.counts) * heads
        starts = starts + (steps(batch, pixels * heads, 0) + steps(heads, 1, 2))
        sizes = points.sizes.to(dtype)
        width = sizes[0]

        # What is not finite, or far outside, is put outside where an integer can still count.
        at = points.pixels.nan_to_num(-2, -2, -2).clamp_(-2, 2**25)
        floor = at.floor()
        if inputs.nearest:
            self.inside = points.pixels.isfinite().all(3) & (width > 0)
            self.inside = self.inside[:, :, :, None, None]
            pixel = torch.minimum((floor + 1).clamp_(min=0).to(dtype), sizes - 1)
            columns, rows = pixel[:, :, :, None, None].unbind(-2)
            self.shares = torch.ones((), dtype=acc_dtype, device=device)
            self.fractions = None
        else:
            self.fractions = at.sub_(floor).to(acc_dtype)
            shares = torch.stack([1 - self.fractions, self.fractions], 4)
            sides = floor.to(dtype)
            sides = torch.stack([sides, sides + 1], 4)  # (..., 2 axes, 2 sides, points)
            inside = (sides >= 0) & (sides < sizes[:, None])
            columns, rows = sides[..., 0, None, :, :], sides[..., 1, :, None, :]
            self.inside = inside[..., 1, :, None, :] & inside[..., 0, None, :, :]
            self.shares = shares[..., 1, :, None, :] * shares[..., 0, None, :, :]
        rows = rows * (width * heads) + starts[:, :, :, None, None]
        self.index = (rows + columns * heads).where(self.inside, self.end)
        self.per_bag = self.index[0, 0, 0].numel()

    def factors(self, weights: torch.Tensor) -> torch.Tensor:
        """What each entry's row is multiplied by. That of a row of zeros may be anything finite."""
        return self.shares * weights[:, :, :, None, None]

    def grad_weights(self, dots: torch.Tensor) -> torch.Tensor:
        """From the gradients of the factors, that of the attention weights."""
        return (dots * self.shares).sum((3, 4))

    def grad_pixels(self, dots: torch.Tensor) -> torch.Tensor:
        """From the gradients of the factors, those of the pixels, for weights of one."""
        if self.fractions is None:
            return dots.new_zeros(*dots.shape[:3], 2, dots.shape[-1])
        nw, ne, sw, se = dots.flatten(3, 4).unbind(3)
        right, down = self.fractions.unbind(3)
        along_x = (1 - down) * (ne - nw) + down * (se - sw)
        along_y = (1 - right) * (sw - nw) + right * (se - ne)
        return torch.stack([along_x, along_y], 3)


def _points_last(tensor, dtype):
    """(..., points, n) as (..., n, points), contiguous, not the caller's memory."""
    tensor = tensor.transpose(-1, -2)
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _points_first(tensor, dtype):
    """And back."""
    return tensor.transpose(-1, -2).to(dtype).contiguous()


def _sizes(inputs: Inputs) -> torch.Tensor:
    """(2, levels) as (width, height); (0, 0) for a level that does not fit into value."""
    sizes = inputs.spatial_shapes.t().flip(0)
    if inputs.value.device.type == "cpu":  # where checks.py refuses it
        return sizes
    pixels = inputs.value.shape[1]
    sizes, starts = sizes.long().clamp(0, pixels + 1), inputs.level_start_index
    return sizes * ((starts >= 0) & (starts.long() + sizes.prod(0) <= pixels))


def spread(tensor: torch.Tensor, counts: List[int]) -> torch.Tensor:
    """(..., levels) to (..., points): without asking the device how many each level has."""
    if len(set(counts)) == 1:
        return tensor.unsqueeze(-1).expand(*tensor.shape, counts[0]).flatten(-2)
    pieces = tensor.split(1, -1)
    return torch.cat([x.expand(*x.shape[:-1], n) for x, n in zip(pieces, counts)], -1)


def box_fractions(inputs: Inputs, like: torch.Tensor):
    """offset_scale / points of the level, for each point."""
    fractions = [inputs.offset_scale / max(count, 1) for count in inputs.counts]
    if len(set(fractions)) == 1:
        return fractions[0]
    return torch.cat([like.new_full((n,), x) for x, n in zip(fractions, inputs.counts)])
