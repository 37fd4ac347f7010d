"""The two operators and their gradients: each described once, for autograd, vmap and compilers.

An ``Operation`` is a native op together with the eager definition of what it computes. Both take
the op's arguments: tensors first, then options.
"""

from typing import Callable, Tuple

import torch

from . import reference
from .native import add_op_namespace_prefix, ops


class Operation:
    """What ``Forward`` and ``Backward`` have in common.

    Attributes:
        op, op_name, name: the native op, its name, and that with the namespace.
        tensors: the names of the arguments that are tensors.
        differentiable: the positions of the arguments that have a gradient.
        weights: the position of the attention weights or logits: one for each sampling point.
        defaults: the options that stand for those that a call of the op leaves out.
    """

    def __init__(self, name: str, tensors: Tuple[str, ...], defaults: Tuple):
        self.op = getattr(ops, name)
        self.op_name, self.name = name, add_op_namespace_prefix(name)
        self.tensors = tensors
        self.defaults = defaults
        self.weights = 5 if "attention_logits" in tensors else 4
        integers = ("spatial_shapes", "level_start_index")
        self.differentiable = tuple(i for i, x in enumerate(tensors) if x not in integers)

    def split(self, args):
        """The tensors among the arguments, and all options."""
        count = len(self.tensors)
        return args[:count], (*args[count:], *self.defaults[len(args) - count :])


class Forward(Operation):
    """An operator. Its options are points_per_level, nearest, and, if fused, offset_scale."""

    def __init__(self, definition: Callable, tensors: Tuple[str, ...], *scale: float):
        super().__init__(f"{definition.__name__}_forward", tensors, (None, False, *scale))
        self.definition = definition
        self.backward = Backward(self)

    def eager(self, *args):
        tensors, (points_per_level, nearest, *scale) = self.split(args)
        return self.definition(
            *tensors,
            points_per_level=points_per_level and list(points_per_level),
            method="nearest" if nearest else "bilinear",
            **dict(zip(["offset_scale"], scale)),
        )


class Backward(Operation):
    """The gradients of an operator, one for each of its differentiable arguments.

    Its options are the operator's, then what ``request`` returns, then deterministic. A gradient
    that was not requested is a tensor of shape (0,).
    """

    def __init__(self, forward: Forward):
        self.forward = forward
        self.is_fused = "reference_points" in forward.tensors
        super().__init__(
            f"{forward.definition.__name__}_backward",
            (*forward.tensors, "grad_output"),
            (*forward.defaults, *self.request((True,) * 4), False),
        )

    def request(self, needs):
        """The options that ask for the gradients whose flag is set. The plain op has none: it
        always computes all; the fused op can leave out that of the reference points."""
        return needs[1:2] if self.is_fused else ()

    def requested(self, options):
        """A flag for each gradient: whether a call with these options computes it."""
        return (True, options[3], True, True) if self.is_fused else (True, True, True)

    def eager(self, *args):
        (*tensors, grad_output), options = self.split(args)
        args = (*tensors, *options[: len(self.forward.defaults)])
        requested = self.requested(options)
        positions = [i for i, asked in zip(self.forward.differentiable, requested) if asked]
        function, inputs = function_of(self.forward.eager, args, positions)
        grads = iter(torch.func.vjp(function, *inputs)[1](grad_output))
        return tuple(next(grads) if asked else grad_output.new_zeros(0) for asked in requested)


def function_of(function, args, positions):
    """``function(*args)`` as a function of the arguments at ``positions``, and those arguments."""

    def of_some(*some):
        replaced = list(args)
        for position, arg in zip(positions, some):
            replaced[position] = arg
        return function(*replaced)

    return of_some, [args[position] for position in positions]


_LEVELS = ("value", "spatial_shapes", "level_start_index")
PLAIN = Forward(reference.ms_deform_attn, (*_LEVELS, "sampling_locations", "attention_weights"))
FUSED = Forward(
    reference.fused_ms_deform_attn,
    (*_LEVELS, "reference_points", "sampling_offsets", "attention_logits"),
    0.5,
)
OPERATIONS = {op.name: op for f in (PLAIN, FUSED) for op in (f, f.backward)}
