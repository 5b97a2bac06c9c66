"""Fixtures of the conversion's tests."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apot_fat import load_weights
from apot_fat.data.normalization import CIFAR_APOT
from apot_fat.models import create_model


class Released(NamedTuple):
    """A network, images without labels, and test images with theirs."""

    model: nn.Module
    images: Tensor
    tested: Tensor
    labels: Tensor

    def correct(self, model: nn.Module) -> int:
        """Test images that a network classifies correctly."""
        with torch.inference_mode():
            return int((model(self.tested).argmax(1) == self.labels).sum())


@pytest.fixture
def released(reference: Path) -> Released:
    """The released fp32 ResNet-20 and the lossless CIFAR-10 images, as it takes them."""
    model = create_model("resnet20", bits=32)
    load_weights(model, reference / "reference/released/res20_32bit/model_best.pth.tar")
    mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in CIFAR_APOT)
    images = {}
    for part in ("train", "test"):
        with np.load(reference / f"data/cifar10_lossless_{part}.npz") as content:
            images[part] = (torch.from_numpy(content["images"]).float() / 255 - mean) / std
            labels = torch.from_numpy(content["labels"])
    return Released(model.eval(), images["train"], images["test"], labels)
