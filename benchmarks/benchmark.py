"""Workloads for ``kernels benchmark .``: this kernel against its eager reference.

Of benchmarks/ the Hub receives benchmark*.py alone (kernel-builder uploads no other file, and the
runner takes each for a benchmark), so what a benchmark needs is written here, once: the workloads
and how their inputs are drawn. The suite takes them from here. The runner times the reference once
and whole Python calls only: figures to quote come from ``python -m benchmarks``.
"""

import math
from functools import partial
from typing import Callable, List, NamedTuple, Sequence, Tuple, Union

import torch
from kernels.benchmark import Benchmark


class Workload(NamedTuple):
    """The sizes of one call, and how its sampling locations are spread (see ``make_inputs``)."""

    batch: int
    queries: int
    heads: int
    channels: int  # per head
    points: Union[int, Tuple[int, ...]]  # per level: one number for all, or one for each
    shapes: Tuple[Tuple[int, int], ...]  # (height, width) per level
    locations: str  # "uniform", "encoder" or "decoder"
    spread: float = 1.0  # what offsets are multiplied by

    @property
    def points_per_level(self) -> Sequence[int]:
        return [self.points] * len(self.shapes) if isinstance(self.points, int) else self.points

    @property
    def samples_per_query(self) -> int:
        """Channels interpolated for one query of every batch item: what time and memory follow."""
        return self.batch * self.heads * sum(self.points_per_level) * self.channels


_32 = ((32, 32), (16, 16), (8, 8), (4, 4))
_64 = ((64, 64), (32, 32), (16, 16), (8, 8))
_800x1333 = ((100, 167), (50, 84), (25, 42), (13, 21))
_640x640 = ((80, 80), (40, 40), (20, 20))
_928x1600 = ((116, 200), (58, 100), (29, 50), (15, 25))
_1024x1024 = ((32, 32), (64, 64), (128, 128))
_896x896 = ((112, 112), (56, 56), (28, 28))
_ENCODER = Workload(4, 22223, 8, 32, 4, _800x1333, "encoder")

WORKLOADS = {
    # kernels-benchmarks deformable_detr
    "seed_b1_q100": Workload(1, 100, 8, 32, 4, _32, "uniform"),
    "seed_b1_q300": Workload(1, 300, 8, 32, 4, _32, "uniform"),
    "seed_b2_q100": Workload(2, 100, 8, 32, 4, _32, "uniform"),
    "seed_b2_q300": Workload(2, 300, 8, 32, 4, _32, "uniform"),
    # kernels-community/deformable-detr benchmark
    "hub_b2_q300": Workload(2, 300, 8, 32, 4, _64, "uniform"),
    "hub_b8_q900": Workload(8, 900, 8, 32, 4, _64, "uniform"),
    # Deformable-DETR, DINO-4, Grounding DINO encoder at 800x1333; then with wider offsets
    "ddetr_encoder_b1": Workload(1, 22223, 8, 32, 4, _800x1333, "encoder"),
    "ddetr_encoder_b4": _ENCODER,
    "ddetr_encoder_b4_x1_5": _ENCODER._replace(spread=1.5),
    "ddetr_encoder_b4_x2": _ENCODER._replace(spread=2.0),
    "ddetr_encoder_b4_x4": _ENCODER._replace(spread=4.0),
    "ddetr_encoder_b4_uniform": _ENCODER._replace(locations="uniform"),
    # Deformable-DETR decoder
    "ddetr_decoder_b4": Workload(4, 300, 8, 32, 4, _800x1333, "decoder"),
    # Grounding DINO / DINO decoder
    "gdino_decoder_b4": Workload(4, 900, 8, 32, 4, _800x1333, "decoder"),
    # DINO 5-scale Swin-L encoder at 800x1333
    "dino5_encoder_b1": Workload(1, 89023, 8, 32, 4, ((200, 334), *_800x1333), "encoder"),
    # RT-DETR decoder at 640x640
    "rtdetr_decoder_b16": Workload(16, 300, 8, 32, 4, _640x640, "decoder"),
    # D-FINE / DEIM decoder at 640x640
    "dfine_decoder_b16": Workload(16, 300, 8, 32, (3, 6, 3), _640x640, "decoder"),
    # RF-DETR training decoder
    "rfdetr_decoder_b8": Workload(8, 1300, 16, 16, 2, ((48, 48),), "decoder"),
    # Mask2Former / OneFormer pixel decoder at 1024x1024
    "mask2former_b2": Workload(2, 21504, 8, 32, 4, _1024x1024, "encoder"),
    # BEVFormer-base spatial cross-attention, 6 cameras
    "bevformer_sca": Workload(6, 9680, 8, 32, 8, _928x1600, "decoder"),
    # BEVFormer-base temporal self-attention
    "bevformer_tsa": Workload(2, 40000, 8, 32, 4, ((200, 200),), "encoder"),
    # ViT-Adapter-L injector at 896x896
    "vit_adapter_b2": Workload(2, 3136, 16, 32, 4, _896x896, "decoder"),
}


