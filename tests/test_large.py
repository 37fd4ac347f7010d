"""Tensors of more than 2^31 elements, and grids beyond their limits: on a GPU with the memory.

Sampled rows and whole (batch, head) maps are compared with the reference in float64. What is too
much for that is held to an identity: the output is linear in value, so that
<grad_value, value> = <grad_output, output>, where grad_value has every point's contribution.
"""

import pytest
import torch
from cases import assert_close, level_tensors

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


def make(batch, queries, heads, channels, shapes, points, dtype=HALF):
    """Inputs and a grad_output, drawn on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(function, *size):
        return function(size, generator=generator, dtype=dtype, device="cuda")

    spatial_shapes, starts = level_tensors(shapes, "cuda")
    pixels = sum(h * w for h, w in shapes)
    value = draw(torch.randn, batch, pixels, heads, channels)
    locations = draw(torch.rand, batch, queries, heads, len(shapes), points, 2)
    weights = draw(torch.rand, batch, queries, heads, len(shapes), points)
    # So that no gradient of a location on a wide map is beyond the largest half.
    grad_output = draw(torch.randn, batch, queries, heads * channels) / 32
    return [value, spatial_shapes, starts, locations, weights], grad_output


def run(kernel, args, grad_output, deterministic=False):
    output = kernel.ms_deform_attn(*args)
    torch.use_deterministic_algorithms(deterministic)
    try:
        grads = kernel.ms_deform_attn_backward(*args, grad_output, 64)
    finally:
        torch.use_deterministic_algorithms(False)
    return [output, *grads]


def check_part(kernel, args, grad_output, results, batch, queries, head, whole=False):
    """One batch item's queries and head against float64; whole: these are all queries, so that
    grad_value is known, too."""
    value, shapes, starts, locations, weights = args
    channels = value.shape[3]
    part = slice(batch, batch + 1)

    def of_head(tensor):
        return tensor[part, queries].unflatten(2, (-1, channels))[:, :, head]

    inputs = [
        value[part, :, head : head + 1].double().requires_grad_(),
        locations[part, queries, head : head + 1].double().requires_grad_(),
        weights[part, queries, head : head + 1].double().requires_grad_(),
    ]
    expected = kernel.reference.ms_deform_attn(inputs[0], shapes, starts, *inputs[1:])
    grads = torch.autograd.grad(expected, inputs, of_head(grad_output).double())
    output, grad_value, grad_locations, grad_weights = results
    assert_close(of_head(output), expected, "output")
    assert_close(grad_locations[part, queries, head : head + 1], grads[1], "grad of locations")
    assert_close(grad_weights[part, queries, head : head + 1], grads[2], "grad of weights")
    if whole:
        assert_close(grad_value[part, :, head : head + 1], grads[0], "grad_value")


def inner_product(a, b):
    a, b = a.flatten(), b.flatten()
    step = 2**27
    starts = range(0, a.numel(), step)
    return sum((a[i : i + step].double() * b[i : i + step].double()).sum().item() for i in starts)


def check_identity(args, grad_output, results):
    ours = inner_product(results[1], args[0])
    expected = inner_product(grad_output, results[0])
    # Each of the many numbers is rounded to a half; their errors do not add up.
    scale = (inner_product(results[0], results[0]) * inner_product(grad_output, grad_output)) ** 0.5
    assert abs(ours - expected) <= 2e-5 * scale, f"{ours} and {expected}"


ALL = slice(None)


@pytest.mark.parametrize("deterministic", [False, True])
def test_value_of_many_batch_items(kernel, deterministic):
    need(30)
    args, grad_output = make(1030, 100, 8, 64, ((64, 64),), 4)
    assert args[0].numel() > LIMIT
    results = run(kernel, args, grad_output, deterministic)
    for batch in (0, 511, 1023, 1029):
        check_part(kernel, args, grad_output, results, batch, ALL, 7, whole=True)
    check_identity(args, grad_output, results)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [256, 259])
def test_value_of_one_batch_item(kernel, channels, deterministic):
    """Also with channels that do not come in vectors."""
    need(50)
    args, grad_output = make(1, 4000, 8, channels, ((1100, 1000),), 4)
    assert args[0].numel() > LIMIT
    results = run(kernel, args, grad_output, deterministic)
    check_part(kernel, args, grad_output, results, 0, ALL, 0, whole=True)
    check_part(kernel, args, grad_output, results, 0, ALL, 7, whole=True)


def some(queries):
    """The first, the last and a few between."""
    return torch.linspace(0, queries - 1, 999, device="cuda", dtype=torch.float64).long()


@pytest.mark.parametrize("deterministic", [False, True])
def test_locations(kernel, deterministic):
    need(30)
    queries = 1_100_000 if not deterministic else 1_060_000
    args, grad_output = make(1, queries, 8, 8, ((200, 160), (100, 80), (50, 40), (25, 20)), 32)
    assert args[3].numel() > LIMIT
    results = run(kernel, args, grad_output, deterministic)
    for head in (0, 7):
        check_part(kernel, args, grad_output, results, 0, some(queries), head)
    check_identity(args, grad_output, results)


@pytest.mark.parametrize("pixels, gigabytes", [((2200, 1000), 50), ((30, 20), 30)], ids=str)
def test_output(kernel, pixels, gigabytes):
    """Of many queries, once as many as value has pixels: then value is as large."""
    need(gigabytes)
    queries = 2_200_000
    args, grad_output = make(1, queries, 8, 128, (pixels,), 1)
    assert grad_output.numel() > LIMIT
    assert args[0].numel() > LIMIT or args[0].shape[1] != queries
    results = run(kernel, args, grad_output)
    for head in (0, 7):
        check_part(kernel, args, grad_output, results, 0, some(queries), head)
    check_identity(args, grad_output, results)


def test_more_threads_than_2_31(kernel):
    """A warp for each of 2^26 rows and more."""
    need(40)
    queries = 2**26 + 12345
    args, grad_output = make(1, queries, 1, 1, ((300, 200),), 1, torch.float32)
    results = run(kernel, args, grad_output)
    check_part(kernel, args, grad_output, results, 0, ALL, 0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("batch, heads", [(70_000, 1), (1, 70_000), (65_537, 2)])
def test_more_than_65535(kernel, batch, heads, deterministic):
    """Batch items and heads, which are grid dimensions."""
    need(10)
    args, grad_output = make(batch, 20, heads, 8, ((3, 4), (2, 2)), 2, torch.float32)
    results = run(kernel, args, grad_output, deterministic)
    for item in {0, batch // 2, batch - 1}:
        for head in {0, heads // 2, heads - 1}:
            check_part(kernel, args, grad_output, results, item, ALL, head, whole=True)
    check_identity(args, grad_output, results)


def test_more_than_65535_where_queries_are_pixels(kernel):
    need(10)
    args, grad_output = make(1, 16, 70_000, 8, ((3, 4), (2, 2)), 2, torch.float32)
    results = run(kernel, args, grad_output)
    for head in (0, 65_535, 65_536, 69_999):
        check_part(kernel, args, grad_output, results, 0, ALL, head, whole=True)
