"""The native ops, in the namespace of this build, whose library is loaded once."""

import sys
from pathlib import Path

import torch


def _use_loaded_ops():
    """If the process has this build's ops, has ``_ops`` use them in place of another library.

    That happens where this package is imported anew, from a copy of its folder. A library's name
    holds the digest of its sources, so the ops are the same. To load it would end the process:
    torch's StableLibrary does not notice that its namespace is taken.
    """
    for path in Path(__file__).parent.glob("*.abi3.so"):
        name = path.name.removesuffix(".abi3.so")
        namespace = getattr(torch.ops, name)
        if hasattr(namespace, "ms_deform_attn_forward"):
            setattr(sys.modules[__package__], name, namespace)


_use_loaded_ops()

from ._ops import add_op_namespace_prefix, ops  # noqa: E402, F401