def for_points_of(workload: Workload, function: Callable[..., torch.Tensor]) -> Callable:
    """The function of tensors alone: told the points of each level, where these differ in them."""
    if isinstance(workload.points, int):
        return function
    return partial(function, points_per_level=list(workload.points))


class Inputs(NamedTuple):
    """The operator's arguments, in their order. See ``ms_deform_attn`` for the shapes."""

    value: torch.Tensor
    spatial_shapes: torch.Tensor
    level_start_index: torch.Tensor
    sampling_locations: torch.Tensor
    attention_weights: torch.Tensor


def of_queries(
    tensors: Sequence[torch.Tensor], queries: Union[slice, torch.Tensor]
) -> List[torch.Tensor]:
    """The same call for some of the queries. The first three tensors are of all of them."""
    return [*tensors[:3], *(tensor[:, queries] for tensor in tensors[3:])]


def make_inputs(
    workload: Workload,
    dtype: torch.dtype,
    device: Union[str, torch.device],
    seed: int = 0,
) -> Inputs:
    """Draws a workload's inputs in float32 on the CPU, the same on every machine, and casts them.

    ``value`` is N(0, 1) and the weights are softmax(N(0, 1)) over levels and points. Locations:

    * uniform: U[0, 1];
    * encoder: every pixel centre of every level is a query, plus an offset;
    * decoder: each query's reference point is U[0.05, 0.95], plus an offset.

    The offset is Deformable DETR's initial bias (head h looks in direction 2*pi*h/heads, scaled so
    that its larger component is point + 1 pixels of the sampled level) plus N(0, 1) pixels for an
    encoder, N(0, 3) for a decoder, times ``workload.spread``. Locations are not clamped.

    Returns:
        ``Inputs``. Where ``workload.points`` differs by level, the last dimensions (levels,
        points) of locations and weights are one: all points, level after level.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, queries, heads, channels = workload[:4]
    sizes = torch.tensor(workload.shapes)
    pixels = sizes.prod(1)
    counts = torch.tensor(workload.points_per_level)
    level = torch.arange(len(counts)).repeat_interleave(counts)  # of each of a head's points
    sampled = (batch, queries, heads, len(level))

    value = torch.randn(batch, int(pixels.sum()), heads, channels, generator=generator)
    if workload.locations == "uniform":
        locations = torch.rand(*sampled, 2, generator=generator)
    else:
        if workload.locations == "encoder":
            across = [[(torch.arange(side) + 0.5) / side for side in x] for x in workload.shapes]
            centres = torch.cat([torch.cartesian_prod(*sides).flip(1) for sides in across])
            reference, spread = centres[None], 1.0
        else:
            reference, spread = 0.05 + 0.9 * torch.rand(batch, queries, 2, generator=generator), 3.0
        point = torch.cat([torch.arange(count) for count in workload.points_per_level])
        angle = 2 * math.pi * torch.arange(heads) / heads
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        offset = direction[:, None] * (point[:, None] + 1)
        offset = offset + spread * torch.randn(*sampled, 2, generator=generator)
        locations = reference[:, :, None, None] + workload.spread * offset / sizes.flip(1)[level]
    weights = torch.randn(*sampled, generator=generator).softmax(-1)
    if isinstance(workload.points, int):
        locations = locations.unflatten(3, (len(counts), workload.points))
        weights = weights.unflatten(3, (len(counts), workload.points))
    return Inputs(
        value.to(device, dtype),
        sizes.to(device),
        (pixels.cumsum(0) - pixels).to(device),
        locations.to(device, dtype),
        weights.to(device, dtype),
    )


def make_grad_output(
    workload: Workload, dtype: torch.dtype, device: Union[str, torch.device], seed: int = 1
) -> torch.Tensor:
    """N(0, 1) in the shape of a workload's output, drawn like its inputs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (workload.batch, workload.queries, workload.heads * workload.channels)
    return torch.randn(shape, generator=generator).to(device, dtype)


