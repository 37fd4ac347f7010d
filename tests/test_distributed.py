"""Two processes: training with half of the batch in each, and tensors sharded over both."""

import pytest
import torch
from cases import OPERATORS, SMALL, Case, relative_error
from conftest import KERNEL
from models import MODELS, build, inputs_of
from test_transformers import on_this_kernel, transformers_that_uses_kernels
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

SPEC = next(spec for spec in MODELS if spec.name == "deformable_detr")
STEPS = 8
LEARNING_RATE = 1e-2


def train(device, rank=None):
    """The loss of each step: on all images, or on those of a rank."""
    transformers = transformers_that_uses_kernels()
    model = build(SPEC, transformers, device).train()
    inputs = inputs_of(SPEC, device, training=True)
    if rank is not None:
        inputs = {name: x[rank : rank + 1] for name, x in inputs.items()}
    losses = []
    with on_this_kernel(KERNEL, SPEC, model, torch.device(device).type, True, "fused", STEPS):
        wrapped = model if rank is None else DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = wrapped(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    losses = torch.stack(losses)
    if rank is not None:
        distributed.all_reduce(losses)
        losses /= distributed.get_world_size()
    return losses.cpu()


def in_group(function, rank, backend, folder, *args):
    """function(device, rank, *args) in one of two processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that no proposal is up to rounding
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=2)
    try:
        return function(device, rank, *args)
    finally:
        distributed.destroy_process_group()
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


def in_both(function, backend, folder, *args):
    """What it returns in the first process, which is this one."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs here, 2 are needed")
    other = torch.multiprocessing.get_context("spawn").Process(
        target=in_group, args=(function, 1, backend, folder, *args)
    )
    other.start()
    try:
        result = in_group(function, 0, backend, folder, *args)
        other.join(60)
        assert other.exitcode == 0
    finally:
        other.kill()  # if it still waits for this one
    return result


BACKENDS = pytest.mark.parametrize("backend", ["gloo", "nccl"], ids=["cpu", "cuda"])


@BACKENDS
@pytest.mark.slow
def test_data_parallel_training_follows_one_process(backend, tmp_path):
    transformers_that_uses_kernels()
    losses = in_both(train, backend, tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        expected = train("cuda:0" if backend == "nccl" else "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected[-1] < 0.9 * expected[0], "the model learns"
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------ DTensor

# The dimension over which each tensor is sharded, None where it is replicated.
WITHOUT_HEADS = ("spatial_shapes", "level_start_index", "reference_points")
SHARDINGS = {
    "batch": lambda name: None if name in WITHOUT_HEADS[:2] else 0,
    "heads": lambda name: None if name in WITHOUT_HEADS else 2,
    "value_over_batch": lambda name: 0 if name == "value" else None,
    "nothing": lambda name: None,
}
WRONG_SHARDINGS = {
    "pixels": (SMALL, lambda name: 1 if name == "value" else None, r"value is Shard\(dim=1\)"),
    "queries": (
        SMALL,
        lambda name: None if name in ("value", *WITHOUT_HEADS[:2]) else 1,
        r"(sampling_locations|reference_points) is Shard\(dim=1\)",
    ),
    "batch_and_heads": (
        SMALL,
        lambda name: {"value": 0, "attention_weights": 2, "attention_logits": 2}.get(name),
        r"value is Shard\(dim=0\), .*_(weights|logits) is Shard\(dim=2\)",
    ),
    "three_heads": (Case("odd", heads=3), SHARDINGS["heads"], "3 heads, expected a multiple of 2"),
}


def shard(problem, mesh, dim_of):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def placement(name):
        dim = dim_of(name)
        return Replicate() if dim is None else Shard(dim)

    names = [name for name in vars(problem) if name not in ("grad_output", "options")]
    return [
        distribute_tensor(tensor.detach(), mesh, [placement(name)]).requires_grad_(
            tensor.is_floating_point()
        )
        for name, tensor in zip(names, problem.args)
    ]


def run_sharded(device, rank):
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(torch.device(device).type, (2,))
    for operator, make in OPERATORS.items():
        function = getattr(KERNEL, operator)
        for name, dim_of in SHARDINGS.items():
            problem = make(SMALL, torch.float64, device).require_grad()
            expected = function(*problem.args)
            expected = [
                expected,
                *torch.autograd.grad(expected.square().sum(), problem.differentiable()),
            ]
            args = shard(problem, mesh, dim_of)
            runs = [function]
            if name == "heads":  # where most is sharded
                torch._dynamo.reset()
                runs += [torch.compile(function, backend="aot_eager", fullgraph=True)]
            for run in runs:
                output = run(*args)
                inputs = [arg for arg in args if arg.requires_grad]
                grads = torch.autograd.grad(output.square().sum(), inputs)
                for actual, wanted in zip([output, *grads], expected):
                    error = relative_error(actual.full_tensor().detach(), wanted.detach())
                    assert error < 1e-12, (operator, name)
            with torch.no_grad():
                output = function(*args)
            sharded = {"heads": 2, "nothing": None}.get(name, 0)
            (placement,) = output.placements
            assert placement.is_replicate() if sharded is None else placement.is_shard(sharded)
        for case, dim_of, message in WRONG_SHARDINGS.values():
            args = shard(make(case, torch.float64, device), mesh, dim_of)
            with pytest.raises(RuntimeError, match=message):
                function(*args)


@BACKENDS
def test_tensors_sharded_over_batch_or_heads(backend, tmp_path):
    """Output and gradients are those of one process; other shardings are refused."""
    in_both(run_sharded, backend, tmp_path)
