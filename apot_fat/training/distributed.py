"""Several processes, started by torchrun: groups, devices, synchronised batch norm, sums over processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        rank: number of this one, from 0.
        local_rank: its number on this machine.
        world: how many there are.
        local_world: how many of them are on this machine.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are several."""
        return self.world > 1


def launched() -> Processes:
    """What torchrun's environment says; one process without it.

    Raises:
        ValueError: a variable of it that is no number.
    """
    values = {name: os.environ.get(name, default) for name, default in _TORCHRUN}
    for name, value in values.items():
        if not value.isdecimal():
            raise ValueError(f"environment variable {name}={value!r}: expected an integer; leave it to torchrun")
    return Processes(*map(int, values.values()))


_TORCHRUN = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def process_group(processes: Processes, device: torch.device, timeout_s: float) -> Iterator[None]:
    """The process group of a run: NCCL on CUDA, gloo on a CPU; nothing for one process or inside another such block.

    torchrun's rendezvous serves one group: a chain of runs opens it around all of them. What the block made, such as
    ``DistributedDataParallel``, must be out of reach behind it: gloo's threads end with the last that holds the group,
    and one that gives back a tensor while the interpreter shuts down would abort the process.

    Args:
        timeout_s: seconds after which waiting for another process ends in an error.

    Raises:
        OSError: the processes do not find each other: the port is taken, or nobody answers.
    """
    if not processes.is_distributed or dist.is_initialized():
        yield
        return
    for name in ("fsdp", "nn.functional"):  # imported later, their functions would keep the group as a default
        import_module(f"torch.distributed.{name}")
    timeout = timedelta(seconds=timeout_s)
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OSError(
            f"process {processes.rank} of {processes.world} cannot join the others at {where} "
            f"({str(error).splitlines()[0]}); choose a free --master-port"
        ) from error
    try:
        yield
    finally:
        group = dist.group.WORLD  # let go of last: it waits for gloo's threads, without the lock that they may need
        gc.collect()
        dist.destroy_process_group()
        del group


def of_another_process(error: RuntimeError) -> bool:
    """Whether an error is that of a process that another one has left alone: dead, or silent for too long."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)  # gloo raises nothing more particular


def wrap(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """The model as the loop trains it: inside ``DistributedDataParallel`` where there are several processes.

    A step's gradients are summed in one order, in the first step of a run, in any later one and in the first after it
    is resumed.
    """
    if not processes.is_distributed:
        return model
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    _settle_buckets(wrapped)
    return wrapped


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    # after its first backward pass, and then never again, it divides the parameters anew into the buckets whose
    # gradients are summed together; three processes and more sum in another order then. So that pass is one of no steps
    network, wrapped.module = wrapped.module, _SumOfParameters(wrapped.module)
    wrapped().backward()
    wrapped.module = network
    wrapped.zero_grad(set_to_none=True)


class _SumOfParameters(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self) -> Tensor:
        return torch.stack([p.sum() for p in self.network.parameters() if p.requires_grad]).sum()


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: each has batch statistics of its own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def in_turns(processes: Processes, load: Callable[[], T]) -> T:
    """What ``load`` gives: the first process calls it alone, then the first of each other machine, then the others.

    So that one process brings what is missing, such as a download, and the others find it.

    Raises:
        ValueError: what ``load`` raises in one process, in all of them.
    """
    mine = 0 if processes.is_first else 1 if processes.local_rank == 0 else 2
    found: list[T] = []
    for turn in range(3):
        failed: ValueError | None = None
        if turn == mine:
            try:
                found.append(load())
            except ValueError as error:
                failed = error
        reasons = [reason for reason in gather_objects(None if failed is None else str(failed)) if reason]
        if reasons:
            raise failed or ValueError(reasons[0])
    return found[0]


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace batch norm by one over the images of all processes: PyTorch's on CUDA, ``SyncBatchNorm`` on a CPU."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm  # the same parameters and buffers, another forward
    return model


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the images of all processes for tensors on a CPU, where PyTorch's own does not run.

    Equation: (x − mean) / sqrt(var + eps) · weight + bias, with mean and biased variance over all processes' images;
    the running variance is unbiased. The gradient goes through both, summed over processes. Statistics of half
    precision are computed in float32, as PyTorch's are.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; shape of the input (N, C, …)."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = _AllReduce.apply(torch.cat([x.sum(axes), count]))
        total, mean = sums[-1], sums[:-1] / sums[-1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        centered = x - mean.view(shape)
        variance = _AllReduce.apply(centered.square().sum(axes)) / total
        self._update_running(mean.detach(), variance.detach() * total / (total - 1))
        scale = torch.rsqrt(variance + self.eps)
        y = centered * scale.view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


class _AllReduce(torch.autograd.Function):
    """Sum over processes; each process's loss depends on every summand, so the gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_processes(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_over_processes(grad.contiguous().clone())


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself for one."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself for one."""
    return sum_over_processes(values.clone()) / dist.get_world_size() if dist.is_initialized() else values


def largest_over_processes(values: Tensor) -> Tensor:
    """The largest of a tensor's elements over all processes; the tensor itself for one."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def wait_for_all() -> None:
    """Return when every process is here."""
    if dist.is_initialized():
        dist.barrier()
