"""The two operators and their gradients: each described once, for autograd, vmap and compilers.

An ``Operation`` is a native op together with the eager definition of what it computes. Its
arguments are the op's tensors, then its options.
"""

from typing import Callable, Tuple

import torch

from . import reference
from .native import add_op_namespace_prefix, ops


class Operation:
    """What ``Forward`` and ``Backward`` have in common.

    Attributes:
        op, name: the native op, and its name with the namespace.
        tensors: the names of the arguments that are tensors. They come first.
        differentiable: the positions of the arguments that have a gradient.
    """

    def __init__(self, name: str, tensors: Tuple[str, ...]):
        self.op = getattr(ops, name)
        self.name = add_op_namespace_prefix(name)
        self.tensors = tensors
        integers = ("spatial_shapes", "level_start_index")
        self.differentiable = tuple(i for i, x in enumerate(tensors) if x not in integers)

    def split(self, args):
        """The tensors among the arguments, and the options."""
        return args[: len(self.tensors)], args[len(self.tensors) :]


class Forward(Operation):
    """An operator. Arguments: its tensors, points_per_level, nearest, and, fused, offset_scale."""

    def __init__(self, definition: Callable, tensors: Tuple[str, ...]):
        super().__init__(f"{definition.__name__}_forward", tensors)
        self.definition = definition
        self.native = self.op
        self.backward = Backward(self)

    def eager(self, *args):
        tensors, (points_per_level, nearest, *offset_scale) = self.split(args)
        return self.definition(
            *tensors,
            points_per_level=points_per_level and list(points_per_level),
            method="nearest" if nearest else "bilinear",
            **dict(zip(["offset_scale"], offset_scale)),
        )


class Backward(Operation):
    """The gradients of an operator.

    Arguments: the operator's tensors, grad_output, the operator's options, and which of its
    differentiable arguments need a gradient, as a tuple of bools. The result is a tuple of the
    gradients that are needed.
    """

    def __init__(self, forward: Forward):
        name = forward.definition.__name__
        super().__init__(f"{name}_backward", (*forward.tensors, "grad_output"))
        self.forward = forward
        self.is_fused = "reference_points" in forward.tensors

    def native(self, *args):
        *args, needs = args
        # The fused op can do without the gradient of the reference points, and is told so.
        request = needs[1:2] if self.is_fused else ()
        deterministic = torch.are_deterministic_algorithms_enabled()
        return self.needed(self.op(*args, *request, deterministic), needs)

    def needs_of_op(self, op_args):
        """Which gradients a call of the op computes."""
        return (True, op_args[len(self.tensors) + 3], True, True) if self.is_fused else (True,) * 3

    @staticmethod
    def needed(grads, needs):
        return tuple([grad for grad, needed in zip(grads, needs) if needed])

    def eager(self, *args):
        *args, needs = args
        tensors, options = self.split(args)
        *tensors, grad_output = tensors
        needed = [i for i, needed in zip(self.forward.differentiable, needs) if needed]
        function, inputs = function_of(self.forward.eager, (*tensors, *options), needed)
        return torch.func.vjp(function, *inputs)[1](grad_output)


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
)
OPERATIONS = {op.name: op for f in (PLAIN, FUSED) for op in (f, f.backward)}
