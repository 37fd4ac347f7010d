"""The names of PyTorch that are not public, and what serves where one of them is missing.

They only save time. Without them eager calls go the way of calls under transforms, which is right
for every call.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.autograd import forward_ad

# A context in which a call of an op skips what registrations.py tells autograd of it.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)

# Whether a transform of torch.func (grad, jvp, vmap, ...) is active.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# Has _current_level, which is at least 0 inside torch.autograd.forward_ad.dual_level().
dual_levels = forward_ad
if not hasattr(forward_ad, "_current_level"):
    dual_levels = SimpleNamespace(_current_level=0)
