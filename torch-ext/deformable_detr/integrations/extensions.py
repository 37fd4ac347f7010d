"""This kernel in the place of the compiled extensions that projects bring along."""

import functools
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from .. import functional
from ..functional import ms_deform_attn_forward
from ..names import OF_EXTENSIONS, also_named
from . import patches

# Each has ms_deform_attn_forward and ms_deform_attn_backward: Deformable-DETR's, which DINO,
# Mask2Former and ViT-Adapter have too, GroundingDINO's, detrex's, and mmcv's, which has all of
# mmcv's other operators besides.
TARGETS = ("MultiScaleDeformableAttention", "groundingdino._C", "detrex._C", "mmcv._ext")


def replace_extensions() -> patches.Replacement:
    """Has every import of a known extension, from here on, find this kernel.

        kernel.integrations.replace_extensions()
        import groundingdino  # whose _C is now this kernel

    Known are MultiScaleDeformableAttention (Deformable-DETR, DINO, Mask2Former, ViT-Adapter),
    groundingdino._C, detrex._C and mmcv._ext (mmcv, mmdetection, BEVFormer). Only
    ms_deform_attn_forward and ms_deform_attn_backward are replaced, in both conventions: gradients
    are returned, or written into the tensors that are passed for them, as mmcv does. An extension
    that is installed keeps its other functions; one that is not is a module with these two.

    Call it before the project is imported: a project that has tried to import its extension, and
    has gone on without, does not try again.

    Returns:
        What was replaced: ``print`` it. As a context manager it undoes all when the context is
        left; modules that have been imported in the meantime keep this kernel.

    Raises:
        RuntimeError: a module has imported the functions of a target by their names, where they
            cannot be replaced any more; the message names both.
    """
    replacements: List[Tuple[Any, str, Any]] = []
    names: List[str] = []
    for target in TARGETS:
        module = patches.original(sys.modules, target)
        if module is None:
            replacements.append((sys.modules, target, _stand_in(target)))
            names.append(target)
            continue
        for name, function in _FUNCTIONS.items():
            _refuse_if_bound(target, name, patches.original(module, name))
            replacements.append((module, name, function))
            names.append(f"{target}.{name}")
    return patches.Replacement(replacements, names)


@also_named(**OF_EXTENSIONS)
def ms_deform_attn_backward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc: torch.Tensor,
    attn_weight: torch.Tensor,
    grad_output: torch.Tensor,
    *rest: Any,
    im2col_step: int = 64,
    grad_value: Optional[torch.Tensor] = None,
    grad_sampling_loc: Optional[torch.Tensor] = None,
    grad_attn_weight: Optional[torch.Tensor] = None,
) -> Optional[List[torch.Tensor]]:
    """``functional.ms_deform_attn_backward`` in either convention.

    After grad_output come im2col_step or nothing, and the gradients are returned; or three tensors
    and im2col_step or nothing, and the gradients are written into these.
    """
    written: Tuple[Any, ...] = (grad_value, grad_sampling_loc, grad_attn_weight)
    if len(rest) in (3, 4):
        if any(tensor is not None for tensor in written):
            raise TypeError("ms_deform_attn_backward got its gradients by position and by name")
        written = rest[:3]
    elif len(rest) > 1:
        raise TypeError(
            f"ms_deform_attn_backward got {6 + len(rest)} arguments, expected 6 or 7, or 9 or 10 "
            "with grad_value, grad_sampling_loc and grad_attn_weight to write into"
        )
    if any(tensor is None for tensor in written) and any(tensor is not None for tensor in written):
        raise TypeError(
            "ms_deform_attn_backward got some of grad_value, grad_sampling_loc and "
            "grad_attn_weight, expected all three or none"
        )
    inputs = value, spatial_shapes, level_start_index, sampling_loc, attn_weight
    grads = functional.ms_deform_attn_backward(*inputs, grad_output)
    if written[0] is None:
        return grads
    names = ("grad_value", "grad_sampling_loc", "grad_attn_weight")
    for name, tensor, grad in zip(names, written, grads):
        if tensor.shape != grad.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(grad.shape)}"
            )
        tensor.copy_(grad)
    return None


_FUNCTIONS: Dict[str, Callable[..., Any]] = {
    "ms_deform_attn_forward": ms_deform_attn_forward,
    "ms_deform_attn_backward": ms_deform_attn_backward,
}


def _refuse_if_bound(target: str, name: str, function: Any) -> None:
    """An attribute of the module can be replaced, but not what others hold of its functions."""
    if function is None or getattr(function, "__module__", None) == functional.__name__:
        return  # missing, or the module is this kernel
    for holder, module in list(sys.modules.items()):
        namespace = list(getattr(module, "__dict__", {}).values())
        if holder != target and any(x is function for x in namespace):
            raise RuntimeError(
                f"{holder} has imported {name} from {target} by its name, where it cannot be "
                f"replaced: call replace_extensions() before {holder} is imported"
            )


@functools.cache
def _stand_in(target: str) -> types.ModuleType:
    """A module with the two functions; the rest it takes from the extension, once it is asked."""
    module = types.ModuleType(target, "deformable-detr's functions, in the place of an extension's")
    module.__spec__ = importlib.machinery.ModuleSpec(target, None)
    vars(module).update(_FUNCTIONS)

    def rest(name: str) -> Any:
        if name.startswith("__"):  # the import system asks for some
            raise AttributeError(name)
        extension = _load(target)
        if extension is None:
            raise AttributeError(
                f"{target} has no {name}: the extension is not installed, and in its place "
                f"deformable-detr has {' and '.join(_FUNCTIONS)} only"
            )
        return getattr(extension, name)

    vars(module)["__getattr__"] = rest
    return module


@functools.cache
def _load(target: str) -> Optional[types.ModuleType]:
    """The extension itself, beside the stand-in that has its name; None where there is none."""
    package = target.rpartition(".")[0]
    path: Any
    if package in sys.modules:
        path = sys.modules[package].__path__
    else:
        parent = importlib.util.find_spec(package) if package else None
        path = parent.submodule_search_locations if parent else None
        if package and path is None:
            return None
    spec = importlib.machinery.PathFinder.find_spec(target, path)
    if spec is None or spec.loader is None:
        return None
    shown = sys.modules.get(target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Older extensions enter themselves under their name.
    if shown is not None:
        sys.modules[target] = shown
    return module
