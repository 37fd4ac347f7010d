"""What the tests run: the only list of dtypes, of tolerances and of problem sizes."""

import math
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction

import torch

# Largest relative norm error against float64 computed from the stored, rounded inputs, by the dtype
# of the tensor compared: output or gradient.
TOLERANCES = {
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
    torch.float64: 1e-12,
}
DTYPES = list(TOLERANCES)
HALF_DTYPES = [torch.float16, torch.bfloat16]
MIXABLE = [torch.float32, *HALF_DTYPES]  # in one call; float64 goes with float64 alone


@dataclass(frozen=True)
class Case:
    """A problem's sizes. shapes: the (height, width) of each level, in pixels.

    locations: "uniform" in [-0.1, 1.1]; "encoder", a query at every pixel centre plus an offset of
    a few pixels; "centres", exactly on pixel centres; "edges", exactly on pixel edges; "corner",
    within two pixels of the bottom-right corner; "far", mostly many pixels outside.
    points_per_level: where levels differ; else each has `points`.
    """

    name: str
    shapes: tuple[tuple[int, int], ...] = ((7, 9), (4, 5))
    batch: int = 2
    queries: int = 13
    heads: int = 2
    channels: int = 16
    points: int = 4
    locations: str = "uniform"
    points_per_level: tuple[int, ...] | None = None
    method: str = "bilinear"

    @property
    def options(self) -> dict:
        options = {} if self.method == "bilinear" else {"method": self.method}
        if self.points_per_level:
            options["points_per_level"] = list(self.points_per_level)
        return options

    @property
    def numbers_of_points(self) -> list[int]:
        return list(self.points_per_level or [self.points] * len(self.shapes))

    @property
    def points_shape(self) -> tuple[int, ...]:
        """Of the attention weights; the locations have one dimension more."""
        if self.points_per_level:
            return self.batch, self.queries, self.heads, sum(self.points_per_level)
        return self.batch, self.queries, self.heads, len(self.shapes), self.points

    @property
    def pixels(self) -> int:
        return sum(h * w for h, w in self.shapes)


# For Triton's interpreter, which takes 10 ms for each of a program's samples and corners. Channels
# are masked, and in float32 a program has two of the three queries.
_FEW = Case("few", ((3, 4), (2, 3)), queries=3, channels=130, points=1)
SMALLEST = [_FEW, replace(_FEW, name="few_nearest", method="nearest")]
CHANNELS = [1, 3, 8, 16, 24, 30, 32, 64, 71, 128, 256, 1025, 2048]
# On a GPU, merge_kernel adds the first and the last level's part of value's gradient. A CPU has one
# strategy for all, which CASES compare.
COARSE = Case("coarse_levels", ((20, 30), (60, 61), (1, 9)), queries=2100, heads=8, channels=20,
              points_per_level=(4, 1, 2))  # fmt: skip
CASES = [
    *(Case(f"channels_{channels}", channels=channels) for channels in CHANNELS),
    Case("pyramid", ((20, 27), (10, 14), (5, 7), (3, 4)), queries=150, heads=8, channels=32),
    Case("encoder", ((12, 17), (6, 9), (3, 5)), queries=273, heads=8, channels=32,
         locations="encoder"),
    Case("one_of_each", ((1, 1),), batch=1, queries=1, heads=1, channels=4, points=1),
    Case("thin_maps", ((1, 1), (1, 9), (8, 1), (3, 3), (2, 1), (1, 2)), heads=3, points=3),
    Case("twelve_points", heads=16, points=12),
    Case("five_batches", batch=5, queries=7, heads=5, channels=32),
    Case("many_queries", queries=4200, heads=8, channels=32, batch=1),
    Case("many_pixels", ((256, 256),), queries=260, heads=8, channels=32, batch=1),
    Case("wide_167", ((100, 167),), queries=300, heads=1, channels=8),
    Case("wide_334", ((200, 334),), queries=300, heads=1, channels=8),
    Case("corner_167", ((100, 167),), queries=200, heads=1, channels=8, locations="corner"),
    Case("corner_334", ((200, 334),), queries=200, heads=1, channels=8, locations="corner"),
    Case("centres_167", ((100, 167),), queries=200, heads=1, channels=8, locations="centres"),
    Case("centres_334", ((200, 334),), queries=200, heads=1, channels=8, locations="centres"),
    Case("edges_334", ((200, 334),), queries=200, heads=1, channels=8, locations="edges"),
    Case("far_outside", locations="far", queries=100),
    Case("d_fine", ((20, 27), (10, 14), (5, 7)), queries=40, heads=8, channels=32,
         points_per_level=(3, 6, 3)),
    Case("levels_without_points", ((3, 4), (5, 7), (1, 2), (4, 4)), batch=1,
         points_per_level=(0, 2, 0, 1)),
    Case("listed_but_equal", channels=32, points_per_level=(4, 4)),
    Case("many_unequal", ((2, 3),) * 32, channels=8, points_per_level=(1, 2) * 16),
    Case("nearest", ((20, 27), (10, 14), (5, 7)), queries=40, heads=8, channels=32,
         method="nearest"),
    Case("nearest_odd_channels", channels=30, method="nearest"),
    Case("nearest_edges", ((200, 334),), queries=200, heads=1, channels=8, locations="edges",
         method="nearest"),
    Case("nearest_far", locations="far", queries=100, method="nearest"),
    Case("nearest_d_fine", ((9, 14), (5, 7), (3, 4)), channels=32, points_per_level=(3, 6, 3),
         method="nearest"),
    *SMALLEST,
]  # fmt: skip
SMALL = Case("small")


