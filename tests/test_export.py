"""Programs that leave this kernel behind: decomposed ones, and ONNX, run by onnxruntime.

Each is exported with dynamic batch, queries and sizes, and run with others.
"""

import functools

import pytest
import torch
from cases import OPERATORS, Case
from processes import python
from torch.export import Dim
from torch.nn import functional as F

EXPORTED = {"batch": 3, "queries": 11, "height": 14, "width": 20}
OTHERS = [EXPORTED, {"batch": 2, "queries": 5, "height": 9, "width": 24}]
OPTIONS = {
    "bilinear": {},
    "nearest": {"method": "nearest"},
    "points_per_level": {"points_per_level": (3, 5)},
}
# Of the largest output. GridSample takes locations as 2x - 1, and halves them again.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 1e-2}
# An export takes four seconds.
OTHER_DTYPES = [pytest.param(x, marks=pytest.mark.slow) for x in TOLERANCES if x != torch.float32]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, *OTHER_DTYPES], ids=str)


class Sizes(torch.nn.Module):
    """Sizes in tensors, as originals have them."""

    def __init__(self, function, options, dtype=None):
        super().__init__()
        self.function, self.options, self.dtype = function, options, dtype

    def forward(self, *args):
        output = self.function(*args, **self.options)
        return output if self.dtype is None else output.to(self.dtype)


