"""Several processes, as torchrun starts them: each takes its part of every batch, and the model stays the same on all."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsloss_kernels import distributed


def are_several() -> bool:
    """Whether torchrun started more than this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process evaluates, writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def started(device: str) -> Iterator[str]:
    """Joins the group of all processes, if there are several, and leaves it. Yields the device of this process."""
    if not are_several():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def count() -> int:
    return distributed.world_size(_group())


def own_part(rows: Tensor) -> Tensor:
    """This process's rows of a batch: parts of about equal size, in the order of the processes."""
    return rows if _group() is None else rows.tensor_split(count())[dist.get_rank()]


def replicated(model: nn.Module) -> nn.Module:
    """The model with its gradients averaged over the processes in backward."""
    return model if _group() is None else nn.parallel.DistributedDataParallel(model)


def mean_over_processes(values: Tensor) -> Tensor:
    return distributed.sum_over_group(values, _group()) / count()


def _group():
    return distributed.resolve_group("train_detector.py", "default")
