"""What PyTorch must know of the native ops: the shapes of their results, autograd, and vmap."""

import torch

from .autograd import gradients, over_problems, save
from .operations import FUSED, PLAIN


def _on_one_device(operation, args):
    """One tensor on "meta" is enough to come here, with the others on a device that the caller
    expects a result on."""
    value, *others = operation.split(args)[0]
    for name, tensor in zip(operation.tensors[1:], others):
        if tensor.device != value.device:
            raise RuntimeError(
                f"{name} is on {tensor.device}, expected {value.device}, the device of value"
            )


def _register_forward(operation):
    @torch.library.register_fake(operation.name)
    def fake(*args):
        _on_one_device(operation, args)
        value, weights = args[0], args[len(operation.tensors) - 1]
        batch, _, heads, channels = value.shape
        return value.new_empty(batch, weights.shape[1], heads * channels)


def _register_backward(operation):
    @torch.library.register_fake(operation.name)
    def fake(*args):
        _on_one_device(operation, args)
        needs = operation.needs_of_op(args)
        tensors = [args[position] for position in operation.forward.differentiable]
        return tuple(x.new_empty(x.shape if needed else 0) for x, needed in zip(tensors, needs))


def _register_derivatives(operation, is_backward):
    """Autograd's and vmap's rules, for calls of the op that do not come from ``autograd.call``:
    those of compiled and of exported programs."""

    def setup_context(ctx, inputs, output):
        if is_backward:
            forward_options = len(inputs) - 1 - operation.is_fused
            inputs = (*inputs[:forward_options], operation.needs_of_op(inputs))
        save(ctx, operation, inputs)

    def backward(ctx, *grad_outputs):
        if is_backward:
            grad_outputs = operation.needed(grad_outputs, ctx.call[1][-1])
        return tuple(gradients(ctx, ctx.needs_input_grad, grad_outputs))

    def vmap(info, in_dims, *args):
        return over_problems(operation, call_op, info, in_dims, args)

    torch.library.register_autograd(operation.name, backward, setup_context=setup_context)
    torch.library.register_vmap(operation.name, vmap)


def call_op(operation, *args):
    return operation.op(*args)


for _operator in (PLAIN, FUSED):
    _register_forward(_operator)
    _register_derivatives(_operator, is_backward=False)
    _register_backward(_operator.backward)
    _register_derivatives(_operator.backward, is_backward=True)
