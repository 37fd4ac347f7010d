"""ms_deform_attn_list: its layouts, and the level tensors that it keeps between calls."""

import pytest
import torch
from cases import SMALL, Case, assert_close, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

D_FINE = Case("d_fine", ((9, 14), (5, 7), (3, 4)), points_per_level=(3, 6, 3))


def call(kernel, inputs, shapes=SMALL.shapes, **options):
    """ms_deform_attn_list on the tensors of ms_deform_attn."""
    return kernel.ms_deform_attn_list(
        inputs.value,
        shapes,
        inputs.sampling_locations,
        inputs.attention_weights,
        **inputs.options,
        **options,
    )


def levels_last(inputs, case):
    """value as a list of the levels, (batch, heads, channels, pixels) each."""
    areas = [height * width for height, width in case.shapes]
    return list(inputs.value.permute(0, 2, 3, 1).split(areas, -1))


# ----------------------------------------------------------------------------------------- layouts


@pytest.mark.kernels_ci
@pytest.mark.parametrize("shapes", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
@pytest.mark.parametrize("case", [SMALL, D_FINE], ids=lambda case: case.name)
def test_equals_the_operator(kernel, device, case, shapes):
    inputs = make_inputs(case, torch.float32, device)
    shapes = shapes(case.shapes)
    if isinstance(shapes, torch.Tensor):
        shapes = shapes.to(device)
    expected = kernel.ms_deform_attn(*inputs.args, **inputs.options)
    for _ in range(2):  # as made, and as kept
        assert torch.equal(call(kernel, inputs, shapes), expected)


@pytest.mark.parametrize("case", [SMALL, D_FINE], ids=lambda case: case.name)
def test_layouts_of_value(kernel, device, case):
    inputs = make_inputs(case, torch.float64, device).require_grad()
    expected = kernel.ms_deform_attn(*inputs.args, **inputs.options)
    expected_grads = torch.autograd.grad(expected, inputs.differentiable(), inputs.grad_output)
    value = inputs.value
    areas = [height * width for height, width in case.shapes]
    layouts = [
        (value.permute(0, 2, 3, 1), True),
        (value.permute(0, 2, 3, 1).contiguous(), True),
        (list(value.split(areas, 1)), False),
        (levels_last(inputs, case), True),
        (tuple(levels_last(inputs, case)), True),
    ]
    for laid_out, channels_first in layouts:
        output = kernel.ms_deform_attn_list(
            laid_out, case.shapes, *inputs.args[3:], **inputs.options, channels_first=channels_first
        )
        assert_close(output, expected, "output")
        grads = torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output)
        for grad, expected_grad in zip(grads, expected_grads):
            assert_close(grad, expected_grad, "gradient")


def test_flat_weights(kernel, device):
    inputs = make_inputs(SMALL, torch.float32, device)
    expected = kernel.ms_deform_attn(*inputs.args)
    inputs.attention_weights = inputs.attention_weights.flatten(3)
    assert torch.equal(call(kernel, inputs), expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "spatial_shapes is empty, expected"),
        ([(7, 9), (4, 5, 1)], r"spatial_shapes has a level \(4, 5, 1\), expected"),
    ],
    ids=["empty", "three_numbers"],
)
def test_refuses_sizes(kernel, shapes, message):
    inputs = make_inputs(SMALL, torch.float32)
    with pytest.raises(ValueError, match=message):
        call(kernel, inputs, shapes)


# ------------------------------------------------------------------- what is kept between the calls


def sizes_of_its_own(index):
    """A case with sizes that no other test has: what this one keeps tells of this one alone."""
    return Case("own", ((11 + index, 13), (3, 17 + index)))


def call_under_fake_tensors(function, tensors):
    with FakeTensorMode() as mode:
        function(*(mode.from_tensor(tensor) for tensor in tensors))


def call_in_an_aot_trace(function, tensors):
    aot_autograd = pytest.importorskip("functorch.compile")
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    aot_autograd.aot_function(function, aot_autograd.nop)(*tensors)


def call_in_make_fx(function, tensors):
    torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="symbolic")(*tensors)


