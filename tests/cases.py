"""What the tests run: the only list of dtypes, of tolerances and of problem sizes."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Case:
    """A problem's sizes. shapes: the (height, width) of each level, in pixels.

    locations: "uniform" in [-0.1, 1.1]; "encoder", a query at every pixel centre plus an offset of
    a few pixels; "centres", exactly on pixel centres; "edges", exactly on pixel edges; "corner",
    within two pixels of the bottom-right corner; "far", mostly many pixels outside.
    """

    name: str
    shapes: tuple[tuple[int, int], ...] = ((7, 9), (4, 5))
    batch: int = 2
    queries: int = 13
    heads: int = 2
    channels: int = 16
    points: int = 4
    locations: str = "uniform"

    @property
    def pixels(self) -> int:
        return sum(h * w for h, w in self.shapes)


CHANNELS = [1, 3, 8, 16, 24, 30, 32, 64, 71, 128, 256, 1025, 2048]
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
    Case("wide_167", ((100, 167),), queries=300, heads=1, channels=8),
    Case("wide_334", ((200, 334),), queries=300, heads=1, channels=8),
    Case("corner_167", ((100, 167),), queries=200, heads=1, channels=8, locations="corner"),
    Case("corner_334", ((200, 334),), queries=200, heads=1, channels=8, locations="corner"),
    Case("centres_167", ((100, 167),), queries=200, heads=1, channels=8, locations="centres"),
    Case("centres_334", ((200, 334),), queries=200, heads=1, channels=8, locations="centres"),
    Case("edges_334", ((200, 334),), queries=200, heads=1, channels=8, locations="edges"),
    Case("far_outside", locations="far", queries=100),
]  # fmt: skip
SMALL = Case("small")


@dataclass
class Inputs:
    """The operator's five tensors, and a grad_output to go with them."""

    value: torch.Tensor
    spatial_shapes: torch.Tensor
    level_start_index: torch.Tensor
    sampling_locations: torch.Tensor
    attention_weights: torch.Tensor
    grad_output: torch.Tensor

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        return (
            self.value,
            self.spatial_shapes,
            self.level_start_index,
            self.sampling_locations,
            self.attention_weights,
        )

    def differentiable(self) -> list[torch.Tensor]:
        return [self.value, self.sampling_locations, self.attention_weights]

    def require_grad(self) -> "Inputs":
        for tensor in self.differentiable():
            tensor.requires_grad_()
        return self

    def double(self) -> "Inputs":
        """Float64 copies of the stored values."""

        def copy(tensor):
            return tensor.detach().double() if tensor.is_floating_point() else tensor

        return Inputs(*map(copy, (*self.args, self.grad_output)))


def level_tensors(shapes, device="cpu", dtype=torch.int64):
    spatial_shapes = torch.tensor(shapes, dtype=dtype, device=device).view(-1, 2)
    areas = spatial_shapes.prod(1)
    return spatial_shapes, (areas.cumsum(0) - areas).to(dtype)


def _locations(case: Case, generator: torch.Generator) -> torch.Tensor:
    size = (case.batch, case.queries, case.heads, len(case.shapes), case.points, 2)
    widths_heights = torch.tensor([[w, h] for h, w in case.shapes]).double().view(-1, 1, 2)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    if case.locations == "encoder":
        centres = torch.cat(
            [
                torch.cartesian_prod(
                    (torch.arange(h).double() + 0.5) / h, (torch.arange(w).double() + 0.5) / w
                ).flip(-1)
                for h, w in case.shapes
            ]
        )
        offsets = torch.randn(size, generator=generator, dtype=torch.float64) * 2
        return centres.view(1, case.queries, 1, 1, 1, 2) + offsets / widths_heights
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

    levels = len(case.shapes)
    value = normal(case.batch, case.pixels, case.heads, case.channels)
    locations = _locations(case, generator)
    logits = normal(case.batch, case.queries, case.heads, levels * case.points)
    weights = logits.softmax(-1).view(*logits.shape[:3], levels, case.points)
    grad_output = normal(case.batch, case.queries, case.heads * case.channels)
    return Inputs(
        value.to(device, dtype),
        *level_tensors(case.shapes, device),
        locations.to(device, locations_dtype or dtype),
        weights.to(device, weights_dtype or dtype),
        grad_output.to(device, dtype),
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.norm()
    assert norm > 0, "a comparison with zeros says nothing"
    return ((actual.double() - expected).norm() / norm).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str):
    """actual against a float64 reference, within its dtype's tolerance."""
    assert actual.shape == expected.shape, name
    error = relative_error(actual.detach(), expected.detach())
    assert error <= TOLERANCES[actual.dtype], f"{name} is off by {error:.1e}"
