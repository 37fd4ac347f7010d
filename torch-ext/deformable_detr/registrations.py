"""What PyTorch must know of the native ops: the shapes they return, autograd, and vmap."""

import torch

from . import reference
from .native import add_op_namespace_prefix, ops

# ------------------------------------------------------------------------------------------ fakes


def _on_one_device(name):
    """Before the fake of the op: one tensor on "meta" is enough to come here, with the others on a
    device that the caller expects a result on."""

    def decorate(fake):
        def checked(value, *rest, **options):
            arguments = getattr(ops, name).default._schema.arguments[1:]
            for argument, tensor in zip(arguments, rest):
                if isinstance(tensor, torch.Tensor) and tensor.device != value.device:
                    raise RuntimeError(
                        f"{argument.name} is on {tensor.device}, expected {value.device}, the "
                        "device of value"
                    )
            return fake(value, *rest, **options)

        return checked

    return decorate


@torch.library.register_fake(add_op_namespace_prefix("ms_deform_attn_forward"))
@_on_one_device("ms_deform_attn_forward")
def _forward_fake(
    value,
    spatial_shapes,
    level_start_index,
    sampling_locations,
    attention_weights,
    points_per_level=None,
    nearest=False,
):
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


@torch.library.register_fake(add_op_namespace_prefix("ms_deform_attn_backward"))
@_on_one_device("ms_deform_attn_backward")
def _backward_fake(
    value,
    spatial_shapes,
    level_start_index,
    sampling_locations,
    attention_weights,
    grad_output,
    points_per_level=None,
    nearest=False,
    deterministic=False,
):
    return tuple(
        tensor.new_empty(tensor.shape) for tensor in (value, sampling_locations, attention_weights)
    )


@torch.library.register_fake(add_op_namespace_prefix("fused_ms_deform_attn_forward"))
@_on_one_device("fused_ms_deform_attn_forward")
def _fused_forward_fake(
    value,
    spatial_shapes,
    level_start_index,
    reference_points,
    sampling_offsets,
    attention_logits,
    points_per_level,
    nearest,
    offset_scale,
):
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_offsets.shape[1], heads * channels)


@torch.library.register_fake(add_op_namespace_prefix("fused_ms_deform_attn_backward"))
@_on_one_device("fused_ms_deform_attn_backward")
def _fused_backward_fake(
    value,
    spatial_shapes,
    level_start_index,
    reference_points,
    sampling_offsets,
    attention_logits,
    grad_output,
    points_per_level,
    nearest,
    offset_scale,
    reference_needs_grad,
    deterministic=False,
):
    return (
        value.new_empty(value.shape),
        reference_points.new_empty(reference_points.shape if reference_needs_grad else 0),
        sampling_offsets.new_empty(sampling_offsets.shape),
        attention_logits.new_empty(attention_logits.shape),
    )


# --------------------------------------------------------------------------------------- autograd


def _save_inputs(ctx, inputs, output):
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_output):
    grad_value, grad_locations, grad_weights = ops.ms_deform_attn_backward(
        *ctx.saved_tensors, grad_output, *ctx.options, torch.are_deterministic_algorithms_enabled()
    )
    return grad_value, None, None, grad_locations, grad_weights, None, None


def _fused_backward(ctx, grad_output):
    reference_needs_grad = ctx.needs_input_grad[3]
    grad_value, grad_reference, grad_offsets, grad_logits = ops.fused_ms_deform_attn_backward(
        *ctx.saved_tensors,
        grad_output,
        *ctx.options,
        reference_needs_grad,
        torch.are_deterministic_algorithms_enabled(),
    )
    if not reference_needs_grad:
        grad_reference = None
    return grad_value, None, None, grad_reference, grad_offsets, grad_logits, None, None, None


def _differentiate_twice(function, tensors, needs_grad, grads_of_grads):
    """The gradients of a backward op: through the eager definition, which autograd differentiates.

    tensors: the operator's, then grad_output. needs_grad: which of the operator's tensors the
    backward gave gradients to; grads_of_grads: theirs. Returns one gradient, or None, for each of
    tensors.
    """
    with torch.enable_grad():
        tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        *inputs, grad_output = tensors
        wanted = [tensor for tensor, needed in zip(inputs, needs_grad) if needed]
        grads = torch.autograd.grad(
            function(*inputs), wanted, grad_output, create_graph=True, materialize_grads=True
        )
        # With nearest sampling the locations' gradient is zero, whatever the inputs.
        pairs = [(g, gg) for g, gg in zip(grads, grads_of_grads) if g.requires_grad]
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        results = torch.autograd.grad(
            [g for g, _ in pairs],
            differentiable,
            [gg for _, gg in pairs],
            materialize_grads=True,
        )
    results = iter(results)
    return [next(results) if tensor.requires_grad else None for tensor in tensors]


def _options(points_per_level, nearest):
    return {
        "points_per_level": points_per_level and list(points_per_level),
        "method": "nearest" if nearest else "bilinear",
    }


def _double_backward(ctx, *grads_of_grads):
    *options, _ = ctx.options

    def function(*inputs):
        return reference.ms_deform_attn(*inputs, **_options(*options))

    needs_grad = (True, False, False, True, True)
    grads = _differentiate_twice(function, ctx.saved_tensors, needs_grad, grads_of_grads)
    return (*grads, None, None, None)


def _fused_double_backward(ctx, *grads_of_grads):
    *options, offset_scale, reference_needs_grad, _ = ctx.options

    def function(*inputs):
        return reference.fused_ms_deform_attn(
            *inputs, **_options(*options), offset_scale=offset_scale
        )

    needs_grad = (True, False, False, reference_needs_grad, True, True)
    if not reference_needs_grad:
        grads_of_grads = (grads_of_grads[0], *grads_of_grads[2:])
    grads = _differentiate_twice(function, ctx.saved_tensors, needs_grad, grads_of_grads)
    return (*grads, None, None, None, None, None)


# ------------------------------------------------------------------------------------------- vmap


def _over_problems(op):
    """The op over a batch of problems: their dimension becomes part of the batch."""

    def fold(problems, tensor, dim):
        if dim is None:
            tensor = tensor.expand(problems, *tensor.shape)
        else:
            tensor = tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    def run(info, in_dims, value, spatial_shapes, level_start_index, *rest):
        for name, dim in zip(("spatial_shapes", "level_start_index"), in_dims[1:3]):
            if dim is not None:
                raise RuntimeError(f"{name} is vmapped, expected the same for all problems")
        outputs = op(
            fold(info.batch_size, value, in_dims[0]),
            spatial_shapes,
            level_start_index,
            *(
                fold(info.batch_size, x, dim) if isinstance(x, torch.Tensor) else x
                for x, dim in zip(rest, in_dims[3:])
            ),
        )
        if isinstance(outputs, torch.Tensor):
            return outputs.unflatten(0, (info.batch_size, -1)), 0
        unfolded = tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs)
        return unfolded, (0,) * len(unfolded)

    return run


# ---------------------------------------------------------------------------------- registrations

for _name, _gradient in (
    ("ms_deform_attn_forward", _backward),
    ("ms_deform_attn_backward", _double_backward),
    ("fused_ms_deform_attn_forward", _fused_backward),
    ("fused_ms_deform_attn_backward", _fused_double_backward),
):
    torch.library.register_autograd(
        add_op_namespace_prefix(_name), _gradient, setup_context=_save_inputs
    )
    torch.library.register_vmap(add_op_namespace_prefix(_name), _over_problems(getattr(ops, _name)))
