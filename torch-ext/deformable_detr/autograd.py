"""How a call reaches its native op, and what autograd and torch.func are told of it.

A call takes one of four routes:
* Under torch.compile, torch.export and torch.jit.trace, whose programs hold ops, no Python: the op
  itself; see registrations.py. Under torch.onnx.export, PyTorch's own operators; see portable.py.
* Under a transform of torch.func and in forward-mode AD, ``Transformed``.
* Where gradients are to be recorded, ``Recorded``, which is the same without what only transforms
  need: torch.autograd.Function takes some 25 us less if it has no setup_context.
* Else the op, without autograd.
"""

import sys
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch

from . import native, portable, private
from .operations import Forward, Operation, Options, Tensors, eager_function


def call(operation: Operation, tensors: Tensors, options: Options, by_op: bool = False) -> Any:
    """The result of ``operation``, with whatever gradients and transforms the caller wants.

    by_op: whether a call of the op itself comes here, to have its gradients recorded.
    """
    if not by_op and torch.compiler.is_compiling():
        from . import compiled

        if isinstance(operation, Forward) and portable.in_onnx_export():
            return getattr(portable, operation.definition.__name__)(*tensors, *options)
        if private.transforms_active():
            return compiled.transformed(operation.name, options, *tensors)
        return operation.op(*tensors, *options)
    try:
        if private.transforms_active() or private.dual_levels._current_level >= 0:
            return _call_transformed(operation, tensors, options)
        if torch.is_grad_enabled():
            for position in operation.differentiable:
                if getattr(tensors[position], "requires_grad", False):
                    if private.is_tracing():
                        return operation.op(*tensors, *options)
                    return _record((operation, options), *tensors)
        return _run(operation, tensors, options)
    except RuntimeError as error:
        if _has_unknown_tensors(tensors):
            from . import sharding  # noqa: F401

            return call(operation, tensors, options, by_op)
        clearer = _name_the_argument(operation, tensors)
        if clearer is None:
            raise
        raise clearer from error


def _run(operation: Operation, tensors: Tensors, options: Options) -> Any:
    """The op's result. Autograd is told nothing of it."""
    with private.below_autograd():
        if options == operation.omissible:
            return operation.op(*tensors)
        return operation.op(*tensors, *options)


def _call_transformed(operation: Operation, tensors: Tensors, options: Options) -> Any:
    if private.is_tracing():
        return operation.op(*tensors, *options)
    try:
        return Transformed.apply((operation, options), *tensors)
    except RuntimeError as error:
        # torch.func.functionalize takes ops, which write to nothing here, but no Function.
        if "Functionalize rule" not in str(error):
            raise
        return operation.op(*tensors, *options)


def _has_unknown_tensors(tensors: Tensors) -> bool:
    """Whether there are DTensors, and sharding.py, which has the rules for them, is not loaded."""
    dtensors = sys.modules.get("torch.distributed.tensor")
    if dtensors is None or f"{__package__}.sharding" in sys.modules:
        return False
    return any(isinstance(tensor, dtensors.DTensor) for tensor in tensors)


def _name_the_argument(operation: Operation, tensors: Tensors) -> Optional[RuntimeError]:
    """An error with the argument's name, for a call that PyTorch refused without giving it."""
    for name, tensor in zip(operation.tensors, tensors):
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


def gradients(
    ctx: Any, grad_outputs: Sequence[torch.Tensor], first: int
) -> Tuple[Optional[torch.Tensor], ...]:
    """The gradient of each input of a call, or None where it is not needed.

    Args:
        ctx: has the call's tensors saved, then those it kept for this, and its operation and
            options in ``call``.
        grad_outputs: one for each result.
        first: the position of the first tensor among the inputs.
    """
    operation, options = ctx.call
    needs = ctx.needs_input_grad
    positions: Sequence[int]
    if isinstance(operation, Forward):
        backward, positions = operation.backward, operation.differentiable
        wanted = backward.request(needs[first:], torch.are_deterministic_algorithms_enabled())
        saved = ctx.saved_tensors  # checkpoint lets it be read once
        if native.given is None:
            found = call(backward, (*saved, *grad_outputs), (*options, *wanted))
        else:
            count = len(operation.tensors)
            # Under vmap the backward op gets the inputs of many problems: what was kept is of one.
            with native.given(() if private.transforms_active() else saved[count:]):
                found = call(backward, (*saved[:count], *grad_outputs), (*options, *wanted))
    else:
        positions = [position for position in operation.differentiable if needs[first + position]]
        function, inputs = eager_function(operation, ctx.saved_tensors, options, positions)
        found = torch.func.vjp(function, *inputs)[1](tuple(grad_outputs))
    grads: List[Optional[torch.Tensor]] = [None] * len(needs)
    for position, grad in zip(positions, found):
        if needs[first + position]:
            grads[first + position] = grad
    return tuple(grads)


