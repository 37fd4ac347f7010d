"""This kernel inside models of transformers.

transformers replaces the layer ``MultiScaleDeformableAttention`` by itself, where ``kernelize`` is
asked to. RT-DETRv2, D-FINE, DEIMv2, Mask2Former and OneFormer sample in a function of their module,
which nothing replaces.
"""

import inspect
from contextlib import contextmanager

import torch

from ..layers import MultiScaleDeformableAttention
from ..levels import ms_deform_attn_list
from . import patches


@contextmanager
def use_in_transformers(model: torch.nn.Module):
    """Runs ``model`` on this kernel while the context is entered, forward and backward.

    Replaces the sampling function of ``model``'s classes, and so of every model of those classes,
    in this process. Instances are left as they are: a model may be built, copied, pickled or saved
    inside the context, and is transformers' own outside. Contexts may be nested, for the same model
    too; the functions are put back when the last one is left, so ``backward`` may come later. Do
    not enter or leave one while another thread runs such a model.

        with kernel.integrations.use_in_transformers(model):
            outputs = model(**inputs)

    Args:
        model: a model of transformers, whole or in part, that has deformable attention in it.

    Raises:
        ValueError: no module of ``model`` samples in a way known here, or a sampling function takes
            other arguments than in the releases known here.
    """
    replacements = _samplers(model)
    if not replacements:
        raise ValueError(
            f"model is a {type(model).__name__}, in which no module samples in a layer "
            f"{_LAYER} or in a function {' or '.join(_FUNCTIONS)}"
        )
    with patches.replaced(replacements):
        yield model


_LAYER = MultiScaleDeformableAttention.__name__


def _multi_scale_deformable_attention(
    value, value_spatial_shapes, sampling_locations, attention_weights
):
    """Mask2Former's and OneFormer's: as many points in each level."""
    return ms_deform_attn_list(value, value_spatial_shapes, sampling_locations, attention_weights)


def _multi_scale_deformable_attention_v2(
    value,
    value_spatial_shapes,
    sampling_locations,
    attention_weights,
    num_points_list,
    method="default",
):
    """RT-DETRv2's, D-FINE's and DEIMv2's: all levels' points in one dimension."""
    return ms_deform_attn_list(
        value,
        value_spatial_shapes,
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
# An attribute in which D-FINE's and DEIMv2's instances keep the function.
_KEPT_AS = "ms_deformable_attn_core"


def _samplers(model):
    """(owner, name, replacement) for each place where the classes of model sample."""
    found = {}

    def replace(owner, name, original, replacement, stand_in=None):
        _check_parameters(original, replacement)
        found[id(owner), name] = owner, name, stand_in or replacement

    classes = {type(module) for module in model.modules()}
    keepers = {type(module) for module in model.modules() if _KEPT_AS in vars(module)}
    for cls in classes:
        definer = next(base for base in cls.__mro__ if "forward" in vars(base))
        forward = patches.original(definer, "forward")
        if cls.__name__ == _LAYER:
            replace(definer, "forward", forward, MultiScaleDeformableAttention.forward)
        # Where forward finds its functions, whether or not its module can be imported by its name.
        namespace = getattr(inspect.unwrap(forward), "__globals__", {})
        for name, replacement in _FUNCTIONS.items():
            function = patches.original(namespace, name)
            if getattr(function, "__module__", None) != namespace.get("__name__", ""):
                continue  # imported from elsewhere, or not there
            if cls in keepers:
                # A pickle of an instance names the function, so that it must stay where it is.
                replace(cls, _KEPT_AS, function, replacement, _shown_instead(function, replacement))
            elif not any(keeper.__module__ == cls.__module__ for keeper in keepers):
                replace(namespace, name, function, replacement)
    return list(found.values())


def _shown_instead(original, replacement):
    """A property that shows replacement where an instance keeps original, which it goes on keeping.

    A property of the class goes before an attribute of the instance.
    """

    def show(instance):
        kept = vars(instance)[_KEPT_AS]
        return replacement if kept is original else kept

    def keep(instance, value):
        vars(instance)[_KEPT_AS] = value

    return property(show, keep)


def _check_parameters(function, replacement):
    takes, expected = (list(inspect.signature(f).parameters) for f in (function, replacement))
    if takes != expected:
        raise ValueError(
            f"{function.__module__}.{function.__qualname__} takes ({', '.join(takes)}), expected "
            f"({', '.join(expected)}): this release of transformers is not known here"
        )
