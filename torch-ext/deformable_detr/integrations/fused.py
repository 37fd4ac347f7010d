"""The attention modules of transformers on the fused operator.

transformers computes the softmax and the sampling locations before it samples: some ten small
kernels and two large tensors a call. Here an attention's forward gives the fused operator what its
linear layers return. transformers has fifteen such classes, in four families that differ in the
names of their options and in what a mask means.
"""

import functools
import inspect
from collections import namedtuple
from typing import Any, Callable, FrozenSet, Iterator, NamedTuple, Optional, Set, Tuple

import torch
from torch import nn

from .. import private
from ..layers import METHODS
from ..levels import level_tensors
from ..modules import attend


class Family(NamedTuple):
    """What the attention classes of a family have in common.

    Options are given by the name of the module's attribute that holds them, None where a family
    lacks one.
    """

    parameters: FrozenSet[str]  # of forward, besides self, all that may be given to it
    points_per_level: Optional[str] = None  # offsets have the points of all levels in a row
    method: Optional[str] = None
    offset_scale: Optional[str] = None
    projects: bool = True  # has value_proj and output_proj
    mask_marks_padding: bool = False  # else attention_mask marks what to keep

    @property
    def attributes(self) -> Set[str]:
        options = (self.points_per_level, self.method, self.offset_scale)
        projections = ("value_proj", "output_proj") if self.projects else ()
        own = ("n_heads", "n_levels", "n_points", "sampling_offsets", "attention_weights")
        return {*own, *projections, *(name for name in options if name is not None)}


_PARAMETERS = frozenset(
    (
        "hidden_states",
        "attention_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "position_embeddings",
        "reference_points",
        "spatial_shapes",
        "spatial_shapes_list",
        "level_start_index",
    )
)
_DETR = Family(_PARAMETERS)
_RT_DETR_V2 = Family(
    _PARAMETERS, points_per_level="n_points_list", method="method", offset_scale="offset_scale"
)
_D_FINE = Family(
    _PARAMETERS - {"encoder_attention_mask", "position_embeddings", "level_start_index"},
    points_per_level="num_points_list",
    method="decoder_method",
    offset_scale="offset_scale",
    projects=False,
)
_MASK_FORMER = Family(_PARAMETERS - {"spatial_shapes"}, mask_marks_padding=True)
_ONE_FORMER = _MASK_FORMER._replace(parameters=_PARAMETERS)

# By the name of the class, of transformers 5.22.
FAMILIES = {
    "DeformableDetrMultiscaleDeformableAttention": _DETR,
    "GroundingDinoMultiscaleDeformableAttention": _DETR,
    "MMGroundingDinoMultiscaleDeformableAttention": _DETR,
    "RTDetrMultiscaleDeformableAttention": _DETR,
    "OmDetTurboMultiscaleDeformableAttention": _DETR,
    "RfDetrMultiscaleDeformableAttention": _DETR,
    "LwDetrMultiscaleDeformableAttention": _DETR,
    "PPDocLayoutV2MultiscaleDeformableAttention": _DETR,
    "PPDocLayoutV3MultiscaleDeformableAttention": _DETR,
    "PPDocLayoutV4MultiscaleDeformableAttention": _DETR,
    "RTDetrV2MultiscaleDeformableAttention": _RT_DETR_V2,
    "DFineMultiscaleDeformableAttention": _D_FINE,
    "Deimv2MultiscaleDeformableAttention": _D_FINE,
    "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention": _MASK_FORMER,
    "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention": _ONE_FORMER,
}
# Their layers hand the weights on to a caller who may be recording them, which the attention cannot
# see: it is not told, and there is no hook. These compute their weights always: a softmax a call.
_WEIGHTS_ALWAYS = {
    "GroundingDinoMultiscaleDeformableAttention",
    "MMGroundingDinoMultiscaleDeformableAttention",
    "OmDetTurboMultiscaleDeformableAttention",
}


