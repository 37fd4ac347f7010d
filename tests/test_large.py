"""Tensors of more than 2^31 elements, grids beyond their limits, the longest levels: most of it on
a GPU with the memory.

Sampled rows and whole (batch, head) maps are compared with the reference in float64. What is too
much for that is held to an identity: the output is linear in value, so that
<grad_value, value> = <grad_output, output>, where grad_value has every point's contribution.
"""

from dataclasses import replace

import pytest
import torch
from cases import TOLERANCES, FusedInputs, Inputs, assert_close, level_tensors

GIGABYTE = 10**9
LIMIT = 2**31
HALF = torch.float16


@pytest.fixture(autouse=True)
def free_memory():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def need(gigabytes):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * GIGABYTE:
        pytest.skip(f"{free / GIGABYTE:.0f} GB are free on the GPU, {gigabytes} are needed")


def make(
    operator,
    batch,
    queries,
    heads,
    channels,
    shapes,
    points,
    dtype=HALF,
    coordinates=2,
    device="cuda",
):
    """An operator's inputs, drawn on the device. coordinates: of the reference points, if fused."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(function, *size):
        return function(size, generator=generator, dtype=dtype, device=device)

    value = draw(torch.randn, batch, sum(h * w for h, w in shapes), heads, channels)
    of_points = (batch, queries, heads, len(shapes), points)
    if operator == "ms_deform_attn":
        kind = Inputs
        points = [draw(torch.rand, *of_points, 2), draw(torch.rand, *of_points)]
    else:
        kind = FusedInputs
        reference = draw(torch.rand, batch, queries, len(shapes), coordinates)
        points = [reference, draw(torch.randn, *of_points, 2), draw(torch.randn, *of_points)]
    # So that no gradient of a location on a wide map is beyond the largest half.
    grad_output = draw(torch.randn, batch, queries, heads * channels) / 32
    return kind(value, *level_tensors(shapes, device), *points, grad_output)


def name_of(inputs):
    return "fused_ms_deform_attn" if isinstance(inputs, FusedInputs) else "ms_deform_attn"


def run(kernel, inputs, deterministic=False):
    """Output and gradients."""
    inputs.require_grad()
    output = getattr(kernel, name_of(inputs))(*inputs.args)
    torch.use_deterministic_algorithms(deterministic)
    try:
        grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
    finally:
        torch.use_deterministic_algorithms(False)
    return [output.detach(), *grads]


def check_part(kernel, inputs, results, batch, queries, head, whole=False):
    """One batch item's queries and head against float64; whole: these are all queries, so that
    grad_value is known, too. Returns, fused, the head's share of grad_reference_points."""
    channels = inputs.value.shape[3]
    item = slice(batch, batch + 1)

    def of_head(tensor):
        return tensor[item, queries].unflatten(2, (-1, channels))[:, :, head]

    def cut(name, tensor):
        if name == "grad_value":
            return tensor[item, :, head : head + 1]
        if name == "grad_reference_points":
            return tensor[item, queries]
        return tensor[item, queries, head : head + 1]

    names = inputs.gradient_names()
    part = replace(
        inputs,
        grad_output=of_head(inputs.grad_output).double(),
        **{
            name.removeprefix("grad_"): cut(name, tensor.detach()).double()
            for name, tensor in zip(names, inputs.differentiable())
        },
    ).require_grad()
    expected = getattr(kernel.reference, name_of(inputs))(*part.args)
    grads = torch.autograd.grad(expected, part.differentiable(), part.grad_output)
    assert_close(of_head(results[0]), expected, "output")
    share = None
    for name, result, grad in zip(names, results[1:], grads):
        if name == "grad_reference_points":
            share = grad
        elif whole or name != "grad_value":
            assert_close(cut(name, result), grad, name)
    return share


def check_heads(kernel, inputs, results, batch, queries, whole=False):
    """All heads of one batch item's queries, as check_part does one, and grad_reference_points."""
    heads = range(inputs.value.shape[2])
    shares = [check_part(kernel, inputs, results, batch, queries, head, whole) for head in heads]
    if isinstance(inputs, FusedInputs):
        grad_reference = results[1 + inputs.gradient_names().index("grad_reference_points")]
        grad_reference = grad_reference[batch : batch + 1, queries]
        assert_close(grad_reference, sum(shares), "grad_reference_points")


def inner_product(a, b):
    a, b = a.flatten(), b.flatten()
    step = 2**27
    starts = range(0, a.numel(), step)
    return sum((a[i : i + step].double() * b[i : i + step].double()).sum().item() for i in starts)


