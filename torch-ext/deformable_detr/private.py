"""The names of PyTorch that are not public, or new, and what serves where one is missing.

They only save time; is_exporting is for exports. Without transforms_active or dual_levels, eager
calls go the way of calls under transforms, which is right for every call.
"""

import contextlib
from types import SimpleNamespace
from typing import Any, Callable, Type

import torch
from torch.autograd import forward_ad

# A context in which a call of an op skips what registrations.py tells autograd of it.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)

# Whether torch.jit.trace is at work. The public function asks for scripting first.
is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)

# Whether a transform of torch.func (grad, jvp, vmap, ...) is active.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# Has _current_level, which is at least 0 inside torch.autograd.forward_ad.dual_level().
dual_levels: Any = forward_ad
if not hasattr(forward_ad, "_current_level"):
    dual_levels = SimpleNamespace(_current_level=0)

# Whether torch.export is at work. Public, but of torch 2.7.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)

# Whether a tensor belongs to a transform of torch.func that has ended.
_is_dead = getattr(torch._C._functorch, "is_dead_tensor_wrapper", None)


def fast_apply(function: Type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls outside of transforms, some 3 us faster with torch up to 2.13.

    There, torch.autograd.Function.apply is Python. Outside of transforms it calls that of its base
    class, after it has unwrapped tensors of transforms that have ended.
    """
    if _is_dead is None or "apply" not in vars(torch.autograd.Function):
        return function.apply
    is_dead = _is_dead
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(call: Any, *tensors: torch.Tensor) -> Any:
        run = direct
        try:
            for tensor in tensors:
                if is_dead(tensor):
                    run = function.apply
        except TypeError:  # one is no tensor, which the op will say
            run = function.apply
        return run(call, *tensors)

    return apply
