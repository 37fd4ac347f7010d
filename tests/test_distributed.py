"""Training in two processes, each with half of the batch, follows that in one."""

import pytest
import torch
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
    with on_this_kernel(KERNEL, SPEC, model, torch.device(device).type, True, STEPS):
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


def train_together(rank, backend, folder):
    """The mean of both processes' losses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that no proposal is up to rounding
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=2)
    try:
        return train(device, rank)
    finally:
        distributed.destroy_process_group()
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["gloo", "nccl"], ids=["cpu", "cuda"])
def test_data_parallel_training_follows_one_process(backend, tmp_path):
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs here, 2 are needed")
    transformers_that_uses_kernels()
    arguments = (1, backend, tmp_path)
    other = torch.multiprocessing.get_context("spawn").Process(
        target=train_together, args=arguments
    )
    other.start()
    torch.set_default_dtype(torch.float64)
    expected = train("cuda:0" if backend == "nccl" else "cpu")
    losses = train_together(0, backend, tmp_path)
    other.join(60)
    assert other.exitcode == 0
    assert expected[-1] < 0.9 * expected[0], "the model learns"
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
