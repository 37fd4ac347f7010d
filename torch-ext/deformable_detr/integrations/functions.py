"""This kernel in the place of the eager functions in which projects sample."""

import importlib
import inspect
from types import ModuleType
from typing import Any, Optional, Sequence, Union

import torch

from ..layers import METHODS
from ..levels import Sizes, ms_deform_attn_list
from . import patches


def replace_function(module: Union[ModuleType, str], name: str) -> patches.Replacement:
    """Has a project's own sampling function run on this kernel.

        kernel.integrations.replace_function("src.zoo.dfine.dfine_decoder",
                                             "deformable_attention_core_func_v2")

    Known are the functions of RT-DETR, RT-DETRv2, D-FINE, LW-DETR, RF-DETR, Deformable-DETR, mmcv
    and transformers, by the names of their arguments; see ``CONVENTIONS``.

    Name the module that calls the function: one that has imported it by its name holds its own. Do
    so before the model is built, as D-FINE's attentions hold it, too, and keep what they hold.

    "discrete" sampling rounds to the nearest pixel and moves it into the map. The originals of
    RT-DETRv2 and D-FINE bound x by the height, so that on maps that are not square they sample
    other pixels: models that were trained there with "discrete" give other results here.

    Args:
        module: the module, or its name, which is then imported.
        name: the function's name in it.

    Returns:
        What was replaced. As a context manager it undoes it when the context is left.

    Raises:
        ModuleNotFoundError: there is no such module.
        ValueError: it has no such function, or one with other arguments than those known.
    """
    if isinstance(module, str):
        module = importlib.import_module(module)
    function = patches.original(module, name)
    if not callable(function):
        raise ValueError(f"{module.__name__} has no function {name}")
    takes = tuple(inspect.signature(function).parameters)
    if takes not in CONVENTIONS:
        known = "; ".join(f"({', '.join(names)})" for names in CONVENTIONS)
        raise ValueError(
            f"{module.__name__}.{name} takes ({', '.join(takes)}), expected one of {known}"
        )
    replacement = (module, name, CONVENTIONS[takes])
    return patches.Replacement([replacement], [f"{module.__name__}.{name}"])


def _points_apart(
    value: Any,
    value_spatial_shapes: Sizes,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    value_spatial_shapes_hw: Optional[Sizes] = None,
) -> torch.Tensor:
    """RT-DETR, Deformable-DETR and mmcv; LW-DETR and RF-DETR, whose weights are flat and whose
    value has its pixels last."""
    return ms_deform_attn_list(
        value,
        value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw,
        sampling_locations,
        attention_weights,
        channels_first=attention_weights.dim() == 4,
    )


def _points_in_a_row(
    value: Any,
    value_spatial_shapes: Sizes,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
    value_shape: Any = None,
) -> torch.Tensor:
    """RT-DETRv2; D-FINE, whose value is a tuple of the levels' with their pixels last."""
    return ms_deform_attn_list(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        points_per_level=list(num_points_list),
        method=METHODS.get(method, method),
        channels_first=not isinstance(value, torch.Tensor),
    )


_FOUR = ("value", "value_spatial_shapes", "sampling_locations", "attention_weights")
# By the names of a function's arguments.
CONVENTIONS = {
    _FOUR: _points_apart,
    (*_FOUR, "value_spatial_shapes_hw"): _points_apart,
    (*_FOUR, "num_points_list"): _points_in_a_row,
    (*_FOUR, "num_points_list", "method"): _points_in_a_row,
    (*_FOUR, "num_points_list", "method", "value_shape"): _points_in_a_row,
}