class Recorded(torch.autograd.Function):
    """A call outside of transforms that records its gradients."""

    @staticmethod
    def forward(ctx: Any, call: Tuple[Any, Options], *tensors: torch.Tensor) -> Any:
        ctx.call = operation, options = call
        if native.keeping is None or not isinstance(operation, Forward):
            ctx.save_for_backward(*tensors)
            return _run(operation, tensors, options)
        with private.below_autograd():
            output, kept = native.keeping(operation.op, (*tensors, *options))
        ctx.save_for_backward(*tensors, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return gradients(ctx, grad_outputs, first=1)


_record = private.fast_apply(Recorded)


class Transformed(torch.autograd.Function):
    """A call under transforms of torch.func, or with tangents of forward-mode AD.

    A tangent is computed through the eager definition: there is no kernel for it.
    """

    @staticmethod
    def forward(call: Tuple[Any, Options], *tensors: torch.Tensor) -> Any:
        operation, options = call
        return _run(operation, tensors, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    backward = Recorded.backward

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        operation, options = ctx.call
        positions = [i for i in operation.differentiable if tangents[i] is not None]
        function, primals = eager_function(operation, ctx.saved_tensors, options, positions)
        # The pullback is linear, and its transpose multiplies tangents by the Jacobian. (Levels of
        # torch.autograd.forward_ad do not nest, so that torch.func.jvp is of no use inside one.)
        outputs, pullback = torch.func.vjp(function, *primals)  # type: ignore[misc]
        zeros = torch.utils._pytree.tree_map(torch.zeros_like, outputs)
        _, transposed = torch.func.vjp(pullback, zeros)  # type: ignore[misc]
        return transposed(tuple(tangents[i] for i in positions))[0]

    @staticmethod
    def vmap(
        info: Any, in_dims: Tuple[Any, ...], call_: Tuple[Any, Options], *tensors: torch.Tensor
    ) -> Any:
        operation, options = call_
        return over_problems(operation, call, info, in_dims[1:], tensors, options)


def over_problems(
    operation: Operation,
    function: Callable[..., Any],
    info: Any,
    in_dims: Tuple[Any, ...],
    tensors: Tensors,
    options: Options,
) -> Tuple[Any, Any]:
    """vmap's rule: ``function(operation, tensors, options)`` for many problems, as one batch.

    Args:
        info, in_dims: as ``torch.library.register_vmap`` describes them.

    Returns:
        The results, and for each the dimension of the problems.
    """
    problems: int = info.batch_size

    def move(tensor: Any, dim: Optional[int]) -> Any:
        if dim is None:
            return tensor.expand(problems, *tensor.shape)
        return tensor.movedim(dim, 0)

    tensors = list(tensors)
    for position, name in enumerate(operation.tensors):
        if position in operation.differentiable:
            tensors[position] = move(tensors[position], in_dims[position])
        elif in_dims[position] is not None:
            raise RuntimeError(f"{name} is vmapped, expected the same for all problems")
    batch = tensors[0].shape[1]
    for position in operation.differentiable:
        tensors[position] = tensors[position].flatten(0, 1)
    results = function(operation, tuple(tensors), options)

    def unfold(result: Any) -> Any:
        return result.unflatten(0, (problems, result.shape[0] // problems if problems else batch))

    if isinstance(results, torch.Tensor):
        return unfold(results), 0
    return tuple(unfold(result) for result in results), (0,) * len(results)