def check_identity(inputs, results):
    value, grad_output = inputs.value.detach(), inputs.grad_output
    ours = inner_product(results[1], value)
    expected = inner_product(grad_output, results[0])
    # Each of the many numbers is rounded to a half; their errors do not add up.
    scale = (inner_product(results[0], results[0]) * inner_product(grad_output, grad_output)) ** 0.5
    assert abs(ours - expected) <= 2e-5 * scale, f"{ours} and {expected}"


ALL = slice(None)


@pytest.mark.parametrize("deterministic", [False, True])
def test_value_of_many_batch_items(kernel, operator, deterministic):
    need(30)
    inputs = make(operator, 1030, 100, 8, 64, ((64, 64),), 4)
    assert inputs.value.numel() > LIMIT
    results = run(kernel, inputs, deterministic)
    for batch in (0, 511, 1023, 1029):
        check_heads(kernel, inputs, results, batch, ALL, whole=True)
    check_identity(inputs, results)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [256, 259])
def test_value_of_one_batch_item(kernel, operator, channels, deterministic):
    """Also with channels that do not come in vectors."""
    need(50)
    inputs = make(operator, 1, 4000, 8, channels, ((1100, 1000),), 4)
    assert inputs.value.numel() > LIMIT
    results = run(kernel, inputs, deterministic)
    check_heads(kernel, inputs, results, 0, ALL, whole=True)


def some(queries):
    """The first, the last and a few between."""
    return torch.linspace(0, queries - 1, 999, device="cuda", dtype=torch.float64).long()


@pytest.mark.parametrize("deterministic", [False, True])
def test_locations(kernel, deterministic):
    need(30)
    queries = 1_100_000 if not deterministic else 1_060_000
    shapes = ((200, 160), (100, 80), (50, 40), (25, 20))
    inputs = make("ms_deform_attn", 1, queries, 8, 8, shapes, 32)
    assert inputs.sampling_locations.numel() > LIMIT
    results = run(kernel, inputs, deterministic)
    for head in (0, 7):
        check_part(kernel, inputs, results, 0, some(queries), head)
    check_identity(inputs, results)


@pytest.mark.parametrize("deterministic", [False, True])
def test_offsets_and_logits(kernel, deterministic):
    """More than 2^31 logits, so more than 2^32 numbers in the offsets."""
    need(40)
    queries = 4_200_000
    shapes = ((200, 160), (100, 80), (50, 40), (25, 20))
    inputs = make("fused_ms_deform_attn", 1, queries, 8, 8, shapes, 16)
    assert inputs.attention_logits.numel() > LIMIT
    results = run(kernel, inputs, deterministic)
    check_heads(kernel, inputs, results, 0, some(queries))
    check_identity(inputs, results)


def test_reference_points(kernel):
    """And their gradient, which is summed up over the heads afterwards."""
    need(50)
    queries = 67_200_000
    inputs = make("fused_ms_deform_attn", 1, queries, 1, 8, ((40, 30),) * 8, 1, coordinates=4)
    assert inputs.reference_points.numel() > LIMIT
    results = run(kernel, inputs)
    check_heads(kernel, inputs, results, 0, some(queries))
    check_identity(inputs, results)


@pytest.mark.parametrize("pixels, gigabytes", [((2200, 1000), 50), ((30, 20), 30)], ids=str)
def test_output(kernel, pixels, gigabytes):
    """Of many queries, once as many as value has pixels: then value is as large."""
    need(gigabytes)
    queries = 2_200_000
    inputs = make("ms_deform_attn", 1, queries, 8, 128, (pixels,), 1)
    assert inputs.grad_output.numel() > LIMIT
    assert inputs.value.numel() > LIMIT or inputs.value.shape[1] != queries
    results = run(kernel, inputs)
    for head in (0, 7):
        check_part(kernel, inputs, results, 0, some(queries), head)
    check_identity(inputs, results)