CALLS = {
    "FakeTensorMode": call_under_fake_tensors,
    "functionalize": lambda function, tensors: torch.func.functionalize(function)(*tensors),
    "aot_function": call_in_an_aot_trace,
    "make_fx": call_in_make_fx,
    "vmap": lambda function, tensors: torch.func.vmap(function)(*(x[None] for x in tensors)),
    "inference_mode": lambda function, tensors: torch.inference_mode()(function)(*tensors),
}


@pytest.mark.parametrize("kept_before", [False, True], ids=["first_call", "later_call"])
@pytest.mark.parametrize("mode", CALLS)
def test_nothing_is_kept_from_a_mode_or_lent_to_it(kernel, device, mode, kept_before):
    case = sizes_of_its_own(2 * list(CALLS).index(mode) + kept_before)
    inputs = make_inputs(case, torch.float32, device)

    def function(value, locations, weights):
        return kernel.ms_deform_attn_list(value, case.shapes, locations, weights)

    expected = kernel.ms_deform_attn(*inputs.args)
    if kept_before:
        assert torch.equal(function(*inputs.differentiable()), expected)
    CALLS[mode](function, inputs.differentiable())
    output = function(*inputs.require_grad().differentiable())
    assert type(output) is torch.Tensor and torch.equal(output, expected)
    output.sum().backward()


def test_more_sizes_than_are_kept(kernel, device, monkeypatch):
    monkeypatch.setattr(kernel.levels, "_kept", {})
    monkeypatch.setattr(kernel.levels, "_MOST", 2)
    for height in (3, 4, 5, 3, 5):
        inputs = make_inputs(Case("more", ((height, 4),)), torch.float32, device)
        output = call(kernel, inputs, [(height, 4)])
        assert torch.equal(output, kernel.ms_deform_attn(*inputs.args))
    assert len(kernel.levels._kept) == 2


@pytest.mark.parametrize("kept_before", [False, True], ids=["made_in_capture", "kept_before"])
def test_cuda_graph(kernel, kept_before):
    """What a graph has captured stays where it is, and what a capture makes is not lent out."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    case = sizes_of_its_own(100 + kept_before)
    inputs = make_inputs(case, torch.float32, "cuda")
    expected = kernel.ms_deform_attn(*inputs.args)
    if kept_before:
        call(kernel, inputs, case.shapes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(kernel, inputs, case.shapes)
    assert torch.equal(call(kernel, inputs, case.shapes), expected), "before the graph has run"
    for height in range(200):  # other sizes, some of which would take the place of a freed one
        other = make_inputs(Case("other", ((height + 1, 3),)), torch.float32, "cuda")
        call(kernel, other, [(height + 1, 3)])
    graph.replay()
    assert torch.equal(output, expected)


# ------------------------------------------------------------------------------------ dynamic sizes


class Pyramid(torch.nn.Module):
    """Samples from the image and its half, whose sizes it reads from the image, as models do."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, image, locations, weights):
        maps = [image, torch.nn.functional.avg_pool2d(image, 2)]
        value = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1).unsqueeze(2)
        return self.function(value, [x.shape[-2:] for x in maps], locations, weights)


def pyramid_inputs(height, width, device):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 8, height, width), (2, 5, 1, 2, 3, 2), (2, 5, 1, 2, 3)
    return tuple(torch.rand(shape, generator=generator).to(device) for shape in shapes)


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_keeps_the_image_size_dynamic(kernel, device, strict):
    if torch.__version__ < (2, 12):
        pytest.skip("torch 2.11 exports avg_pool2d for even sizes alone")
    size = {2: torch.export.Dim("height", min=4, max=99), 3: torch.export.Dim("width", min=4)}
    module = Pyramid(kernel.ms_deform_attn_list)
    program = torch.export.export(
        module, pyramid_inputs(14, 12, device), dynamic_shapes=(size, None, None), strict=strict
    )
    for sizes in ((14, 12), (10, 16), (30, 6), (5, 7)):
        inputs = pyramid_inputs(*sizes, device)
        assert torch.equal(program.module()(*inputs), module(*inputs))


def test_compile_with_dynamic_sizes(kernel, device):
    torch._dynamo.reset()
    module = Pyramid(kernel.ms_deform_attn_list)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*pyramid_inputs(14, 12, device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((10, 16), (30, 6)):
            inputs = pyramid_inputs(*sizes, device)
            assert torch.equal(compiled(*inputs), module(*inputs))
