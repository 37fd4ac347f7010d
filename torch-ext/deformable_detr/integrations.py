"""This kernel inside models that call a sampling function rather than the layer of ``layers``.

transformers replaces the layer ``MultiScaleDeformableAttention`` by itself. RT-DETRv2, D-FINE,
DEIMv2, Mask2Former and OneFormer sample in a function of their module, which nothing replaces.
"""

import functools
import sys
from contextlib import contextmanager

import torch

from .functional import ms_deform_attn


@contextmanager
def use_in_transformers(model: torch.nn.Module):
    """Runs ``model`` on this kernel while the context is entered, forward and backward.

    Replaces the sampling function of ``model``'s classes, and so of every model of those classes,
    in this process; leaving the context puts the functions back. Do not enter or leave it while
    another thread runs such a model.

        with kernel.integrations.use_in_transformers(model):
            outputs = model(**inputs)

    Args:
        model: a model of transformers, whole or in part, with RT-DETRv2's, D-FINE's, DEIMv2's,
            Mask2Former's or OneFormer's deformable attention in it.

    Raises:
        ValueError: no module of ``model`` samples in a function known here.
    """
    replaced = []
    try:
        for owner, name, function in _sampling_functions(model):
            replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, function)
        if not replaced:
            raise ValueError(
                f"model is a {type(model).__name__}, in which no module samples in "
                f"{' or '.join(_FUNCTIONS)}; models with a {_LAYER} layer are for kernels.kernelize"
            )
        yield model
    finally:
        for owner, name, original in reversed(replaced):
            setattr(owner, name, original)


_LAYER = "MultiScaleDeformableAttention"


def _multi_scale_deformable_attention(
    value, value_spatial_shapes, sampling_locations, attention_weights
):
    """Mask2Former's and OneFormer's: as many points in each level."""
    levels = _level_tensors(value_spatial_shapes, value.device)
    return ms_deform_attn(value, *levels, sampling_locations, attention_weights)


def _multi_scale_deformable_attention_v2(
    value,
    value_spatial_shapes,
    sampling_locations,
    attention_weights,
    num_points_list,
    method="default",
):
    """RT-DETRv2's, D-FINE's and DEIMv2's: all levels' points in one dimension."""
    return ms_deform_attn(
        value,
        *_level_tensors(value_spatial_shapes, value.device),
        sampling_locations,
        attention_weights,
        points_per_level=num_points_list,
        method={"default": "bilinear", "discrete": "nearest"}.get(method, method),
    )


# By their names in the models' modules.
_FUNCTIONS = {
    "multi_scale_deformable_attention": _multi_scale_deformable_attention,
    "multi_scale_deformable_attention_v2": _multi_scale_deformable_attention_v2,
}
# An attribute in which D-FINE and DEIMv2 keep the function, by that name.
_KEPT_AS = "ms_deformable_attn_core"


def _sampling_functions(model):
    """(owner, name, function of this kernel) for each place where the model takes one from."""
    for file in {type(module).__module__ for module in model.modules()}:
        owner = sys.modules[file]
        for name, function in _FUNCTIONS.items():
            if getattr(getattr(owner, name, None), "__module__", None) == file:
                yield owner, name, function
    for module in model.modules():
        kept = getattr(module, _KEPT_AS, None)
        if getattr(kept, "__name__", None) in _FUNCTIONS:
            yield module, _KEPT_AS, _FUNCTIONS[kept.__name__]


def _level_tensors(shapes, device):
    """spatial_shapes and level_start_index of [(h, w), ...], or of spatial_shapes itself."""
    if isinstance(shapes, torch.Tensor):
        areas = shapes.prod(1)
        return shapes, areas.cumsum(0) - areas
    shapes = tuple((int(height), int(width)) for height, width in shapes)
    if torch.compiler.is_compiling():
        return _make_level_tensors(shapes, device)
    return _kept_level_tensors(shapes, device)


def _make_level_tensors(shapes, device):
    starts, end = [], 0
    for height, width in shapes:
        starts.append(end)
        end += height * width
    return torch.tensor(shapes, device=device), torch.tensor(starts, device=device)


@functools.lru_cache(maxsize=64)
def _kept_level_tensors(shapes, device):
    """Kept, so that a model whose image size stays the same copies nothing to the GPU."""
    with torch.inference_mode(False):
        return _make_level_tensors(shapes, device)
