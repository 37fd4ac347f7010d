"""The native ops, in the namespace of this build. Loads the library once per process."""

import sys
from pathlib import Path

import torch


def _use_loaded_ops():
    """If the process already has the ops of this build, makes ``_ops`` take those.

    A package that is imported a second time, for example from a copy of its folder, must not load
    its library again: torch's StableLibrary does not notice that the namespace is taken, and ends
    the process. The library's name holds a digest of its sources, so the ops are the same.
    """
    for path in Path(__file__).parent.glob("*.abi3.so"):
        name = path.name.removesuffix(".abi3.so")
        namespace = getattr(torch.ops, name)
        if hasattr(namespace, "ms_deform_attn_forward"):
            setattr(sys.modules[__package__], name, namespace)


_use_loaded_ops()

from ._ops import add_op_namespace_prefix, ops  # noqa: E402, F401
