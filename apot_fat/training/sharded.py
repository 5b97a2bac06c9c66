"""Training under PyTorch's ``fully_shard`` (FSDP2), which refuses 0-d parameters such as clipping thresholds.

In each process, with a process group and the network on its device::

    whole = replicate_scalars(model)
    for block in model.blocks:
        fully_shard(block, ignored_params=whole)
    fully_shard(model, ignored_params=whole)

Then the optimiser and a loop of one's own: neither a fused SGD nor ``train_epoch`` takes gradients that are sharded.
``get_model_state_dict`` with ``full_state_dict`` gives what ``load_weights`` takes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import register_multi_grad_hook

from apot_fat.training.distributed import sum_over_processes


def replicate_scalars(model: nn.Module) -> set[nn.Parameter]:
    """Keep a network's 0-d parameters whole and equal in all processes.

    They start with the first process's values. At the end of each backward pass their gradients become the mean over
    all processes, as those of sharded parameters do; each process must have used the same ones. Names and shapes stay.

    Args:
        model: on its device and with its bits set, before ``fully_shard``: a parameter that replaces another later is
            not averaged.

    Returns:
        The 0-d parameters: ``ignored_params`` for every call of ``fully_shard`` on the network and its parts.

    Raises:
        ValueError: no process group, or a parameter on the meta device.
    """
    if not dist.is_initialized():
        raise ValueError("no process group: call torch.distributed.init_process_group first, in each process")
    scalars = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 0}
    for name, scalar in scalars.items():
        if scalar.is_meta:
            raise ValueError(f"{name} is on the meta device: give the network its weights first")
        dist.broadcast(scalar.detach(), src=0)
    _average_after_backward(list(scalars.values()))
    return set(scalars.values())


def _average_after_backward(scalars: list[nn.Parameter]) -> None:
    @torch.no_grad()
    def average() -> None:
        # an accumulated gradient is the mean of before, equal in all processes, and this pass's
        grads = [scalar.grad for scalar in scalars if scalar.grad is not None]
        mean = sum_over_processes(torch.stack(grads)) / dist.get_world_size()
        torch._foreach_copy_(grads, list(mean.unbind()))

    def at_the_end(_: object) -> None:
        # one sum for all: one each would wait for the weights being gathered, again and again
        torch.autograd.Variable._execution_engine.queue_callback(average)

    register_multi_grad_hook([scalar for scalar in scalars if scalar.requires_grad], at_the_end)
