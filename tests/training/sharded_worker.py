"""Trains networks alone on whole batches, then under ``fully_shard`` in as many processes as torchrun starts.

The first process writes what came out of both.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apot_fat import load_weights, quantize
from apot_fat.checkpoint import write_checkpoint
from apot_fat.models import create_model
from apot_fat.quant import threshold_layers
from apot_fat.training import TrainConfig
from apot_fat.training.distributed import Processes, launched, process_group, sum_over_processes, synchronize_batch_norm
from apot_fat.training.optim import parameter_groups
from apot_fat.training.sharded import replicate_scalars

CPU = torch.device("cpu")
IMAGES, CLASSES, STEPS, PARTS = 16, 3, 4, 2


def random_images() -> Tensor:
    """Images in float64, where sums in another order move no value across a threshold."""
    return torch.rand(IMAGES, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def converted(method: str) -> nn.Sequential:
    """A network as ``quantize`` makes it; one layer has fewer channels than there are processes."""
    convs = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 3, padding=1), nn.Conv2d(1, 6, 3)]
    head = nn.Flatten(), nn.Linear(96, 10), nn.LayerNorm(10), nn.Linear(10, CLASSES)
    model = nn.Sequential(*(nn.Sequential(conv, nn.ReLU()) for conv in convs), *head).double()
    quantize(model, bits=3, method=method, calibration=random_images())
    return model


def created() -> nn.Module:
    """A network of ``create_model``, with batch statistics of all processes."""
    return synchronize_batch_norm(create_model("resnet20", "apot-cifar", 4, num_classes=CLASSES), CPU).double()


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "apot": lambda: converted("apot"),
    "fat": lambda: converted("fat"),
    "create_model": created,
}


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are gathered one at a time: those with parts of their own."""
    return (child for child in model.children() if len(list(child.children())))


def train(model: nn.Module, processes: Processes) -> Tensor:
    """Losses of SGD steps, each over parts of the batch one after another, of which this process has its share."""
    config = TrainConfig(lr=0.02, momentum=0.9, weight_decay=1e-3, act_alpha_lr=0.02)
    optimizer = torch.optim.SGD(parameter_groups(model, config), momentum=config.momentum)
    labels = torch.arange(IMAGES) % CLASSES
    losses = torch.zeros(STEPS, dtype=torch.float64)
    for step in range(STEPS):
        for part in torch.arange(IMAGES).chunk(PARTS):
            mine = part[processes.rank :: processes.world]
            loss = F.cross_entropy(model(random_images()[mine]), labels[mine]) / PARTS
            loss.backward()
            losses[step] += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return sum_over_processes(losses) / processes.world


def outputs(model: nn.Module) -> Tensor:
    """Logits in evaluation mode."""
    with torch.no_grad():
        return model.eval()(random_images())


def train_alone(name: str) -> dict[str, Any]:
    """Losses, and the state dict after them."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    return {"losses": train(model, Processes()), "state": model.state_dict()}


def train_sharded(name: str, processes: Processes, checkpoint: Path) -> dict[str, Any]:
    """Losses, outputs, and in the first process those of an unsharded network that loads the saved state dict."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    whole = replicate_scalars(start_apart(model, processes))
    mesh = init_device_mesh("cpu", (processes.world,))
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh, ignored_params=whole)
    found: dict[str, Any] = {"losses": train(model, processes), "outputs": outputs(model)}
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if processes.is_first:
        write_checkpoint({"state_dict": state}, checkpoint)
        found |= {"state": state, "loaded": outputs(load_weights(BUILDERS[name](), checkpoint))}
    return found


def start_apart(model: nn.Module, processes: Processes) -> nn.Module:
    """Give each process thresholds of its own."""
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            assert layer.act_alpha is not None
            layer.act_alpha.mul_(1 + processes.rank)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, processes = Path(sys.argv[1]), launched()
    alone = {name: train_alone(name) for name in BUILDERS} if processes.is_first else {}
    with process_group(processes, CPU, 60):
        sharded = {name: train_sharded(name, processes, path.with_suffix(".ckpt")) for name in BUILDERS}
    if processes.is_first:
        torch.save({name: (alone[name], sharded[name]) for name in BUILDERS}, path)
    # PyTorch's cache of DTensors' plans keeps the group, and a process that ends with a group's threads aborts at times
    os._exit(0)
