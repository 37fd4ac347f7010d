"""What PyTorch must know of the native ops: their results' shapes, autograd, vmap, and FLOPs."""

import contextlib
import math
from typing import Any, Callable, Tuple

import torch
from torch.utils import flop_counter

from . import private
from .autograd import call, gradients, over_problems
from .native import add_op_namespace_prefix, ops
from .operations import FUSED, PLAIN, Backward, Operation, Options, Tensors

# ------------------------------------------------------------------------------------------ fakes


def _register_fake(operation: Operation, results: Callable[..., Any]) -> None:
    """results: of the tensors and the options of a call."""

    def fake(*args: Any) -> Any:
        tensors, options = operation.split(args)
        value = tensors[0]
        # One tensor on "meta" is enough to come here, with the others on a device that the caller
        # expects a result on.
        for name, tensor in zip(operation.tensors, tensors):
            if tensor.device != value.device:
                raise RuntimeError(
                    f"{name} is on {tensor.device}, expected {value.device}, the device of value"
                )
        return results(operation, tensors, options)

    torch.library.register_fake(add_op_namespace_prefix(operation.op_name), fake)


def _output(operation: Operation, tensors: Tensors, options: Options) -> torch.Tensor:
    value, weights = tensors[0], tensors[operation.weights]
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, weights.shape[1], heads * channels)


def _gradients(operation: Backward, tensors: Tensors, options: Options) -> Tuple[torch.Tensor, ...]:
    asked = operation.requested(options)
    inputs = [tensors[position] for position in operation.forward.differentiable]
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in zip(inputs, asked))


# ------------------------------------------------------------------------------- autograd and vmap


def _register_autograd(operation: Operation) -> None:
    """For calls of the op that did not come from ``autograd.call``: those of compiled, exported and
    scripted programs."""
    if private.below_autograd is contextlib.nullcontext:
        _register_autograd_publicly(operation)
        return

    def kernel(*args: Any) -> Any:
        try:
            tensors, options = operation.split(args)
            return call(operation, tensors, options, by_op=True)
        except NotImplementedError as error:
            if private.transforms_active():
                raise NotImplementedError(
                    f"{operation.name} is called under a transform of torch.func, expected a call "
                    "of this kernel's function, which supports them"
                ) from error
            raise

    library = torch.library.Library(operation.name.split("::")[0], "FRAGMENT")
    library.impl(add_op_namespace_prefix(operation.op_name), kernel, "Autograd")
    # What a library has registered is withdrawn when it is no longer referenced.
    ops.libraries.append(library)


def _register_autograd_publicly(operation: Operation) -> None:
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        tensors, options = operation.split(inputs)
        ctx.call = operation, options
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return gradients(ctx, grad_outputs, first=0)

    torch.library.register_autograd(
        add_op_namespace_prefix(operation.op_name), backward, setup_context=setup_context
    )


def _register_vmap(operation: Operation) -> None:
    if not hasattr(torch.library, "register_vmap"):  # of torch 2.5
        return

    def vmap(info: Any, in_dims: Tuple[Any, ...], *args: Any) -> Any:
        return over_problems(operation, _call_op, info, in_dims, *operation.split(args))

    torch.library.register_vmap(add_op_namespace_prefix(operation.op_name), vmap)


def _call_op(operation: Operation, tensors: Tensors, options: Options) -> Any:
    return operation.op(*tensors, *options)


# ------------------------------------------------------------------------------------------- FLOPs


def _register_flops(operation: Operation, per_corner: Callable[[Options], int]) -> None:
    """Tells FlopCounterMode of the op: ``per_corner(options)`` operations for each channel of each
    corner of each sample. A bilinear sample has four corners, a nearest one has one. What does not
    grow with the number of channels (locations, corner weights, softmax) is not counted.
    """

    def flops(*shapes: Any, out_shape: Any = None) -> Any:
        (value, *_), options = operation.split(shapes)
        samples = math.prod(shapes[operation.weights])
        return per_corner(options) * (1 if options[1] else 4) * samples * value[3]

    packet = getattr(ops, operation.op_name)
    if packet not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(packet)(flops)


def _flops_of_gradients(operation: Backward) -> Callable[[Options], int]:
    def per_corner(options: Options) -> int:
        value, *points = operation.requested(options)
        return 2 * value + 2 * any(points)

    return per_corner


# ---------------------------------------------------------------------------------- registrations


def _register() -> None:
    ops.libraries = []
    for operator in (PLAIN, FUSED):
        _register_fake(operator, _output)
        _register_fake(operator.backward, _gradients)
        # Forward: multiply a corner's value by its weight, and add the product to the output.
        _register_flops(operator, lambda options: 2)
        # Backward: multiply grad_output by the corner's weight and add it to grad_value; multiply
        # the corner's value by grad_output and add it to the dot product that the gradients of
        # weights and locations are made from. Each if it is asked for.
        _register_flops(operator.backward, _flops_of_gradients(operator.backward))
        for operation in (operator, operator.backward):
            _register_autograd(operation)
            _register_vmap(operation)


# A package that is imported again, from a copy of its folder, finds the ops registered.
if not hasattr(ops, "libraries"):
    _register()
