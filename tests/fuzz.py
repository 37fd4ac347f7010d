"""Random problems of every form, and whether a kernel's answers to them are right.

    python tests/fuzz.py --cases 20000            # on the GPU if there is one, else on the CPU
    python tests/fuzz.py --seed 1234 --cases 1    # one again

A problem is drawn by a random.Random: Hypothesis brings its own, which it can shrink
(test_fuzz.py), and a seed makes one that is the same everywhere. Each number of the output and of
every gradient is compared with the eager definition in float64, computed on the CPU from the
stored inputs; it may be off by its own rounding, and by a few roundings of the terms it is made of.
Where that is NaN or infinite, so must the number be. Levels that overlap are refused on a CPU.
"""

import argparse
import math
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields

import torch
from cases import (
    MIXABLE,
    Case,
    FusedInputs,
    Inputs,
    Problem,
    level_tensors,
    locations_of,
    on_the_exact_side,
)

LARGEST = 2**17  # samples times channels, and elements of value, that a problem has
ROUNDINGS = 16  # by which a sum of magnitude 1 may be off
SPECIAL = [math.nan, math.inf, -math.inf, 1e30, -1e30]
CHANNELS = [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 30, 32, 33, 40, 48, 64, 71, 96, 128, 130, 160, 256]
SPREADS = ["uniform", "centres", "edges", "corner", "far"]


# --------------------------------------------------------------------------------------- problems


@dataclass
class Fuzz:
    """A problem and how to call it. inputs: stored as the operator gets them, on the CPU."""

    text: str
    inputs: Problem
    deterministic: bool
    # What the tensors are stored in, by name: a function of (tensor on its device) to a view.
    layouts: dict

    @property
    def operator(self) -> str:
        return "fused_ms_deform_attn" if isinstance(self.inputs, FusedInputs) else "ms_deform_attn"

    @property
    def overlaps(self) -> bool:
        """Whether levels share pixels."""
        areas = self.inputs.spatial_shapes.long().prod(1)
        spans = sorted(zip(self.inputs.level_start_index.tolist(), areas.tolist()))
        return any(a + area > b for (a, area), (b, _) in zip(spans, spans[1:]))

    def on(self, device: str) -> Problem:
        """Copies of the inputs on the device, in their layouts, requiring gradients."""
        changes = {
            field.name: self.layouts[field.name](getattr(self.inputs, field.name).to(device))
            for field in fields(self.inputs)
            if field.name != "options"
        }
        return type(self.inputs)(**changes, options=self.inputs.options).require_grad()


def contiguous(tensor):
    return tensor.clone()


def strided(tensor):
    """Every other element of a larger tensor."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def transposed(tensor):
    """The first and the last dimension are swapped in memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def shifted(tensor):
    """Some elements past an aligned address: a misaligned view with a storage offset."""
    padded = torch.full((tensor.numel() + 3,), 7, dtype=tensor.dtype, device=tensor.device)
    padded[3:] = tensor.flatten()
    return padded[3:].view(tensor.shape)


def narrowed(tensor):
    """The middle of a tensor that is larger in dimension 1, as a chunk or split is."""
    if tensor.dim() < 2:
        return shifted(tensor)
    beside = torch.full_like(tensor[:, :1], 7)
    return torch.cat([beside, tensor, beside], 1).narrow(
        1, min(1, beside.shape[1]), tensor.shape[1]
    )


LAYOUTS = [contiguous, contiguous, strided, transposed, shifted, narrowed]


def draw_size(rng: random.Random, low: int, high: int) -> int:
    """Small ones more often."""
    return rng.randint(low, max(low, min(high, rng.choice([4, 16, high]))))