@dataclass
class Problem:
    """An operator's tensors in their order, a grad_output to go with them, and its options."""

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        names = [f.name for f in fields(self) if f.name not in ("grad_output", "options")]
        return tuple(getattr(self, name) for name in names)

    def differentiable(self) -> list[torch.Tensor]:
        return [tensor for tensor in self.args if tensor.is_floating_point()]

    def gradient_names(self) -> list[str]:
        return [
            f"grad_{f.name}" for f in fields(self)
            if any(getattr(self, f.name) is tensor for tensor in self.differentiable())
        ]  # fmt: skip

    def require_grad(self):
        for tensor in self.differentiable():
            tensor.requires_grad_()
        return self

    def double(self):
        """Float64 copies of the stored values."""

        def copy(tensor):
            return tensor.detach().double() if tensor.is_floating_point() else tensor

        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        return replace(self, **{name: copy(tensor) for name, tensor in tensors.items()})


@dataclass
class Inputs(Problem):
    """Of ms_deform_attn."""

    value: torch.Tensor
    spatial_shapes: torch.Tensor
    level_start_index: torch.Tensor
    sampling_locations: torch.Tensor
    attention_weights: torch.Tensor
    grad_output: torch.Tensor
    options: dict = field(default_factory=dict)


@dataclass
class FusedInputs(Problem):
    """Of fused_ms_deform_attn."""

    value: torch.Tensor
    spatial_shapes: torch.Tensor
    level_start_index: torch.Tensor
    reference_points: torch.Tensor
    sampling_offsets: torch.Tensor
    attention_logits: torch.Tensor
    grad_output: torch.Tensor
    options: dict = field(default_factory=dict)


def level_tensors(shapes, device="cpu", dtype=torch.int64):
    spatial_shapes = torch.tensor(shapes, dtype=dtype, device=device).view(-1, 2)
    areas = spatial_shapes.prod(1)
    return spatial_shapes, (areas.cumsum(0) - areas).to(dtype)


def _widths_heights(case: Case) -> torch.Tensor:
    """(points over all levels, 2): the size of each point's level."""
    sizes = torch.tensor([[w, h] for h, w in case.shapes], dtype=torch.float64)
    return sizes.repeat_interleave(torch.tensor(case.numbers_of_points), 0)


def _centres(case: Case) -> torch.Tensor:
    """(pixels, 2): the centre of every level's every pixel."""
    return torch.cat(
        [
            torch.cartesian_prod(
                (torch.arange(h).double() + 0.5) / h, (torch.arange(w).double() + 0.5) / w
            ).flip(-1)
            for h, w in case.shapes
        ]
    )


