"""DTensor's rules for the ops: batch and heads may be sharded.

Imported for the first DTensor, and by torch.compile: torch.distributed.tensor takes a second.
"""

from typing import Any, Callable, List, Sequence, Tuple

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from .operations import FUSED, PLAIN, Backward, Operation, Options

_SHARDINGS = ("none", "batch", "heads")
_WITHOUT_BATCH = ("spatial_shapes", "level_start_index")
_WITHOUT_HEADS = (*_WITHOUT_BATCH, "reference_points")


def _placement(name: str, sharding: str) -> Placement:
    """Of a tensor. The heads are dimension 2, of grad_output and the output with the channels."""
    if sharding == "batch" and name not in _WITHOUT_BATCH:
        return Shard(0)
    if sharding == "heads" and name not in _WITHOUT_HEADS:
        return Shard(2)
    return Replicate()


def _output(operation: Operation, sharding: str, options: Options) -> List[Placement]:
    return [_placement("output", sharding)]


def _gradients(operation: Backward, sharding: str, options: Options) -> List[Placement]:
    def placement(position: int, requested: bool) -> Placement:
        name = operation.tensors[position]
        if not requested:
            return Replicate()  # of shape (0,)
        # Each head has a part of the gradient of what all heads read.
        sums = sharding == "heads" and name in _WITHOUT_HEADS
        return Partial() if sums else _placement(name, sharding)

    return list(map(placement, operation.forward.differentiable, operation.requested(options)))


def _sharding(operation: Operation, specs: Sequence[Any], dim: int) -> str:
    """How a dimension of the mesh shards the tensors. Raises if it does so in any other way."""
    placements = {name: spec.placements[dim] for name, spec in zip(operation.tensors, specs)}
    for name, placement in placements.items():
        possible = [_placement(name, sharding) for sharding in _SHARDINGS]
        if placement not in possible:
            raise RuntimeError(
                f"{name} is {placement!r} on dimension {dim} of the mesh, expected "
                f"{' or '.join(dict.fromkeys(map(repr, possible)))}: over pixels, queries, levels, "
                "points and channels the ops cannot be sharded"
            )
    for sharding in _SHARDINGS:
        if all(p in (_placement(n, sharding), Replicate()) for n, p in placements.items()):
            return sharding
    raise RuntimeError(
        f"{', '.join(f'{name} is {placement!r}' for name, placement in placements.items())} on "
        f"dimension {dim} of the mesh, expected all sharded over the batch or all over the heads"
    )


def _register(operation: Operation, results: Callable[..., List[Placement]]) -> None:
    def rule(*args: Any) -> List[Tuple[List[Placement], List[Any]]]:
        specs, options = operation.split(args)
        mesh, heads = specs[0].mesh, specs[0].shape[2]
        shardings = [_sharding(operation, specs, dim) for dim in range(mesh.ndim)]
        for dim, sharding in enumerate(shardings):
            if sharding == "heads":
                if heads % mesh.size(dim):
                    raise RuntimeError(
                        f"value has {heads} heads, expected a multiple of {mesh.size(dim)}, the "
                        f"size of dimension {dim} of the mesh, which shards them"
                    )
                heads //= mesh.size(dim)
        no_tensors = [None] * (len(args) - len(specs))
        return [
            (
                results(operation, sharding, options),
                [_placement(name, sharding) for name in operation.tensors] + no_tensors,
            )
            for sharding in _SHARDINGS
            if sharding in shardings
        ]

    register_sharding(operation.op)(rule)


for _operator in (PLAIN, FUSED):
    _register(_operator, _output)
    _register(_operator.backward, _gradients)
