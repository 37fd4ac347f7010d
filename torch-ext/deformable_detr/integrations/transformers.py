"""This kernel inside models of transformers.

``kernelize`` replaces transformers' layer ``MultiScaleDeformableAttention`` in ten models. Here
fifteen run on the fused operator, or on the plain one, in place of that layer, or of the functions
in which RT-DETRv2, D-FINE, DEIMv2, Mask2Former and OneFormer sample.
"""

import inspect
import warnings
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple, Type

import torch

from ..layers import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttentionList,
    MultiScaleDeformableAttentionV2,
)
from . import fused, patches


@contextmanager
def use_in_transformers(model: torch.nn.Module, *, fuse: bool = True) -> Iterator[torch.nn.Module]:
    """Runs ``model`` on this kernel while the context is entered, forward and backward.

        with kernel.integrations.use_in_transformers(model):
            outputs = model(**inputs)

    Replaces what ``model``'s classes sample with, and so for every model of those classes in this
    process. Instances are left as they are: a model may be built, copied, pickled or saved inside
    the context, and is transformers' own outside. Contexts may be nested, for the same model too,
    the one entered last decides; what was replaced is put back when the last is left, and
    ``backward`` may come later. Do not enter or leave one while another thread runs such a model.
    Compile a model inside the context, where it will run.

    Fused, the forward of a model's deformable attention is replaced. It returns the attention
    weights that eager returns where the model was asked for them (``output_attentions``) or where a
    forward hook looks at them, and None in their place elsewhere. The layer inside, of which
    ``kernelize`` replaces the forward, is then not called, nor are its hooks.

    Args:
        model: a model of transformers, whole or in part, with deformable attention:
            deformable_detr, grounding_dino, mm_grounding_dino, rt_detr, rt_detr_v2, omdet_turbo,
            rf_detr, lw_detr, pp_doclayout_v2, _v3 and _v4, d_fine, deimv2, mask2former, oneformer.
        fuse: Whether softmax and sampling locations are left to the operator, too. Where an
            attention is not what it is in the releases of transformers known here, the operator
            only samples, and a warning says so, once per class.

    Raises:
        ValueError: no module of ``model`` samples in a way known here, or what samples takes other
            arguments than in the releases known here.
    """
    replacements = _samplers(model, fuse)
    if not replacements:
        raise ValueError(
            f"model is a {type(model).__name__}, in which no module samples in a layer "
            f"{_LAYER} or in a function {' or '.join(_FUNCTIONS)}; known are "
            f"{', '.join(sorted(fused.FAMILIES))}"
        )
    with patches.Replacement(replacements):
        yield model


_LAYER = MultiScaleDeformableAttention.__name__


# By their names in the models' modules.
_FUNCTIONS: Dict[str, Callable[..., Any]] = {
    "multi_scale_deformable_attention": MultiScaleDeformableAttentionList().forward,
    "multi_scale_deformable_attention_v2": MultiScaleDeformableAttentionV2().forward,
}
# An attribute in which D-FINE's and DEIMv2's instances keep the function.
_KEPT_AS = "ms_deformable_attn_core"


def _samplers(model: torch.nn.Module, fuse: bool) -> List[Tuple[Any, str, Any]]:
    """(owner, name, replacement) for each place where the classes of model sample."""
    found: Dict[Tuple[int, str], Tuple[Any, str, Any]] = {}
    sampling: Dict[str, str] = {}  # what samples, by the file it is in

    def replace(owner: Any, name: str, replacement: Any) -> None:
        found[id(owner), name] = owner, name, replacement

    classes = [_Class(cls, model) for cls in {type(module) for module in model.modules()}]
    # Their instances keep a function in an attribute. A pickle of one names it in its file, where
    # it must then stay.
    keeping = {cls.file for cls in classes if cls.keeps}
    for cls in classes:
        if cls.name == _LAYER:
            _check_parameters(cls.forward, MultiScaleDeformableAttention.forward)
            replace(cls.definer, "forward", MultiScaleDeformableAttention.forward)
            sampling[cls.file] = cls.name
        for name, replacement in _FUNCTIONS.items():
            function = patches.original(cls.namespace, name)
            if getattr(function, "__module__", None) != cls.file:
                continue  # imported from elsewhere, or not there
            _check_parameters(function, replacement)
            if cls.keeps:
                replace(cls.own, _KEPT_AS, _shown_instead(function, replacement))
            elif cls.file not in keeping:
                replace(cls.namespace, name, replacement)
            sampling[cls.file] = name
    fusing = set()  # files
    for cls in classes:
        if cls.name not in fused.FAMILIES:
            continue
        differences = filter(
            None, (fused.difference(cls.name, cls.forward, m) for m in cls.instances)
        )
        why = next(differences, None)
        if fuse and why is None:
            replace(cls.definer, "forward", fused.fused_forward(cls.name, cls.forward))
            replace(cls.definer, "__call__", fused.call)
        elif cls.file in sampling:
            replace(cls.definer, "forward", cls.forward)
        else:
            raise ValueError(f"{cls.name} samples in a way not known here: {why}")
        if fuse and why:
            _warn_once(cls.name, why)
        fusing.add(cls.file)
    for file in sampling.keys() - fusing:
        if fuse:
            _warn_once(sampling[file], f"{file} has no attention of a class known here")
    return list(found.values())


class _Class:
    """A class of a model's modules: which base has its forward, and where that finds functions."""

    def __init__(self, own: Type[torch.nn.Module], model: torch.nn.Module) -> None:
        self.own = own
        self.instances = [module for module in model.modules() if type(module) is own]
        self.keeps = any(_KEPT_AS in vars(module) for module in self.instances)
        self.definer = next(base for base in own.__mro__ if "forward" in vars(base))
        self.name = self.definer.__name__
        self.forward = patches.original(self.definer, "forward")
        # Whether or not the module of the class can be imported by its name.
        self.namespace = getattr(inspect.unwrap(self.forward), "__globals__", {})
        self.file = self.namespace.get("__name__", "")


_warned: Set[str] = set()


def _warn_once(name: str, why: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name} only samples on this kernel, it is not fused: {why}", stacklevel=5)


def _shown_instead(original: Any, replacement: Any) -> property:
    """A property that shows replacement where an instance keeps original, which it goes on keeping.

    A property of the class goes before an attribute of the instance.
    """

    def show(instance: Any) -> Any:
        kept = vars(instance)[_KEPT_AS]
        return replacement if kept is original else kept

    def keep(instance: Any, value: Any) -> None:
        vars(instance)[_KEPT_AS] = value

    return property(show, keep)


def _check_parameters(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    takes, expected = (list(inspect.signature(f).parameters) for f in (function, replacement))
    if takes != expected:
        raise ValueError(
            f"{function.__module__}.{function.__qualname__} takes ({', '.join(takes)}), expected "
            f"({', '.join(expected)}): this release of transformers is not known here"
        )
