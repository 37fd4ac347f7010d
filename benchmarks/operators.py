"""The form that everything compared is brought into."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from .benchmark import Inputs, Workload

# A function of the tensors that ``Operator.arrange`` returns, giving (batch, queries,
# heads * channels).
Forward = Callable[..., torch.Tensor]
# Of value, locations and weights; then, from an operator that has them, of its reference points.
Gradients = tuple[torch.Tensor, ...]


class Unsupported(Exception):
    """An implementation does not offer this, which is not to say that it fails."""


class Operator(NamedTuple):
    """An implementation, ready for one workload."""

    forward: Forward
    # A function of the arranged inputs and grad_output; None where autograd is the way.
    backward: Callable[..., tuple[torch.Tensor, ...]] | None = None
    # What forward takes, made of the inputs before the clock starts: the five tensors themselves,
    # or whatever a peer wants instead.
    arrange: Callable[[Inputs], tuple[torch.Tensor, ...]] = tuple
    # The gradients, from those of the arranged tensors.
    gradients: Callable[[tuple[torch.Tensor, ...]], Gradients] = tuple
    # Whether the peer takes the softmax itself, so that its last gradient is that of logits.
    takes_logits: bool = False
    # Where it takes offsets, so that its second gradient is theirs: that, of the locations'.
    of_offsets: Callable[[torch.Tensor], torch.Tensor] | None = None
    # The inputs that the arranged tensors stand for, in float64, where rounding these makes them
    # others than those of the workload.
    meaning: Callable[[Inputs], Inputs] | None = None

    def prepare_backward(self, inputs: Inputs) -> Callable[[torch.Tensor], tuple]:
        """A function of grad_output that does the backward's work and no other.

        It returns the gradients of the arranged floating-point tensors. For autograd the forward
        happens here, once, and its graph is kept.
        """
        arguments = self.arrange(inputs)
        if self.backward is not None:
            return lambda grad_output: self.backward(*arguments, grad_output)
        floating = [x.detach().requires_grad_() if x.is_floating_point() else x for x in arguments]
        leaves, arguments = [x for x in floating if x.requires_grad], floating
        output = self.forward(*arguments)
        return lambda grad_output: torch.autograd.grad(
            output, leaves, grad_output, retain_graph=True
        )


@dataclass(frozen=True)
class Implementation:
    tags: dict[str, str]
    # Called for each workload; what it raises is recorded as that implementation's failure.
    load: Callable[[Workload], Operator]
    # Called once; what it raises is recorded as the reason why the implementation is not there.
    find: Callable[[], object] = lambda: None


def for_points_of(workload: Workload, function: Callable) -> Callable:
    """``function``, told the points of each level where the workload's levels differ in them.

    Raises:
        Unsupported: they do, and the function has no argument for it.
    """
    if isinstance(workload.points, int):
        return function
    if "points_per_level" not in inspect.signature(function).parameters:
        raise Unsupported(f"points is {workload.points}, expected one number for all levels")
    return partial(function, points_per_level=list(workload.points))
