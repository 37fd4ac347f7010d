"""The two operators and their gradients: each described once, for autograd, vmap and compilers.

An ``Operation`` is a native op together with the eager definition of what it computes. Both take
the same tensors and options; the op takes them as one list of arguments, tensors first.
"""

from typing import Any, Callable, List, Sequence, Tuple

import torch

from . import reference
from .native import add_op_namespace_prefix, ops

Tensors = Sequence[torch.Tensor]
Options = Tuple[Any, ...]


class Operation:
    """What ``Forward`` and ``Backward`` have in common.

    Attributes:
        op, op_name, name: the native op, its name, and that with the namespace.
        tensors: the names of the arguments that are tensors.
        differentiable: the positions of the arguments that have a gradient.
        weights: the position of the attention weights or logits: one for each sampling point.
        defaults: the options that stand for those that a call of the op leaves out.
        omissible: the defaults, if a call may leave out all of them, which saves up to 2 us.
    """

    def __init__(self, name: str, tensors: Tuple[str, ...], defaults: Options):
        self.op = getattr(ops, name).default
        self.op_name, self.name = name, add_op_namespace_prefix(name)
        self.tensors = tensors
        self.defaults = defaults
        arguments = self.op._schema.arguments[len(tensors) :]
        self.omissible = defaults if all(a.has_default_value() for a in arguments) else None
        self.weights = 5 if "attention_logits" in tensors else 4
        integers = ("spatial_shapes", "level_start_index")
        self.differentiable = tuple(i for i, x in enumerate(tensors) if x not in integers)

    def split(self, args: Tuple[Any, ...]) -> Tuple[Tuple[Any, ...], Options]:
        """The tensors among the op's arguments, and all options."""
        count = len(self.tensors)
        return args[:count], (*args[count:], *self.defaults[len(args) - count :])


class Forward(Operation):
    """An operator. Its options are points_per_level, nearest, and, if fused, offset_scale."""

    def __init__(
        self, definition: Callable[..., torch.Tensor], tensors: Tuple[str, ...], *scale: float
    ):
        super().__init__(f"{definition.__name__}_forward", tensors, (None, False, *scale))
        self.definition = definition
        self.backward = Backward(self)

    def eager(self, tensors: Tensors, options: Options) -> torch.Tensor:
        points_per_level, nearest, *scale = options
        return self.definition(
            *tensors,
            points_per_level=points_per_level,
            method="nearest" if nearest else "bilinear",
            **dict(zip(["offset_scale"], scale)),
        )


class Backward(Operation):
    """The gradients of an operator, one for each of its differentiable arguments.

    Its options are the operator's, then what ``request`` returns. A gradient that was not requested
    is a tensor of shape (0,).
    """

    def __init__(self, forward: Forward):
        self.forward = forward
        self.is_fused = "reference_points" in forward.tensors
        super().__init__(
            f"{forward.definition.__name__}_backward",
            (*forward.tensors, "grad_output"),
            (*forward.defaults, *self.request((True,) * len(forward.tensors), False)),
        )

    def request(self, needs: Sequence[bool], deterministic: bool) -> Tuple[bool, ...]:
        """The options that ask for the gradients of the operator's tensors whose flag is set. Those
        of locations and weights, or of offsets and logits, come together."""
        reference = (needs[3],) if self.is_fused else ()
        weights = self.forward.weights
        return (*reference, deterministic, needs[0], needs[weights - 1] or needs[weights])

    def requested(self, options: Options) -> Tuple[bool, ...]:
        """A flag for each gradient: whether a call with these options computes it."""
        *reference, _, value, points = options[len(self.forward.defaults) :]
        return (value, *reference, points, points)

    def eager(self, tensors: Tensors, options: Options) -> Tuple[torch.Tensor, ...]:
        *tensors, grad_output = tensors
        requested = self.requested(options)
        positions = [i for i, asked in zip(self.forward.differentiable, requested) if asked]
        forward_options = options[: len(self.forward.defaults)]
        function, inputs = eager_function(self.forward, tensors, forward_options, positions)
        grads = iter(torch.func.vjp(function, *inputs)[1](grad_output))
        return tuple(next(grads) if asked else grad_output.new_zeros(0) for asked in requested)


def eager_function(
    operation: Any, tensors: Tensors, options: Options, positions: Sequence[int]
) -> Tuple[Callable[..., Any], List[torch.Tensor]]:
    """``operation.eager`` as a function of the tensors at ``positions``, and those tensors."""

    def function(*some: torch.Tensor) -> Any:
        replaced = list(tensors)
        for position, tensor in zip(positions, some):
            replaced[position] = tensor
        return operation.eager(replaced, options)

    return function, [tensors[position] for position in positions]


_LEVELS = ("value", "spatial_shapes", "level_start_index")
PLAIN = Forward(reference.ms_deform_attn, (*_LEVELS, "sampling_locations", "attention_weights"))
FUSED = Forward(
    reference.fused_ms_deform_attn,
    (*_LEVELS, "reference_points", "sampling_offsets", "attention_logits"),
    0.5,
)
OPERATIONS = {op.name: op for f in (PLAIN, FUSED) for op in (f, f.backward)}