def sizes_inputs(operator, dtype, options, batch, queries, height, width, coordinates=2):
    shapes = ((height, width), (height // 2, width // 2))
    case = Case("export", shapes, batch=batch, queries=queries, **options)
    more = {"coordinates": coordinates} if operator.startswith("fused") else {}
    return OPERATORS[operator](case, dtype, **more).args


def sizes_dynamic(args):
    batch, queries, pixels = (Dim(name, min=2) for name in ("batch", "queries", "pixels"))
    return (({0: batch, 1: pixels}, None, None, *({0: batch, 1: queries},) * (len(args) - 3)),)


class Pyramid(torch.nn.Module):
    """Sizes read from an image, as models do, and given as a list."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, image, query, reference_points):
        maps = [image, F.avg_pool2d(image, 2)]
        pixels = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        return self.attention(query, reference_points, pixels, [x.shape[-2:] for x in maps])


def pyramid(kernel, **options):
    torch.manual_seed(0)
    attention = kernel.modules.MSDeformAttn(16, n_levels=2, n_heads=4, n_points=3, **options)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Pyramid(attention).eval()


def pyramid_inputs(dtype, batch, queries, height, width):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 16, height, width), (batch, queries, 16), (batch, queries, 2, 4)
    return tuple(torch.rand(shape, generator=generator).to(dtype) for shape in shapes)


def pyramid_dynamic():
    batch, queries, height, width = (Dim(name, min=4) for name in EXPORTED)
    batch, queries = Dim("batch", min=2), Dim("queries", min=2)
    image = {0: batch, 2: height, 3: width}
    return (image, {0: batch, 1: queries}, {0: batch, 1: queries})


def check_close(actual, expected, tolerance=None):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    limit = (tolerance or TOLERANCES[expected.dtype]) * expected.abs().max()
    assert (actual.double() - expected.double()).abs().max() <= limit


# ------------------------------------------------------------------------------ decomposed programs


def decomposed(kernel, module, args, dynamic_shapes, strict=False):
    with torch.no_grad():
        program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=strict)
    assert any("ms_deform_attn" in str(node.target) for node in program.graph.nodes)
    table = torch.export.default_decompositions()
    table.update(kernel.integrations.decompositions())
    program = program.run_decompositions(table)
    assert not any("ms_deform_attn" in str(node.target) for node in program.graph.nodes)
    return program


@functools.cache
def decomposed_operator(kernel, operator, dtype, options):
    """The program and the module that it was made of."""
    args = sizes_inputs(operator, dtype, OPTIONS[options], **EXPORTED)
    module = Sizes(getattr(kernel, operator), OPTIONS[options])
    return decomposed(kernel, module, args, sizes_dynamic(args)), module


@each_dtype
@pytest.mark.parametrize("options", OPTIONS)
def test_decomposed(kernel, operator, dtype, options):
    program, module = decomposed_operator(kernel, operator, dtype, options)
    for sizes in OTHERS:
        args = sizes_inputs(operator, dtype, OPTIONS[options], **sizes)
        check_close(program.module()(*args), module(*args))


STRICT = pytest.param(True, marks=pytest.mark.slow)


@pytest.mark.parametrize("strict", [False, STRICT], ids=["non_strict", "strict"])
def test_decomposed_with_sizes_of_an_image(kernel, strict):
    if torch.__version__ < (2, 12):
        pytest.skip("torch 2.11 exports avg_pool2d for even sizes alone")
    module = pyramid(kernel)
    args = pyramid_inputs(torch.float32, **EXPORTED)
    program = decomposed(kernel, module, args, pyramid_dynamic(), strict)
    for sizes in OTHERS:
        args = pyramid_inputs(torch.float32, **sizes)
        with torch.no_grad():
            check_close(program.module()(*args), module(*args))


LOADS_A_PROGRAM = """
import torch
program = torch.export.load({program!r})
inputs = torch.load({inputs!r})
torch.save(program.module()(*inputs), {output!r})
assert not any("deformable_detr" in name for name in sys.modules)
"""


def test_a_decomposed_program_needs_no_kernel(kernel, operator, tmp_path):
    program, module = decomposed_operator(kernel, operator, torch.float32, "bilinear")
    paths = {name: str(tmp_path / f"{name}.pt2") for name in ("program", "inputs", "output")}
    torch.export.save(program, paths["program"])
    args = sizes_inputs(operator, torch.float32, {}, **OTHERS[1])
    torch.save(args, paths["inputs"])
    python(LOADS_A_PROGRAM.format(**paths))
    check_close(torch.load(paths["output"]), module(*args))


# --------------------------------------------------------------------------------------------- ONNX

# What sampling may become. All of it is on the list of TensorRT's parser of ONNX.
STANDARD = """
    Abs Add And AveragePool Cast Clip Concat Constant ConstantOfShape Div Equal Expand Floor Gather
    GatherElements GatherND Gemm Greater GreaterOrEqual GridSample Identity IsInf IsNaN Less
    LessOrEqual MatMul Max Min Mul Neg Not Or Pad Pow Range ReduceMax ReduceMin ReduceProd ReduceSum
    Reshape Shape Slice Softmax Split Squeeze Sub Tile Transpose Unsqueeze Where
    """.split()


def bfloat16_or_numpy(tensor):
    """The tensor for onnxruntime; numpy has no bfloat16."""
    import onnx
    import onnxruntime

    if tensor.dtype != torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        tensor.view(torch.int16).numpy(), onnx.TensorProto.BFLOAT16
    )


def onnxruntime_session(program, tmp_path, standard):
    """What runs the program, and the names of its operators, which are ONNX's own.

    standard: Those that they are checked to be among, None for any.
    """
    import onnxruntime

    operators = {(node.domain, node.op_type) for node in program.model_proto.graph.node}
    assert all(domain == "" for domain, _ in operators)
    assert standard is None or {name for _, name in operators} <= {*standard}, operators
    assert not program.model_proto.functions
    path = str(tmp_path / "model.onnx")
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*args):
        names = [entry.name for entry in session.get_inputs()]
        values = (bfloat16_or_numpy(x) for x in args)
        return torch.from_numpy(
            session.run_with_ort_values(None, dict(zip(names, values)))[0].numpy()
        )

    return run, {name for _, name in operators}


@pytest.fixture
def onnx_export(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)

    def export(module, args, dynamic_shapes, standard=STANDARD, **options):
        with torch.no_grad():
            program = torch.onnx.export(
                module, args, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False, **options
            )
        return onnxruntime_session(program, tmp_path, standard)

    return export


@each_dtype
def test_onnx(kernel, onnx_export, operator, dtype):
    args = sizes_inputs(operator, dtype, {}, **EXPORTED)
    # numpy, through which onnxruntime returns its results, has no bfloat16.
    as_float = torch.float32 if dtype == torch.bfloat16 else dtype
    module = Sizes(getattr(kernel, operator), {}, as_float)
    run, operators = onnx_export(module, args, sizes_dynamic(args))
    assert ("GridSample" in operators) == (dtype != torch.float64)
    for sizes in OTHERS:
        args = sizes_inputs(operator, dtype, {}, **sizes)
        check_close(run(*args), module(*args), TOLERANCES[dtype])


# Both options of both operators are decomposed above. An export to ONNX takes five seconds.
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("ms_deform_attn", "nearest"),
        ("fused_ms_deform_attn", "points_per_level"),
        pytest.param("ms_deform_attn", "points_per_level", marks=pytest.mark.slow),
        pytest.param("fused_ms_deform_attn", "nearest", marks=pytest.mark.slow),
    ],
)
def test_onnx_with_options(kernel, onnx_export, operator, options):
    options = OPTIONS[options]
    args = sizes_inputs(operator, torch.float32, options, **EXPORTED, coordinates=4)
    module = Sizes(getattr(kernel, operator), options)
    run, _ = onnx_export(module, args, sizes_dynamic(args))
    for sizes in OTHERS:
        args = sizes_inputs(operator, torch.float32, options, **sizes, coordinates=4)
        check_close(run(*args), module(*args))


def test_onnx_with_sizes_of_an_image(kernel, onnx_export):
    module = pyramid(kernel)
    args = pyramid_inputs(torch.float32, **EXPORTED)
    run, operators = onnx_export(module, args, pyramid_dynamic())
    assert "GridSample" in operators
    for sizes in OTHERS:
        args = pyramid_inputs(torch.float32, **sizes)
        with torch.no_grad():
            check_close(run(*args), module(*args))


@pytest.mark.slow
def test_onnx_of_a_program_exported_before(kernel, onnx_export):
    program, module = decomposed_operator(kernel, "ms_deform_attn", torch.float32, "bilinear")
    run, _ = onnx_export(program, (), None)
    args = sizes_inputs("ms_deform_attn", torch.float32, {}, **OTHERS[1])
    check_close(run(*args), module(*args))


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "dtype"), [(16, torch.float32), (18, torch.float64)], ids=str)
def test_onnx_opsets(kernel, onnx_export, opset, dtype):
    """float64 as well, which GridSample has from 20 on: it goes by GatherElements."""
    args = sizes_inputs("ms_deform_attn", dtype, {}, **EXPORTED)
    module = Sizes(kernel.ms_deform_attn, {})
    run, _ = onnx_export(module, args, sizes_dynamic(args), opset_version=opset)
    check_close(run(*args), module(*args))


def test_onnx_refuses_an_opset_without_grid_sample(kernel, onnx_export):
    args = sizes_inputs("ms_deform_attn", torch.float32, {}, **EXPORTED)
    module = Sizes(kernel.ms_deform_attn, {})
    with pytest.raises(Exception, match="opset_version is 15, expected at least 16"):
        onnx_export(module, args, None, opset_version=15)


def test_onnx_refuses_a_program_that_has_the_operator(kernel, onnx_export):
    args = sizes_inputs("ms_deform_attn", torch.float32, {}, **EXPORTED)
    program = torch.export.export(Sizes(kernel.ms_deform_attn, {}), args)
    with pytest.raises(Exception, match="No ONNX function found for .*ms_deform_attn_forward"):
        onnx_export(program, (), None)


@pytest.mark.filterwarnings("ignore")  # that it is old
def test_the_old_exporter_refuses_the_operator(kernel, onnx_export, tmp_path):
    args = sizes_inputs("ms_deform_attn", torch.float32, {}, **EXPORTED)
    module = Sizes(kernel.ms_deform_attn, {})
    with pytest.raises(Exception, match="unrecognized namespace .*::ms_deform_attn_forward"):
        torch.onnx.export(module, args, tmp_path / "model.onnx", dynamo=False)


class Original(torch.nn.Module):
    """An attention as the original code base has it: its own Function over the extension's."""

    def __init__(self, kernel):
        super().__init__()

        class Sample(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                return kernel.ms_deform_attn_forward(*args, 64)

        self.sample = Sample.apply
        self.project = torch.nn.Linear(16, 16)

    def forward(self, value, shapes, starts, locations, weights):
        return self.sample(self.project(value), shapes, starts, locations, weights.softmax(-1))


def test_onnx_of_an_original(kernel, onnx_export):
    torch.manual_seed(0)
    module = Original(kernel).eval()
    args = sizes_inputs("ms_deform_attn", torch.float32, {}, **EXPORTED)
    batch, queries, pixels = (Dim(name, min=2) for name in ("batch", "queries", "pixels"))
    points = {0: batch, 1: queries}
    run, _ = onnx_export(module, args, ({0: batch, 1: pixels}, None, None, points, points))
    for sizes in OTHERS:
        args = sizes_inputs("ms_deform_attn", torch.float32, {}, **sizes)
        with torch.no_grad():
            check_close(run(*args), module(*args))


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


@pytest.mark.slow
def test_onnx_of_a_model(kernel, onnx_export):
    """With another batch; transformers fixes the image size of this model by itself."""
    from models import MODELS, build
    from test_transformers import on_this_kernel, transformers_that_uses_kernels

    spec = next(spec for spec in MODELS if spec.name == "deformable_detr")
    model = build(spec, transformers_that_uses_kernels(), "cpu").eval()
    module = Logits(model)
    images = torch.rand(3, 3, *spec.image, generator=torch.Generator().manual_seed(0))
    with on_this_kernel(kernel, spec, model, "cpu", False, "fused"), torch.no_grad():
        expected = module(images)
        batch = {0: "batch"}
        run, operators = onnx_export(module, (images[:2],), (batch,), standard=None)
    assert "GridSample" in operators
    check_close(run(images), expected)


@pytest.mark.slow
def test_onnx_of_a_model_for_other_image_sizes(kernel, onnx_export):
    """RT-DETR, which leaves its image size open: other batch, height and width than exported."""
    from models import MODELS, build
    from test_transformers import on_this_kernel, transformers_that_uses_kernels

    spec = next(spec for spec in MODELS if spec.name == "rt_detr")
    model = build(spec, transformers_that_uses_kernels(), "cpu").eval()
    for name, parameter in model.named_parameters():
        # As they begin, all proposals have one score, and which of them are taken is up to chance.
        if "score_head" in name or "class_embed" in name:
            torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() > 1 else 0.0)
    module = Logits(model)
    generator = torch.Generator().manual_seed(0)
    exported, images = (
        torch.rand(shape, generator=generator) for shape in ((2, 3, *spec.image), (3, 3, 96, 160))
    )
    with on_this_kernel(kernel, spec, model, "cpu", False, "kernelized"), torch.no_grad():
        expected = module(images)
        height, width = (32 * Dim(name, min=2, max=32) for name in ("height", "width"))
        dynamic = ({0: "batch", 2: height, 3: width},)
        run, operators = onnx_export(module, (exported,), dynamic, standard=None)
    assert "GridSample" in operators
    check_close(run(images), expected)
