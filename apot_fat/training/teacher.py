"""The network that a run is distilled from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from apot_fat.checkpoint import TORCHVISION, load_weights, num_outputs, read_newest, torchvision_weights
from apot_fat.models import create_model
from apot_fat.training.config import FP32_TEACHER, TrainConfig
from apot_fat.training.recorded import recorded_config

log = logging.getLogger("apot_fat")


def teacher_path(config: TrainConfig, best: str) -> str:
    """Where the teacher's weights come from: ``torchvision``, or a checkpoint's path.

    Args:
        config: ``teacher`` ``fp32`` is the 32-bit run beside this one.
        best: name of a run's best checkpoint.
    """
    assert config.teacher is not None
    if config.teacher == FP32_TEACHER:
        return str(Path(config.output) / f"{config.arch}_32bit" / best)
    return config.teacher


def load_teacher(config: TrainConfig, source: str, num_classes: int, device: torch.device) -> nn.Module:
    """The teacher, on the device, in evaluation mode, without gradients.

    A checkpoint of ours says which network it holds and how its images were normalised, which may be otherwise than the
    student's; any other is taken for the student's architecture at 32 bits.

    Args:
        config: the student's.
        source: ``torchvision`` or a path, see ``teacher_path``.
        num_classes: the student's.

    Raises:
        ValueError: no such checkpoint, one that does not fit, or one with another number of classes.
    """
    taught = config
    bits = 32
    if source == TORCHVISION:
        content = {"state_dict": torchvision_weights(config.arch)}
    else:
        content = read_newest(source, log.warning)
        recorded = recorded_config(content, f"teacher {source}")
        if recorded is not None:
            taught, bits = recorded, recorded.bit
    if (outputs := num_outputs(content, f"teacher {source}")) != num_classes:
        raise ValueError(f"teacher {source}: has {outputs} outputs, the data {num_classes} classes")
    options = {"weight_per_channel": True} if taught.weight_per_channel else {}
    model = load_weights(create_model(taught.arch, taught.preset, bits, num_classes, **options), content)
    if taught.normalization() != config.normalization():
        model = _Renormalized(model, config.normalization(), taught.normalization())
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


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
