from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from apot_fat.models import create_model
from apot_fat.quant.convert.blocks import find_blocks


def blocks_of(model: nn.Module, x: Tensor) -> list[tuple[str, ...]]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return [block.names for block in find_blocks(model, layers, x)]


def test_residual_networks_are_taken_apart_into_their_blocks() -> None:
    stages = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    found = blocks_of(create_model("resnet20", bits=4), torch.rand(2, 3, 32, 32))
    assert found == [("conv1", "bn1", "relu"), *((name,) for name in stages), ("fc",)]
    resnet = torchvision.models.resnet18(num_classes=10)
    found = blocks_of(resnet, torch.rand(1, 3, 64, 64))
    pairs = [(f"layer{stage}.{block}",) for stage in (1, 2, 3, 4) for block in range(2)]
    assert found == [("conv1", "bn1", "relu", "maxpool"), *pairs, ("fc",)]


def test_transformers_and_chains_too() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64)
    found = blocks_of(vit, torch.rand(1, 3, 64, 64))
    assert found[1:-1] == [(f"blocks.{place}",) for place in range(12)]
    mobile = blocks_of(torchvision.models.mobilenet_v2(), torch.rand(1, 3, 64, 64))
    assert mobile[1:-2] == [(f"features.{place}",) for place in range(1, 18)]
    vgg = blocks_of(create_model("vggsmall", bits=32), torch.rand(1, 3, 32, 32))
    assert all(len(names) >= 2 for names in vgg[:-1]), "a convolution, its norm and its activation"
    assert all(isinstance(name, str) for names in vgg for name in names)


class Twice(nn.Module):
    """A layer that runs twice, an activation that is shared, and one that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.relu = nn.Linear(4, 4), nn.ReLU()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(self.shared(self.shared(x))))
        return self.c(F.relu(self.relu(self.b(x))))


def test_what_runs_twice_is_no_part_of_a_block() -> None:
    assert blocks_of(Twice(), torch.rand(2, 4)) == [("a",), ("b",), ("c",)]