def test_more_threads_than_2_31(kernel):
    """A warp for each of 2^26 rows and more."""
    need(40)
    queries = 2**26 + 12345
    inputs = make("ms_deform_attn", 1, queries, 1, 1, ((300, 200),), 1, torch.float32)
    results = run(kernel, inputs)
    check_part(kernel, inputs, results, 0, ALL, 0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("batch, heads", [(70_000, 1), (1, 65_535), (65_537, 2)])
def test_largest_batches_and_heads(kernel, batch, heads, deterministic):
    """Batch items beyond the size of a grid, and the most heads, which are grid dimensions."""
    need(10)
    shapes = ((3, 4), (2, 2))
    inputs = make("ms_deform_attn", batch, 20, heads, 8, shapes, 2, torch.float32)
    results = run(kernel, inputs, deterministic)
    for item in {0, batch // 2, batch - 1}:
        for head in {0, heads // 2, heads - 1}:
            check_part(kernel, inputs, results, item, ALL, head, whole=True)
    check_identity(inputs, results)


def test_most_heads_where_queries_are_pixels(kernel):
    need(10)
    inputs = make("ms_deform_attn", 1, 16, 65_535, 8, ((3, 4), (2, 2)), 2, torch.float32)
    results = run(kernel, inputs)
    for head in (0, 32_768, 65_534):
        check_part(kernel, inputs, results, 0, ALL, head, whole=True)


def check_long_level(kernel, device, pixels, dtype, tall, deterministic, tolerance):
    """A level with one row or column of this many pixels. The points lie at its start, its middle
    and its end; what is there is compared with a level of its own in float64."""
    part = 2**17
    starts = (0, pixels // 2 - 54321, pixels - part)
    along = 1 if tall else 0  # the coordinate that matters
    shape = (pixels, 1) if tall else (1, pixels)
    inputs = make("ms_deform_attn", 1, 300, 1, 1, (shape,), 4, dtype, device=device)
    # Float locations, as halves are too far apart; some lie outside of the level.
    locations_dtype = torch.promote_types(dtype, torch.float32)
    locations = inputs.sampling_locations.to(locations_dtype)
    for i, start in enumerate(starts):
        x = locations[:, i::3, ..., along]
        x = x * 1.01 - 0.02 if i == 0 else x * 0.98 + 0.01 + (i == 2) * 0.02
        locations[:, i::3, ..., along] = ((x.double() * part + start) / pixels).to(locations_dtype)
    inputs = replace(inputs, sampling_locations=locations)
    output, grad_value, grad_locations, grad_weights = run(kernel, inputs, deterministic)

    touched = 0
    for i, start in enumerate(starts):
        queries = slice(i, None, 3)
        here = slice(start, start + part)
        locations = inputs.sampling_locations.detach()[:, queries].double()
        locations[..., along] = (locations[..., along] * pixels - start) / part
        crop = replace(
            inputs,
            value=inputs.value.detach()[:, here].double(),
            spatial_shapes=torch.tensor([[part, 1] if tall else [1, part]], device=device),
            sampling_locations=locations,
            attention_weights=inputs.attention_weights.detach()[:, queries].double(),
            grad_output=inputs.grad_output[:, queries].double(),
        ).require_grad()
        expected = kernel.reference.ms_deform_attn(*crop.args)
        grads = torch.autograd.grad(expected, crop.differentiable(), crop.grad_output)
        grads[1][..., along] *= pixels / part
        assert_close(output[:, queries], expected, "output", tolerance)
        assert_close(grad_value[:, here], grads[0], "grad_value", tolerance)
        assert_close(grad_locations[:, queries], grads[1], "grad_sampling_locations", tolerance)
        assert_close(grad_weights[:, queries], grads[2], "grad_attention_weights", tolerance)
        touched += grad_value[:, here].count_nonzero()
    assert grad_value.count_nonzero() == touched


TALL = pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])


@pytest.mark.parametrize("deterministic", [False, True])
@TALL
def test_longest_level(kernel, tall, deterministic):
    need(60)
    # In float64, which counts them all. The crops' locations are rounded: hence the tolerance.
    check_long_level(kernel, "cuda", LIMIT - 1, torch.float64, tall, deterministic, 1e-6)


@pytest.mark.parametrize("deterministic", [False, True])
@TALL
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_longest_level_in_float32(kernel, device, dtype, tall, deterministic):
    check_long_level(kernel, device, 2**24, dtype, tall, deterministic, TOLERANCES[dtype])


def test_level_too_long_for_float32(kernel):
    inputs = make("ms_deform_attn", 1, 1, 1, 1, ((1, 2**24 + 1),), 1, device="cpu")
    with pytest.raises(RuntimeError, match=r"spatial_shapes has \(1, 16777217\) .* at most 2\^24"):
        kernel.ms_deform_attn(*inputs.args)


@pytest.mark.parametrize("deterministic", [False, True])
def test_one_query_with_many_points(kernel, deterministic):
    """2^24 in two levels; in float64, as so long a sum has no accuracy in float32."""
    need(40)
    inputs = make("ms_deform_attn", 1, 1, 1, 8, ((50, 60), (7, 5)), 2**23, torch.float64)
    results = run(kernel, inputs, deterministic)
    check_part(kernel, inputs, results, 0, ALL, 0, whole=True)
