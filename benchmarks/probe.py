"""How fast could it be? The HBM floor and the gather ceiling, measured where the kernel is.

The floor: every input read once and every result written once, at the rate of a large copy. The
ceiling: the loads of the forward kernel without its arithmetic (gather.cu), in the fastest of the
arrangements tried here. The backward reads each corner's row and adds to the same row of
grad_value, so its ceiling is two forward ceilings.

    python -c 'from benchmarks import probe; probe.build("9.0")'    # for a machine without nvcc
"""

import ctypes
import hashlib
import math
import statistics
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch

from tools import build as builder

from .benchmark import Inputs, Workload
from .timing import Effort, in_turn, time_device

SOURCE = Path(__file__).parent / "gather.cu"
COPY_BYTES = 2**29
STRIP = 4  # rows of a level, in ``strips``
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # in dispatch.h's order


def traffic_bytes(inputs: Inputs, pass_name: str) -> int:
    """What a forward or a backward has to move: inputs once, and results once.

    The backward's inputs are the forward's and grad_output, its results three gradients.
    """
    value, _, _, locations, weights = inputs
    output_bytes = math.prod(locations.shape[:3]) * _row_bytes(inputs)
    gradients = (value, locations, weights) if pass_name == "backward" else ()
    return output_bytes + sum(tensor.nbytes for tensor in (*inputs, *gradients))


def copy_rate(device: torch.device) -> float:
    """Bytes per millisecond, read plus written, of a copy inside the GPU's memory."""
    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = time_device(lambda: target.copy_(source), device, Effort(reps=20))
    return 2 * COPY_BYTES / statistics.median(times)


def library_path(arch: str) -> Path:
    """Where gather.cu compiled for a compute capability is kept; another for other sources."""
    digest = hashlib.sha256()
    native = builder.ROOT / "deformable_detr"
    for source in (SOURCE, native / "bilinear.h", native / "dispatch.h", native / "cuda/vec.cuh"):
        digest.update(source.read_bytes())
    return SOURCE.with_name(f"gather-sm{arch.replace('.', '')}-{digest.hexdigest()[:10]}.so")


def build(arch: str) -> Path:
    """Compiles gather.cu, if that has not been done.

    Raises:
        tools.build.BuildError: nvcc is missing, or does not compile it.
    """
    library = library_path(arch)
    if not library.exists():
        toolkit = builder.CudaToolkit.find()
        partial = library.with_suffix(".partial.so")
        partial.unlink(missing_ok=True)
        command = [toolkit.nvcc, "-shared", "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall"]
        command += ["-ccbin", builder.find_compiler(), *builder.gencode([arch])]
        # The runtime is torch's own, which its process has loaded.
        command += [f"-I{builder.ROOT}", "-cudart", "none", SOURCE, toolkit.cudart, "-o", partial]
        output = builder.output_of(command)
        if not partial.exists():
            raise builder.BuildError(f"nvcc does not compile {SOURCE.name}:\n{output}")
        partial.rename(library)
    return library


@cache
def load(device: torch.device) -> ctypes.CDLL:
    """The compiled probe for a GPU, or what ``build`` raises."""
    major, minor = torch.cuda.get_device_capability(device)
    library = ctypes.CDLL(str(build(f"{major}.{minor}")))
    library.msda_gather.restype = ctypes.c_char_p
    library.msda_gather.argtypes = [
        *[ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64],
        *[ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32],
        ctypes.c_int,
        *[ctypes.c_void_p] * 8,
    ]
    return library


def gather(
    inputs: Inputs,
    points_per_level: list[int],
    output: torch.Tensor,
    split: int = 1,
    order: torch.Tensor | None = None,
) -> None:
    """Enqueues the probe: ``output`` becomes the xor of the rows of each query's corners.

    Args:
        inputs: on a GPU, contiguous, with int64 level metadata.
        output: (batch, queries, heads, channels) in the dtype of ``inputs.value``.
        split: one of ``splits``.
        order: (queries,), int32; a block serves queries that follow each other in it.

    Raises:
        RuntimeError: the probe does not cover these sizes, or the launch fails.
    """
    value, _, _, locations, weights = inputs
    if locations.dtype != weights.dtype or _row_bytes(inputs) % 16:
        raise RuntimeError(f"{SOURCE.name}: not for these dtypes or channels")
    batch, pixels, heads, _ = value.shape
    levels = len(points_per_level)
    error = load(value.device).msda_gather(
        *[split, batch, pixels, locations.shape[1], heads, levels],
        *[(ctypes.c_int32 * levels)(*points_per_level), _row_bytes(inputs) // 16],
        DTYPES.index(locations.dtype),
        *[tensor.data_ptr() for tensor in inputs],
        None if order is None else order.data_ptr(),
        output.data_ptr(),
        torch.cuda.current_stream(value.device).cuda_stream,
    )
    if error is not None:
        raise RuntimeError(f"{SOURCE.name}: {error.decode()}")


def splits(inputs: Inputs) -> tuple[int, ...]:
    """How many groups of lanes may share the points of a row: of a wide one, one group."""
    return (1, 4) if _row_bytes(inputs) <= 128 else (1,)


def _row_bytes(inputs: Inputs) -> int:
    return inputs.value.shape[-1] * inputs.value.element_size()


def strips(shapes: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The pixels of all levels in an order in which those that follow each other lie in a square:
    strips of a few rows, each column after column. For queries that are the pixels."""
    order, first = [], 0
    for height, width in shapes:
        pixels = torch.arange(first, first + height * width, dtype=torch.int32)
        order += [strip.T.flatten() for strip in pixels.view(height, width).split(STRIP)]
        first += height * width
    return torch.cat(order)


def gather_ms(sets: list[Inputs], workload: Workload, effort: Effort) -> float:
    """The gather ceiling of a forward: the median of the fastest arrangement, L2 cold.

    Args:
        sets: of the workload's inputs, taken in turn.

    Raises:
        RuntimeError: as for ``gather``.
    """
    value = sets[0].value
    output = value.new_empty(workload.batch, workload.queries, *value.shape[2:])
    orders = [None]
    if workload.locations == "encoder":
        orders.append(strips(workload.shapes).to(value.device))
    medians = []
    for split, order in product(splits(sets[0]), orders):
        arguments = (workload.points_per_level, output, split, order)
        call = in_turn([partial(gather, inputs, *arguments) for inputs in sets])
        call()  # the first launch loads the kernel
        medians.append(statistics.median(time_device(call, value.device, effort)))
    return min(medians)
