"""How a call reaches its native op, and what autograd and torch.func are told of it.

A call takes one of four routes:
* Under torch.compile and torch.export, the op itself; see registrations.py.
* Under a transform of torch.func and in forward-mode AD, ``Transformed``.
* Where gradients are to be recorded, ``Recorded``, which is the same without what only transforms
  need: torch.autograd.Function takes some 25 us less if it has no setup_context.
* Else the op, without autograd.
"""

import sys
from typing import Optional

import torch

from . import private
from .operations import Forward, Operation, function_of


def call(operation: Operation, *args):
    """The result of ``operation``, with whatever gradients and transforms the caller wants."""
    if torch.compiler.is_compiling():
        from . import compiled

        if private.transforms_active():
            return compiled.transformed(operation.name, *args)
        return operation.op(*args)
    try:
        return call_eagerly(operation, args)
    except RuntimeError as error:
        if _has_unknown_tensors(args):
            from . import sharding  # noqa: F401

            return call_eagerly(operation, args)
        clearer = _name_the_argument(operation, args)
        if clearer is None:
            raise
        raise clearer from error


def call_eagerly(operation, args):
    if private.transforms_active() or private.dual_levels._current_level >= 0:
        try:
            return Transformed.apply(operation, *args)
        except RuntimeError as error:
            # torch.func.functionalize takes ops, which write to nothing here, but no Function.
            if "Functionalize rule" not in str(error):
                raise
            return operation.op(*args)
    if torch.is_grad_enabled():
        for position in operation.differentiable:
            if getattr(args[position], "requires_grad", False):
                if torch.jit.is_tracing():  # a trace holds ops, no Python
                    return operation.op(*args)
                return Recorded.apply(operation, *args)
    with private.below_autograd():
        return operation.op(*args)


def _has_unknown_tensors(args) -> bool:
    """Whether there are DTensors, and sharding.py, which has the rules for them, is not loaded."""
    dtensors = sys.modules.get("torch.distributed.tensor")
    if dtensors is None or f"{__package__}.sharding" in sys.modules:
        return False
    return any(isinstance(arg, dtensors.DTensor) for arg in args)


def _name_the_argument(operation, args) -> Optional[RuntimeError]:
    """An error with the argument's name, for a call that PyTorch refused without giving it."""
    for name, tensor in zip(operation.tensors, args):
        if tensor is None:
            return RuntimeError(f"{name} is None, expected a tensor")
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_nested:
            kind = "is a nested tensor"
        elif tensor.is_quantized:
            kind = f"has dtype {tensor.dtype}"
        elif tensor.layout != torch.strided:
            kind = f"has layout {tensor.layout}"
        else:
            continue
        return NotImplementedError(
            f"{name} {kind}, expected a dense tensor: layout torch.strided, not quantized"
        )
    return None


def save(ctx, operation, args):
    """Keeps what ``gradients`` needs of a call."""
    count = len(operation.tensors)
    ctx.save_for_backward(*args[:count])
    ctx.call = operation, args[count:]


def gradients(ctx, needs_input_grad, grad_outputs):
    """The gradient of each argument of a call, or None.

    Args:
        ctx: what ``save`` has seen.
        needs_input_grad: for each argument, whether its gradient is wanted.
        grad_outputs: one for each result.
    """
    operation, options = ctx.call
    grads = [None] * len(needs_input_grad)
    if isinstance(operation, Forward):
        backward = operation.backward
        needs = tuple([needs_input_grad[position] for position in operation.differentiable])
        deterministic = torch.are_deterministic_algorithms_enabled()
        args = (
            *ctx.saved_tensors,
            *grad_outputs,
            *options,
            *backward.request(needs),
            deterministic,
        )
        found = zip(operation.differentiable, call(backward, *args))
    else:
        args = (*ctx.saved_tensors, *options)
        positions = [i for i in operation.differentiable if needs_input_grad[i]]
        function, inputs = function_of(operation.eager, args, positions)
        found = zip(positions, torch.func.vjp(function, *inputs)[1](tuple(grad_outputs)))
    for position, grad in found:
        if needs_input_grad[position]:
            grads[position] = grad
    return grads


class Recorded(torch.autograd.Function):
    """A call outside of transforms that records its gradients."""

    @staticmethod
    def forward(ctx, operation, *args):
        save(ctx, operation, args)
        with private.below_autograd():
            return operation.op(*args)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return None, *gradients(ctx, ctx.needs_input_grad[1:], grad_outputs)


class Transformed(torch.autograd.Function):
    """A call under transforms of torch.func, or with tangents of forward-mode AD.

    A tangent is computed through the eager definition: there is no kernel for it.
    """

    @staticmethod
    def forward(operation, *args):
        with private.below_autograd():
            return operation.op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        operation, *args = inputs
        save(ctx, operation, args)
        ctx.save_for_forward(*args[: len(operation.tensors)])

    backward = Recorded.backward

    @staticmethod
    def jvp(ctx, _, *tangents):
        operation, options = ctx.call
        args = (*ctx.saved_tensors, *options)
        positions = [i for i in operation.differentiable if tangents[i] is not None]
        function, primals = function_of(operation.eager, args, positions)
        # The pullback is linear, and its transpose multiplies tangents by the Jacobian. (Levels of
        # torch.autograd.forward_ad do not nest, so that torch.func.jvp is of no use inside one.)
        outputs, pullback = torch.func.vjp(function, *primals)
        zeros = torch.utils._pytree.tree_map(torch.zeros_like, outputs)
        _, transposed = torch.func.vjp(pullback, zeros)
        return transposed(tuple(tangents[i] for i in positions))[0]

    @staticmethod
    def vmap(info, in_dims, operation, *args):
        return over_problems(operation, call, info, in_dims[1:], args)


def over_problems(operation, function, info, in_dims, args):
    """vmap's rule: ``function(operation, *args)`` for many problems, which are put into one batch.

    info, in_dims: as ``torch.library.register_vmap`` describes them. Returns the results and their
    dimensions of problems.
    """
    problems = info.batch_size

    def fold(tensor, dim):
        if dim is None:
            return tensor.expand(problems, *tensor.shape)
        return tensor.movedim(dim, 0)

    folded = list(args)
    for position, name in enumerate(operation.tensors):
        if position in operation.differentiable:
            folded[position] = fold(args[position], in_dims[position])
        elif in_dims[position] is not None:
            raise RuntimeError(f"{name} is vmapped, expected the same for all problems")
    batch = folded[0].shape[1]
    for position in operation.differentiable:
        folded[position] = folded[position].flatten(0, 1)
    results = function(operation, *folded)

    def unfold(result):
        return result.unflatten(0, (problems, result.shape[0] // problems if problems else batch))

    if isinstance(results, torch.Tensor):
        return unfold(results), 0
    return tuple(unfold(result) for result in results), (0,) * len(results)
