"""The released networks and the images that the tests of exports compare them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from apot_fat import load_weights
from apot_fat.data import load_dataset
from apot_fat.data.images import normalize
from apot_fat.data.normalization import CIFAR_APOT
from apot_fat.models import create_model

Released = Callable[[int], tuple[nn.Module, Tensor, Tensor]]


@pytest.fixture
def released(reference: Path) -> Released:
    """The ResNet-20 released at some bits, in evaluation mode, the 1,017 test images and their labels."""

    def load(bits: int) -> tuple[nn.Module, Tensor, Tensor]:
        path = reference / f"reference/released/res20_{bits}bit/model_best.pth.tar"
        model = load_weights(create_model("resnet20", "apot-cifar", bits), path).eval().requires_grad_(False)
        test = load_dataset(str(reference / "data/cifar10_lossless_test.npz"), need_train=False).test
        images = normalize(test.images_NHWC, *map(torch.tensor, CIFAR_APOT))  # type: ignore[union-attr]
        return model, images.permute(0, 3, 1, 2).contiguous(), test.labels_N

    return load