def gradients_in_chunks(
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    grad_output: torch.Tensor,
    queries_per_chunk: int,
) -> Tuple[torch.Tensor, ...]:
    """An eager function's gradients, some queries at a time.

    Autograd keeps dozens of tensors the size of all samples; of a whole encoder they would not fit.

    Args:
        tensors: the function's arguments: value, shapes, starts, and then tensors of queries.

    Returns:
        The gradients of value and of the tensors of queries.
    """
    grad_value = torch.zeros_like(tensors[0])
    grads_of_queries = []
    for start in range(0, grad_output.shape[1], queries_per_chunk):
        chunk = slice(start, start + queries_per_chunk)
        value, shapes, starts, *others = of_queries(tensors, chunk)
        leaves = [tensor.detach().requires_grad_() for tensor in (value, *others)]
        output = function(leaves[0], shapes, starts, *leaves[1:])
        gradients = torch.autograd.grad(output, leaves, grad_output[:, chunk])
        grad_value += gradients[0]
        grads_of_queries.append(gradients[1:])
    return (grad_value, *(torch.cat(parts, 1) for parts in zip(*grads_of_queries)))


class Forward(Benchmark):
    """The operator in float32. One benchmark per workload is added below the classes."""

    dtype = torch.float32

    def prepare(self, workload: Workload) -> None:
        self.workload = workload
        self.inputs = make_inputs(workload, self.dtype, self.device)
        self.operator = for_points_of(workload, self.kernel.ms_deform_attn)
        self.reference = for_points_of(workload, self.kernel.reference.ms_deform_attn)

    def run(self) -> None:
        self.out = self.operator(*self.inputs)

    def expected(self) -> torch.Tensor:
        return self.reference(*self.inputs)


class Backward(Forward):
    """The backward alone, in float32, as autograd calls it: the forward's graph is kept.

    Compared are the gradients of value and weights. A location's gradient jumps where it crosses a
    pixel; there a float32 reference can be on the wrong side of what the kernel gets right, and no
    tolerance helps. The tests compare it, with float64.
    """

    def prepare(self, workload: Workload) -> None:
        super().prepare(workload)
        self.grad_output = make_grad_output(workload, self.dtype, self.device)
        value, shapes, starts, locations, weights = self.inputs
        self.leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
        value, locations, weights = self.leaves
        self.output = self.operator(value, shapes, starts, locations, weights)

    # The runner sets and reads `out` as one tensor; joining the gradients only when it is read
    # keeps that copy out of the timed call.
    @property
    def out(self) -> torch.Tensor:
        grad_value, _, grad_weights = self._gradients
        return torch.cat((grad_value.flatten(), grad_weights.flatten()))

    @out.setter
    def out(self, gradients: Sequence[torch.Tensor]) -> None:
        self._gradients = gradients

    def run(self) -> None:
        self.out = torch.autograd.grad(
            self.output, self.leaves, self.grad_output, retain_graph=True
        )

    def expected(self) -> torch.Tensor:
        queries = max(1, 2**25 // self.workload.samples_per_query)
        grad_value, _, grad_weights = gradients_in_chunks(
            self.reference, self.inputs, self.grad_output, queries
        )
        return torch.cat((grad_value.flatten(), grad_weights.flatten()))


class ForwardFloat16(Forward):
    """The operator with everything in float16."""

    dtype = torch.float16


def _add_benchmark(name: str, workload: Workload) -> None:
    """Gives ``Forward`` (and so its subclasses) the three methods the runner looks for."""
    setattr(Forward, f"setup_{name}", lambda self: self.prepare(workload))
    setattr(Forward, f"benchmark_{name}", lambda self: self.run())
    setattr(Forward, f"verify_{name}", lambda self: self.expected())


# The runner calls the reference eleven times: on a CPU the large workloads would take an hour.
_LARGEST = math.inf if torch.cuda.is_available() else 2**24

for _name, _workload in WORKLOADS.items():
    if _workload.samples_per_query * _workload.queries <= _LARGEST:
        _add_benchmark(_name, _workload)