def locations_of(case: Case, generator: torch.Generator) -> torch.Tensor:
    """(batch, queries, heads, points over all levels, 2) in float64, spread as the case says."""
    widths_heights = _widths_heights(case)
    size = (case.batch, case.queries, case.heads, *widths_heights.shape)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    if case.locations == "encoder":
        offsets = torch.randn(size, generator=generator, dtype=torch.float64) * 2
        return _centres(case).view(1, case.queries, 1, 1, 2) + offsets / widths_heights
    if case.locations == "centres":
        return ((uniform * widths_heights).floor() + 0.5) / widths_heights
    if case.locations == "edges":
        return (uniform * (widths_heights + 1)).floor() / widths_heights
    if case.locations == "corner":
        return 1 + (uniform * 4 - 2) / widths_heights
    if case.locations == "far":
        return uniform * 8 - 4
    return uniform * 1.2 - 0.1


def make_inputs(case, dtype, device="cpu", locations_dtype=None, weights_dtype=None, seed=0):
    """Random inputs of a case, drawn in float64 on the CPU, then rounded to their dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    value = normal(case.batch, case.pixels, case.heads, case.channels)
    locations = locations_of(case, generator).view(*case.points_shape, 2)
    weights = normal(*case.points_shape[:3], sum(case.numbers_of_points)).softmax(-1)
    grad_output = normal(case.batch, case.queries, case.heads * case.channels)
    return Inputs(
        value.to(device, dtype),
        *level_tensors(case.shapes, device),
        locations.to(device, locations_dtype or dtype),
        weights.view(case.points_shape).to(device, weights_dtype or dtype),
        grad_output.to(device, dtype),
        case.options,
    )


def make_fused_inputs(
    case, dtype, device="cpu", coordinates=2, reference_levels=None, seed=0, **dtypes
):
    """The same for the fused operator; dtypes by the name of the tensor, the default is dtype.

    Reference points lie in the image, an encoder's on its pixels' centres. Offsets reach a few
    pixels or shares of the reference box.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    levels = len(case.shapes) if reference_levels is None else reference_levels
    reference = torch.rand(
        case.batch, case.queries, levels, coordinates, generator=generator, dtype=torch.float64
    )
    if case.locations == "encoder":
        reference[..., :2] = _centres(case).unsqueeze(1)
    tensors = {
        "value": normal(case.batch, case.pixels, case.heads, case.channels),
        "reference_points": reference,
        "sampling_offsets": normal(*case.points_shape, 2) * 2,
        "attention_logits": normal(*case.points_shape),
        "grad_output": normal(case.batch, case.queries, case.heads * case.channels),
    }
    tensors = {name: tensor.to(device, dtypes.get(name, dtype)) for name, tensor in tensors.items()}
    return FusedInputs(
        **tensors,
        **dict(zip(("spatial_shapes", "level_start_index"), level_tensors(case.shapes, device))),
        options=case.options,
    )


# The public operators, each with what makes its inputs.
OPERATORS = {"ms_deform_attn": make_inputs, "fused_ms_deform_attn": make_fused_inputs}


def on_the_exact_side(locations, shapes, numbers_of_points):
    """float64 locations, moved by as few roundings as put float64 arithmetic in the right pixel.

    The location gradient jumps at a pixel centre, and a stored float64 location is on one side of
    it by less than location * size - 0.5 keeps. Fractions tell the side.

    Args:
        locations: (batch, queries, heads, points over all levels, 2).
        shapes: each level's (height, width).
        numbers_of_points: each level's.
    """

    def move(x, size):
        exact = math.floor(Fraction(x) * size - Fraction(1, 2))
        while (floor := math.floor(x * size - 0.5)) != exact:
            x = math.nextafter(x, math.inf if floor < exact else -math.inf)
        return x

    moved = locations.cpu().clone()
    for level, (height, width) in zip(moved.split(numbers_of_points, 3), shapes):
        for axis, size in enumerate((width, height)):
            x = level[..., axis]
            pixels = x * size - 0.5
            near = (pixels - pixels.round()).abs() < 1e-6  # far more than a rounding
            near &= pixels.abs() < 1e6
            x[near] = x[near].apply_(lambda x, size=size: move(x, size))
    return moved.to(locations.device)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.norm()
    assert norm > 0, "a comparison with zeros says nothing"
    return ((actual.double() - expected).norm() / norm).item()


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float | None = None
):
    """actual against a float64 reference, within its dtype's tolerance or the one given."""
    assert actual.shape == expected.shape, name
    error = relative_error(actual.detach(), expected.detach())
    tolerance = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    assert error <= tolerance, f"{name} is off by {error:.1e}"
