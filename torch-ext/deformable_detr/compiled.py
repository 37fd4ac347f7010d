"""What torch.compile needs of this package, and what only it needs.

Imported when the first call is compiled: importing torch._dynamo takes a second.
"""

from typing import Any

import torch

from .autograd import Transformed
from .operations import OPERATIONS, Options

if torch.distributed.is_available():
    from . import sharding  # noqa: F401


@torch.compiler.allow_in_graph
def transformed(name: str, options: Options, *tensors: torch.Tensor) -> Any:
    """``Transformed``, which AOTAutograd can trace. TorchDynamo cannot, as it has a ``jvp``."""
    return Transformed.apply((OPERATIONS[name], options), *tensors)
