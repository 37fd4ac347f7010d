"""What torch.compile finds in a call under a transform of torch.func.

Imported when the first such call is compiled: it imports torch._dynamo, which takes a second.
"""

import torch

from .autograd import Transformed
from .operations import OPERATIONS


@torch.compiler.allow_in_graph
def transformed(name, *args):
    """``Transformed``, which TorchDynamo cannot trace as it has a ``jvp``, but AOTAutograd can."""
    return Transformed.apply(OPERATIONS[name], *args)
