"""The operator for callers that hold the levels' sizes as a list, and no level_start_index."""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch

from . import portable
from .functional import ms_deform_attn

Sizes = Union[torch.Tensor, Sequence[Tuple[int, int]]]
_Sizes = Tuple[Tuple[int, int], ...]
_Tensors = Tuple[torch.Tensor, torch.Tensor]


def ms_deform_attn_list(
    value: Union[torch.Tensor, Sequence[torch.Tensor]],
    spatial_shapes: Sizes,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    *,
    points_per_level: Optional[List[int]] = None,
    method: str = "bilinear",
    channels_first: bool = False,
) -> torch.Tensor:
    """``ms_deform_attn`` for callers that hold the levels' sizes as a list of integers.

    The level tensors that the operator takes are made once per list and device, and kept.

    Args:
        value: (batch, sum(h*w), heads, channels), or with ``channels_first`` (batch, heads,
            channels, sum(h*w)), as LW-DETR and RF-DETR have it; or a list of the levels' values in
            one of these layouts, as D-FINE has it. The dtypes are ``ms_deform_attn``'s.
        spatial_shapes: [(h, w), ...], one a level, in integers, symbolic or not; or a tensor
            (levels, 2) on ``value``'s device.
        sampling_locations, points_per_level, method: as for ``ms_deform_attn``.
        attention_weights: as for ``ms_deform_attn``, or, with locations of 6 dimensions, (batch,
            queries, heads, levels * points).
        channels_first: Whether ``value`` has its pixels in the last dimension.

    Returns:
        (batch, queries, heads * channels) in ``value``'s dtype.

    Raises:
        ValueError: ``spatial_shapes`` is a list with no level, with an entry that is not (height,
            width), or with other pixels than ``value`` has; or ``method`` is unknown.
        RuntimeError, NotImplementedError: as for ``ms_deform_attn``.
    """
    if not isinstance(value, torch.Tensor):
        value = torch.cat(list(value), -1 if channels_first else 1)
    if channels_first:
        value = value.permute(0, 3, 1, 2)
    if not isinstance(spatial_shapes, torch.Tensor):
        pixels = sum(height * width for height, width in _as_tuple(spatial_shapes))
        if pixels != value.shape[1]:
            raise ValueError(
                f"value has {value.shape[1]} pixels, expected {pixels}, which the levels "
                f"{list(spatial_shapes)} have"
            )
    if sampling_locations.dim() == 6 and attention_weights.dim() == 4:
        attention_weights = attention_weights.unflatten(-1, sampling_locations.shape[3:5])
    shapes, starts = level_tensors(spatial_shapes, value.device)
    return ms_deform_attn(
        value,
        shapes,
        starts,
        sampling_locations,
        attention_weights,
        points_per_level=points_per_level,
        method=method,
    )


def level_tensors(spatial_shapes: Sizes, device: torch.device) -> Tuple[Any, Any]:
    """``spatial_shapes`` and ``level_start_index`` as the operators take them.

    A list's tensors are made once per (sizes, device) and kept, so that a model whose image size
    stays the same launches nothing. Nothing is kept from, or lent to, a call that is traced, that
    runs under a mode or a transform (FakeTensorMode, functionalize, an aot_function trace, grad)
    or whose sizes are symbolic: those tensors belong to the trace.

    Args:
        spatial_shapes: (levels, 2) integers on ``device``, or [(height, width), ...] in integers,
            symbolic or not.
        device: where the results go.

    Returns:
        (levels, 2) and (levels,), int64, or ``spatial_shapes`` itself with its starts.

    Raises:
        ValueError: the list has no level, or an entry that is not (height, width).
    """
    if isinstance(spatial_shapes, torch.Tensor):
        areas = spatial_shapes.prod(1)
        return spatial_shapes, areas.cumsum(0) - areas
    sizes = _as_tuple(spatial_shapes)
    if portable.in_onnx_export():
        return sizes, _starts(sizes)  # no tensors, which portable.py would have to read again
    symbolic = any(isinstance(x, torch.SymInt) for size in sizes for x in size)
    if torch.compiler.is_compiling() or symbolic or not _factories_are_plain():
        return _fill(sizes, device)
    return _keep(sizes, device)


def _as_tuple(spatial_shapes: Sequence[Any]) -> Any:
    """Hashable: ((height, width), ...). An int() of a SymInt would fix the size in a trace."""
    if len(spatial_shapes) == 0:
        raise ValueError("spatial_shapes is empty, expected [(height, width), ...], one a level")
    sizes = []
    for size in spatial_shapes:
        if len(size) != 2:
            raise ValueError(f"spatial_shapes has a level {size}, expected (height, width)")
        sizes.append(tuple(x if isinstance(x, (int, torch.SymInt)) else int(x) for x in size))
    return tuple(sizes)


def _starts(sizes: _Sizes) -> List[int]:
    starts, end = [], 0
    for height, width in sizes:
        starts.append(end)
        end += height * width
    return starts


def _fill(sizes: _Sizes, device: torch.device) -> _Tensors:
    """By fills alone, which take symbolic sizes and which a CUDA graph can capture."""

    def filled(numbers: Sequence[int]) -> torch.Tensor:
        return torch.cat([torch.full((1,), x, dtype=torch.int64, device=device) for x in numbers])

    return filled([x for size in sizes for x in size]).view(-1, 2), filled(_starts(sizes))


def _factories_are_plain() -> bool:
    """Whether a tensor that is made now outlives every mode and transform that is active.

    Asks the tensor, since torch has no public question for the modes: FakeTensorMode and
    FunctionalTensorMode return a subclass, and what functionalize or grad wraps has no memory.
    """
    probe = torch.empty(1, device="cpu")
    if type(probe) is not torch.Tensor:
        return False
    try:
        return probe.data_ptr() != 0
    except RuntimeError:
        return False


# The tensors of the first _MOST sizes, for ever: a captured CUDA graph holds an entry's address but
# no reference to it, and another stream may still read what would be freed. An entry takes 1 kB of
# GPU memory, and a model sees one for each image size. Those of later sizes are made at each call.
_kept: Dict[Tuple[_Sizes, torch.device], _Tensors] = {}
_MOST = 4096


def _keep(sizes: _Sizes, device: torch.device) -> _Tensors:
    levels = _kept.get((sizes, device))
    if levels is not None:
        return levels
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Has its values once the graph has run, and lives in the graph's pool: not for others.
        return _fill(sizes, device)
    starts = _starts(sizes)
    # A copy from the host waits for itself, so that every stream may read the result at once. Not
    # inference tensors, which autograd would refuse to save in a later training step.
    with torch.inference_mode(False):
        levels = torch.tensor(sizes, device=device), torch.tensor(starts, device=device)
    if len(_kept) < _MOST:
        return _kept.setdefault((sizes, device), levels)
    return levels
