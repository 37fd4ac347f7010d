"""The form that everything compared is brought into."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from kernels import get_kernel

from .benchmark import Inputs, Workload, for_points_of

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = re.search(r'^repo-id = "(.+)"', (ROOT / "build.toml").read_text(), re.M)[1]
# A function of the tensors that ``Operator.arrange`` returns, giving (batch, queries,
# heads * channels).
Forward = Callable[..., torch.Tensor]
Tensors = Sequence[torch.Tensor]


class Unsupported(Exception):
    """An implementation does not offer this, which is not to say that it fails."""


class Operator(NamedTuple):
    """An implementation, ready for one workload."""

    forward: Forward
    # A function of the arranged inputs and grad_output; None where autograd is the way.
    backward: Callable[..., Tensors] | None = None
    # What forward takes, made of the inputs before the clock starts: the five tensors themselves,
    # or value, shapes, starts and whatever tensors of queries a peer wants instead.
    arrange: Callable[[Inputs], Tensors] = tuple
    # What forward is meant to be, in float64; None for the plain operator.
    reference: Forward | None = None
    # What is compared, made of the gradients of the arranged tensors, and its names.
    gradients: Callable[[Tensors], Tensors] = tuple
    names: Sequence[str] = ("grad_value", "grad_sampling_locations", "grad_attention_weights")

    def prepare_backward(self, arguments: Tensors) -> Callable[[torch.Tensor], Tensors]:
        """A function of grad_output that does the backward's work and no other.

        It returns the gradients of the floating-point ``arguments``, which are arranged. For
        autograd the forward happens here, once, and its graph is kept.
        """
        if self.backward is not None:
            return partial(self.backward, *arguments)
        arguments = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
        leaves = [x for x in arguments if x.requires_grad]
        output = self.forward(*arguments)
        return partial(torch.autograd.grad, output, leaves, retain_graph=True)


@dataclass(frozen=True)
class Implementation:
    tags: dict[str, str]
    # Called for each workload; what it raises is recorded as that implementation's failure.
    load: Callable[[Workload], Operator]
    # Called once; what it raises is recorded as the reason why the implementation is not there.
    find: Callable[[], object] = lambda: None


@cache
def get_project_kernel() -> ModuleType:
    """This checkout's kernel, the way users load it from the Hub."""
    os.environ.setdefault("LOCAL_KERNELS", f"{REPOSITORY}={ROOT}")
    # A CUDA build of torch makes the loader pick the CUDA variant, GPU or not.
    backend = None if torch.cuda.is_available() else "cpu"
    return get_kernel(REPOSITORY, version=1, backend=backend)


def plain_reference(workload: Workload) -> Forward:
    """The eager definition of the operator."""
    return for_points_of(workload, get_project_kernel().reference.ms_deform_attn)
