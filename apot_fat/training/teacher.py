"""The network that a run is distilled from."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor, nn

from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import has_fast_bfloat16
from apot_fat.training.network import open_network

log = logging.getLogger("apot_fat")


def load_teacher(config: TrainConfig, source: str, num_classes: int, device: torch.device) -> nn.Module:
    """The teacher, on the device, in evaluation mode, without gradients; in bfloat16 where that is fast.

    A file of ours says which network it holds and how its images were normalised, which may be otherwise than the
    student's; any other is taken for the student's architecture at 32 bits.

    bfloat16 moves the logits of ResNet-20 by 0.9 % (root mean square), where those of 4 bits are 15 % away.

    Args:
        config: the student's.
        source: ``torchvision`` or a path, see ``TrainConfig.weights_path``.
        num_classes: the student's.

    Raises:
        ValueError: no such checkpoint, one that does not fit, or one with another number of classes.
    """
    opened = open_network(source, arch=config.arch, bit=FLOAT_BITS)
    if opened.num_classes != num_classes:
        raise ValueError(f"teacher {source}: has {opened.num_classes} outputs, the data {num_classes} classes")
    model = opened.model
    says = opened.is_recorded or opened.config.mean is not None
    theirs = opened.config.normalization() if says else config.normalization()
    if theirs != config.normalization():
        model = _Renormalized(model, config.normalization(), theirs)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    model.eval().requires_grad_(False)
    return _InBfloat16(model, device).eval() if has_fast_bfloat16(device) else model


class _InBfloat16(nn.Module):
    """A network whose products are of bfloat16; its outputs are float32."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.device_type = model, device.type

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            return cast(Tensor, self.model(x)).float()


class _Renormalized(nn.Module):
    """A network on images that were normalised with another mean and standard deviation than its own."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        theirs: tuple[tuple[float, ...], tuple[float, ...]],
        own: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        super().__init__()
        self.model = model
        (mean, std), (own_mean, own_std) = (map(torch.tensor, channels) for channels in (theirs, own))
        self.register_buffer("scale", (std / own_std).view(3, 1, 1))
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.model(x * self.scale + self.shift))