def draw_case(rng: random.Random) -> Case:
    levels = rng.randint(1, 6)
    shapes = []
    for _ in range(levels):
        height, width = draw_size(rng, 1, 40), draw_size(rng, 1, 40)
        kind = rng.randrange(6)
        shapes.append([(1, 1), (1, width), (height, 1)][kind] if kind < 3 else (height, width))
    heads = rng.randint(1, 16)
    channels = rng.choice(CHANNELS) if rng.random() < 0.8 else rng.randint(1, 260)
    points = rng.randint(1, 12)
    points_per_level = None
    if rng.random() < 0.25:
        points_per_level = tuple(rng.randint(0, points) for _ in shapes)
        if not any(points_per_level):
            points_per_level = (points, *points_per_level[1:])

    # Within the limit, with less of what is left to choose.
    pixels = sum(h * w for h, w in shapes)
    while pixels * heads * channels > LARGEST:
        if rng.random() < 0.5:
            channels = (channels + 1) // 2
        else:
            heads = (heads + 1) // 2
    batch = rng.randint(0, 5) or rng.randint(0, 5)  # seldom none
    batch = min(batch, max(1, LARGEST // (pixels * heads * channels)))
    samples = sum(points_per_level or [points] * levels)
    most = max(1, LARGEST // (max(batch, 1) * heads * channels * samples))
    queries = draw_size(rng, 0 if rng.random() < 0.1 else 1, min(300, most))
    if rng.random() < 0.2 and pixels <= 2 * most:
        queries = pixels  # as in an encoder
    return Case(
        "fuzz",
        tuple(shapes),
        batch,
        queries,
        heads,
        channels,
        points,
        rng.choice(SPREADS),
        points_per_level,
        "nearest" if rng.random() < 0.15 else "bilinear",
    )


def draw_dtypes(rng: random.Random, names: list[str]) -> dict:
    """value's, and each operand's: the same, or any mixture of those below float64."""
    dtype = rng.choice([*MIXABLE, torch.float64])
    mixed = dtype in MIXABLE and rng.random() < 0.5
    operands = {name: rng.choice(MIXABLE) if mixed else dtype for name in names}
    return {"value": dtype, "grad_output": dtype, **operands}


def sprinkle(rng, generator, tensor, specials):
    """Puts specials into a few elements."""
    if rng.random() < 0.3 and tensor.numel():
        chosen = torch.rand(tensor.shape, generator=generator) < rng.choice([0.01, 0.2])
        values = torch.tensor(specials, dtype=torch.float64)
        which = torch.randint(len(specials), tensor.shape, generator=generator)
        tensor[chosen] = values[which][chosen]
    return tensor


def draw_weights(rng, generator, case: Case):
    """Normalised or not, some zero."""
    weights = torch.randn(case.points_shape, generator=generator, dtype=torch.float64)
    if rng.random() < 0.5:
        weights = weights.flatten(3).softmax(-1).view(case.points_shape)
    if rng.random() < 0.3:
        weights[torch.rand(weights.shape, generator=generator) < 0.3] = 0
    return weights


def draw_levels(rng, case: Case, value):
    """spatial_shapes and level_start_index of any integers, and value with its levels in any
    order, or some of them anywhere in it."""
    shapes, starts = level_tensors(case.shapes)
    if rng.random() < 0.1:
        for level, (height, width) in enumerate(case.shapes):
            if rng.random() < 0.5:
                starts[level] = rng.randint(0, case.pixels - height * width)
    if rng.random() < 0.2:
        order = list(range(len(case.shapes)))
        rng.shuffle(order)
        parts = value.split([h * w for h, w in case.shapes], 1)
        value = torch.cat([parts[level] for level in order], 1)
        _, moved = level_tensors([case.shapes[level] for level in order])
        starts = torch.empty_like(starts)
        starts[order] = moved
    integers = [torch.int32, torch.int64]
    return value, shapes.to(rng.choice(integers)), starts.to(rng.choice(integers))


def draw(rng: random.Random) -> Fuzz:
    """One problem of either operator."""
    case = draw_case(rng)
    fused = rng.random() < 0.4
    deterministic = rng.random() < 0.3
    seed = rng.randrange(2**32)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = {
        "value": normal(case.batch, case.pixels, case.heads, case.channels),
        "grad_output": normal(case.batch, case.queries, case.heads * case.channels),
    }
    options = case.options
    if fused:
        names = ["reference_points", "sampling_offsets", "attention_logits"]
        coordinates, for_all = rng.choice([2, 4]), rng.random() < 0.3
        if coordinates == 4 and rng.random() < 0.5:
            options["offset_scale"] = rng.choice([0.25, 1.0, 0.3])
        levels = 1 if for_all else len(case.shapes)
        size = (case.batch, case.queries, levels, coordinates)
        reference = torch.rand(size, generator=generator, dtype=torch.float64) * 1.2 - 0.1
        if rng.random() < 0.3:
            reference = (reference * 8).round() / 8
        offsets = normal(*case.points_shape, 2) * rng.choice([0.5, 2, 30])
        if rng.random() < 0.3:
            offsets = offsets.round()
        logits = normal(*case.points_shape) * rng.choice([0, 1, 5])
        # An infinite box or offset would have a derivative of 0 * inf in the eager definition.
        specials = SPECIAL if coordinates == 2 else [3e4, -3e4]
        tensors["reference_points"] = reference
        sprinkle(rng, generator, reference[..., :2], SPECIAL)
        tensors["sampling_offsets"] = sprinkle(rng, generator, offsets, specials)
        tensors["attention_logits"] = logits
    else:
        names = ["sampling_locations", "attention_weights"]
        locations = locations_of(case, generator).view(*case.points_shape, 2)
        tensors["sampling_locations"] = sprinkle(rng, generator, locations, SPECIAL)
        tensors["attention_weights"] = draw_weights(rng, generator, case)
    dtypes = draw_dtypes(rng, names)
    value, shapes, starts = draw_levels(rng, case, tensors["value"])
    # On a centre, the last rounding tells whether the next pixel has a share of zero, or none.
    if rng.random() < 0.5 and case.locations != "centres":
        value = sprinkle(rng, generator, value, [math.nan, math.inf, -math.inf])
    tensors["value"] = value
    tensors = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
    tensors |= {"spatial_shapes": shapes, "level_start_index": starts}
    inputs = (FusedInputs if fused else Inputs)(**tensors, options=options)
    if fused:
        move_off_the_centres(inputs)

    layouts = {name: rng.choice(LAYOUTS) for name in tensors}
    for name in ("spatial_shapes", "level_start_index"):
        layouts[name] = rng.choice([contiguous, strided])
    text = f"{case}, {'fused' if fused else 'plain'}, {options}, tensors from {seed}, " + ", ".join(
        f"{name}: {tuple(x.shape)} {x.dtype} {layouts[name].__name__}"
        for name, x in tensors.items()
    )
    return Fuzz(text, inputs, deterministic, layouts)


# --------------------------------------------------------------------------------------- geometry


def numbers_of_points(inputs: Problem) -> list[int]:
    points = inputs.options.get("points_per_level")
    tensor = inputs.args[-1]
    return points or [tensor.shape[4]] * tensor.shape[3]


def flat(inputs: Problem, tensor: torch.Tensor) -> torch.Tensor:
    """With one dimension for the points of all levels."""
    return tensor if "points_per_level" in inputs.options else tensor.flatten(3, 4)


def pixels_of(inputs: Problem, operands: list[torch.Tensor]) -> torch.Tensor:
    """location * size of each point, (batch, queries, heads, points, 2).

    operands: in the place of the inputs' locations, or reference points and offsets.
    """
    points = torch.tensor(numbers_of_points(inputs))
    sizes = inputs.spatial_shapes.long().flip(1).double().repeat_interleave(points, 0)
    if isinstance(inputs, Inputs):
        return flat(inputs, operands[0]) * sizes
    reference, offsets = operands
    levels = torch.arange(len(points)).clamp(max=reference.shape[2] - 1).repeat_interleave(points)
    reference, offsets = reference[:, :, levels][:, :, None], flat(inputs, offsets)
    if reference.shape[-1] == 4:
        scale = inputs.options.get("offset_scale", 0.5) / points.double().repeat_interleave(points)
        return reference[..., :2] * sizes + offsets * reference[..., 2:] * scale[:, None] * sizes
    return reference[..., :2] * sizes + offsets


def move_off_the_centres(inputs: FusedInputs) -> None:
    """Where a point falls on a pixel centre, where gradients jump, but float64 may round it to
    the other side, its offset changes by its last digit."""
    offsets = inputs.sampling_offsets
    for _ in range(4):
        pixels = pixels_of(inputs, [inputs.reference_points.double(), offsets.double()]) - 0.5
        near = (pixels - pixels.round()).abs() < 1e-7
        near = near.view(offsets.shape) & (offsets.abs() < 1e3)
        if not near.any():
            return
        moved = offsets.double() * (1 + 4 * torch.finfo(offsets.dtype).eps) + 1e-3
        offsets[near] = moved.to(offsets.dtype)[near]


def bounds(inputs: Problem, unit: float) -> dict[str, torch.Tensor]:
    """What the output and each gradient may be off by, through roundings of the size of unit.

    The numbers are sums; each term is bounded by the same with all four corners' shares 1, and
    the sum of those bounds is what a rounding is relative to.

    Args:
        inputs: in float64.
    """
    fused = isinstance(inputs, FusedInputs)
    names = ["value", *(name[5:] for name in inputs.gradient_names()[1:])]
    value, *operands, last = (getattr(inputs, name).detach() for name in names)
    # What is finite has no part of a value that is not.
    value = value.nan_to_num(0, 0, 0).abs().requires_grad_()
    weights = flat(inputs, last)
    weights = (weights.softmax(-1) if fused else weights.abs()).requires_grad_()

    # Corner by corner, as the definition has it, but unweighted.
    pixels = pixels_of(inputs, operands) - 0.5
    finite = pixels.isfinite().all(-1)
    nearest = inputs.options.get("method") == "nearest"
    batch, _, heads, channels = value.shape
    table = value.permute(0, 2, 1, 3)
    total = torch.zeros(batch, heads, pixels.shape[1], channels, dtype=torch.float64)
    points = numbers_of_points(inputs)
    parts = zip(
        inputs.spatial_shapes.tolist(),
        inputs.level_start_index.tolist(),
        pixels.split(points, 3),
        finite.split(points, 3),
        weights.split(points, 3),
    )
    for (height, width), start, pixel, is_finite, weight in parts:
        x, y = pixel.floor().unbind(-1)
        for down in (0, 1):
            for right in (0, 1):
                row, column = y + down, x + right
                if nearest:
                    row, column = (y + 1).clamp(0, height - 1), (x + 1).clamp(0, width - 1)
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & is_finite
                index = torch.where(inside, row * width + column, 0).long() + start
                share = torch.where(inside, weight, 0).transpose(1, 2)
                index = index.transpose(1, 2).flatten(2)[..., None].expand(-1, -1, -1, channels)
                corner = torch.gather(table, 2, index).view(*share.shape, channels)
                total = total + (share[..., None] * corner).sum(3)
    output = total.transpose(1, 2).flatten(2)
    of_value, of_weights = torch.autograd.grad(
        output, (value, weights), inputs.grad_output.abs(), materialize_grads=True
    )
    weights = weights.detach()
    result = {"output": output.detach(), "value": of_value}

    # By pixel a weight's share changes by one, at most.
    of_pixels = (weights * of_weights)[..., None].expand(*weights.shape, 2) * (0 if nearest else 1)
    operands = [x.nan_to_num(0, 0, 0).abs().requires_grad_() for x in operands]
    gradients = torch.autograd.grad(
        pixels_of(inputs, operands), operands, of_pixels, materialize_grads=True
    )
    result |= dict(zip(names[1:-1], gradients))
    if fused:
        of_weights = weights * (of_weights + (weights * of_weights).sum(-1, keepdim=True))
        # exp(logit - largest) is off by as many roundings as that is large.
        logits = flat(inputs, last)
        if logits.numel():
            of_weights = of_weights * (1 + (logits - logits.amax(-1, keepdim=True)).abs())
            spread = 1 + (logits.amax() - logits.amin()).item()
            result = {name: bound * spread for name, bound in result.items()}
    result[names[-1]] = of_weights.view(last.shape)
    return {name: bound * ROUNDINGS * unit for name, bound in result.items()}


# ------------------------------------------------------------------------------------------ check


def largest_excess(fuzz: Fuzz, kernel, device: str) -> dict[str, float]:
    """By tensor, the largest error over what it may be; the kernel runs on the device."""
    inputs = fuzz.on(device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(fuzz.deterministic)
    refusable = device == "cpu" and fuzz.overlaps
    try:
        output = getattr(kernel, fuzz.operator)(*inputs.args, **inputs.options)
        assert not refusable, "levels that overlap were not refused"
        gradients = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    except RuntimeError as error:
        if refusable and "expected no overlap" in str(error):
            return {"output": 0.0}
        raise
    finally:
        torch.use_deterministic_algorithms(before)
    actual = {"output": output, **dict(zip(inputs.gradient_names(), gradients))}

    reference = fuzz.inputs.double()
    if fuzz.operator == "ms_deform_attn" and fuzz.inputs.value.dtype == torch.float64:
        points = numbers_of_points(fuzz.inputs)
        locations = flat(reference, reference.sampling_locations)
        moved = on_the_exact_side(locations, reference.spatial_shapes.tolist(), points)
        reference.sampling_locations = moved.view(reference.sampling_locations.shape)
    double = fuzz.inputs.value.dtype == torch.float64
    allowed = bounds(reference, 2**-46 if double else 2**-23)
    reference.require_grad()
    output = getattr(kernel.reference, fuzz.operator)(*reference.args, **reference.options)
    gradients = torch.autograd.grad(
        output, reference.differentiable(), reference.grad_output, materialize_grads=True
    )
    expected = {"output": output, **dict(zip(reference.gradient_names(), gradients))}

    excess = {}
    for name, tensor in actual.items():
        wanted, dtype = expected[name].detach(), tensor.dtype
        source = fuzz.inputs.value if name == "output" else getattr(fuzz.inputs, name[5:])
        assert (tensor.shape, dtype) == (wanted.shape, source.dtype), name
        if not wanted.numel():
            excess[name] = 0.0
            continue
        stored = tensor.detach().cpu()
        error = (stored.double() - wanted).abs()
        same = stored == wanted.to(dtype)  # also where both are beyond the largest number
        error[same | (stored.isnan() & wanted.isnan())] = 0
        info = torch.finfo(dtype)
        # Its own rounding, also below the smallest normal number.
        finite = wanted.nan_to_num(0, 0, 0).abs()
        may_be = allowed[name.removeprefix("grad_")] + 0.51 * info.eps * finite
        ratio = error / (may_be + 0.51 * info.eps * info.tiny)
        excess[name] = math.inf if ratio.isnan().any() else ratio.max().item()
    return excess


def check(fuzz: Fuzz, kernel, device: str) -> float:
    """The largest error over what it may be, which is at most 1; else AssertionError."""
    excess = largest_excess(fuzz, kernel, device)
    for name, ratio in excess.items():
        assert ratio <= 1, f"{name} is off by {ratio:.3g} times what it may be\n{fuzz.text}"
    return max(excess.values())


# -------------------------------------------------------------------------------------------- run


def run_seed(seed: int, device: str) -> tuple[int, float, str]:
    """(seed, largest error over what it may be, what is wrong)."""
    from conftest import KERNEL

    try:
        return seed, check(draw(random.Random(seed)), KERNEL, device), ""
    except Exception as error:  # every way to fail counts, and is told with its seed
        return seed, math.inf, f"{type(error).__name__}: {error}"


def _run_seeds(seeds: range, device: str) -> list[tuple[int, float, str]]:
    torch.set_num_threads(1)
    return [run_seed(seed, device) for seed in seeds]


def run(first_seed: int, cases: int, device: str, jobs: int) -> list[tuple[int, float, str]]:
    """The results of the seeds from first_seed on, from that many processes."""
    chunk = 50
    parts = [
        range(start, min(start + chunk, first_seed + cases))
        for start in range(first_seed, first_seed + cases, chunk)
    ]
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        results = pool.map(_run_seeds, parts, [device] * len(parts))
        return [result for part in results for result in part]


def main() -> int:
    parser = argparse.ArgumentParser("python tests/fuzz.py", description=__doc__.split("\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    start = time.perf_counter()
    results = run(args.seed, args.cases, args.device, args.jobs)
    failures = [result for result in results if result[2]]
    for seed, _, text in failures[:20]:
        print(f"--seed {seed} --cases 1 --device {args.device}: {text}\n")
    worst_seed, worst, _ = max(results, key=lambda result: result[1])
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(
        f"{len(results)} cases on {where}, torch {torch.__version__}: {len(failures)} failed; "
        f"the largest error is {worst:.2f} of what it may be (seed {worst_seed}); "
        f"{time.perf_counter() - start:.0f} s"
    )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
