"""Trains four steps at once and two by two, wrapped anew between them as by a resumed run; to the same bits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from apot_fat.models import create_model
from apot_fat.training.distributed import gather_objects, launched, process_group, wrap

CPU = torch.device("cpu")


def steps(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """A copy of the model after a step of SGD on each of the batches."""
    model = copy.deepcopy(model)
    wrapped = wrap(model, launched(), CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in batches:
        optimizer.zero_grad()
        wrapped(x).logsumexp(1).mean().backward()
        optimizer.step()
    return model


def main() -> None:
    """Assert it in each process."""
    torch.set_num_threads(1)
    processes = launched()
    with process_group(processes, CPU, 60):
        torch.manual_seed(processes.rank)
        batches = list(torch.randn(4, 5, 3, 8, 8))
        start = create_model("resnet20", "apot-cifar", 4, num_classes=3)
        whole, parts = steps(start, batches), steps(steps(start, batches[:2]), batches[2:])
        names = whole.state_dict().keys() - dict(whole.named_buffers()).keys()  # buffers are those of each process
        different = [name for name in names if not torch.equal(whole.state_dict()[name], parts.state_dict()[name])]
        assert not any(gather_objects(different)), f"{len(different)} of {len(names)} tensors differ"


if __name__ == "__main__":
    main()