def difference(name: str, forward: Callable[..., Any], module: nn.Module) -> Optional[str]:
    """How a class of this name differs from the one of the releases known, if it does.

    Args:
        forward: the class's own.
        module: an instance.
    """
    family = FAMILIES[name]
    takes = set(inspect.signature(forward).parameters) - {"self", "kwargs", "output_attentions"}
    if takes != family.parameters:
        return (
            f"its forward takes ({', '.join(sorted(takes))}), expected "
            f"({', '.join(sorted(family.parameters))})"
        )
    missing = sorted(name for name in family.attributes if not hasattr(module, name))
    if missing:
        return f"it has no {', '.join(missing)}"
    if "forward" in vars(module):
        return "an instance has a forward of its own, which hides that of the class"
    return None


def fused_forward(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """What takes the place of forward in the class of this name."""
    family, always = FAMILIES[name], name in _WEIGHTS_ALWAYS
    parameters = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def fused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(parameters, args))
        output, logits = _attend(self, family, **kwargs)
        # A compiler drops weights that nobody uses.
        if always or kwargs.get("output_attentions") or torch.compiler.is_compiling():
            return output, _weights(logits)
        return _Attended.of(output, logits)

    return fused


def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What takes the place of nn.Module.__call__ in a class with fused_forward.

    Between forward and here are the hooks, by which transformers records attention weights.
    """
    result = nn.Module.__call__(self, *args, **kwargs)
    return result.as_looked_at() if type(result) is _Attended else result


def _attend(
    module: nn.Module,
    family: Family,
    *,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    reference_points: torch.Tensor,
    attention_mask: Optional[torch.Tensor] = None,
    position_embeddings: Optional[torch.Tensor] = None,
    spatial_shapes: Any = None,
    spatial_shapes_list: Any = None,
    level_start_index: Optional[torch.Tensor] = None,
    **_: Any,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The attention's output and its logits."""

    def option(name: Optional[str], default: Any) -> Any:
        return default if name is None else getattr(module, name)

    pixels = encoder_hidden_states.shape[1]
    if spatial_shapes_list is not None:
        expected = sum(height * width for height, width in spatial_shapes_list)
        if expected != pixels:
            raise ValueError(
                f"encoder_hidden_states has {pixels} pixels, expected {expected}, which the levels "
                f"{spatial_shapes_list} have"
            )
    given = spatial_shapes is not None and level_start_index is not None
    # In an export, sizes in a list stay symbolic, where a tensor may fix them.
    if given and not (private.is_exporting() and spatial_shapes_list is not None):
        levels: Tuple[Any, Any] = (spatial_shapes, level_start_index)
    else:
        sizes = spatial_shapes if spatial_shapes_list is None else spatial_shapes_list
        levels = level_tensors(sizes, hidden_states.device)
    if attention_mask is not None and not family.mask_marks_padding:
        attention_mask = ~attention_mask
    if position_embeddings is not None:
        hidden_states = hidden_states + position_embeddings
    method = option(family.method, "default")
    return attend(
        module,
        hidden_states,
        reference_points,
        encoder_hidden_states,
        levels,
        attention_mask,
        option(family.points_per_level, None),
        METHODS.get(method, method),
        option(family.offset_scale, 0.5),
    )


def _weights(logits: torch.Tensor) -> torch.Tensor:
    """The softmax over all points of a (batch, query, head)."""
    return logits.flatten(3).softmax(-1).view_as(logits)


class _Attended(namedtuple("_Attended", ("output", "attention_weights"))):
    """(output, attention weights), whose weights are computed if they are looked at.

    An attention is not told whether someone records its weights. A forward hook sees this pair
    and takes weights from it, or it does not; ``as_looked_at`` then has None for weights that no
    hook has looked at. Looks like a pair, also to pytree, which takes a named tuple apart.
    """

    _logits: Optional[torch.Tensor] = None
    _computed: Optional[torch.Tensor] = None

    @classmethod
    def of(cls, output: torch.Tensor, logits: torch.Tensor) -> "_Attended":
        pair = cls(output, None)
        pair._logits = logits
        return pair

    def as_looked_at(self) -> Tuple[Any, Any]:
        output, weights = super().__iter__()
        return output, weights if self._computed is None else self._computed

    def __getitem__(self, index: Any) -> Any:
        if index == 0:
            return super().__getitem__(0)
        if self._logits is not None:
            self._computed, self._logits = _weights(self._logits), None
        return self.as_looked_at()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __add__(self, other: Any) -> Any:
        return self[:] + other

    attention_weights = property(lambda self: self[1])
