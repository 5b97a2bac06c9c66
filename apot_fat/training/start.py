"""How a run begins: the weights it starts from, its thresholds, and its reconstruction."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from apot_fat.checkpoint import (
    TORCHVISION,
    load_weights,
    num_outputs,
    read_checkpoint,
    torchvision_weights,
)
from apot_fat.data import Batches, FileSet, ImageSet
from apot_fat.quant import seam
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.convert import Reconstruction, balance_filters, reconstruct
from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.quant.thresholds import initialize_thresholds
from apot_fat.training.build import unlabelled_images
from apot_fat.training.config import TrainConfig
from apot_fat.training.loop import autocast
from apot_fat.training.network import create_network
from apot_fat.training.recorded import recorded_config

log = logging.getLogger("apot_fat")


def load_initial_weights(model: nn.Module, config: TrainConfig) -> None:
    """Start from ``config.init``: a checkpoint of any bit-width, torchvision's fp32 weights, or nothing.

    One with another number of classes gives all but the last layer.
    """
    source = config.weights_path(config.init)
    if source is None:
        return
    where = f"checkpoint {source}"
    content = _content_of_init(config, source)
    theirs, ours = num_outputs(content, where), num_outputs(model.state_dict())
    if theirs != ours:
        if config.reconstruct:
            raise ValueError(f"reconstruct {config.reconstruct}: {where} has {theirs} outputs, the data {ours} classes")
        log.info("%s has %d outputs, the data %d classes: the last layer begins anew", source, theirs, ours)
    if config.balance_filters:
        content = {"state_dict": _network_of_init(config, source, content, theirs).state_dict()}
    load_weights(model, content, other_bits=True, other_classes=True, label=where)


def set_initial_thresholds(model: nn.Module, config: TrainConfig, batches: Batches, device: torch.device) -> None:
    """Set the thresholds as ``config.threshold_init`` says, on the first training batch of this process."""
    if config.threshold_init == "constant" or not any(True for _ in threshold_layers(model)):
        return
    batches.set_epoch(0)
    with autocast(device, config.amp), seam.speed.uncompiled():
        initialize_thresholds(model, next(iter(batches)).x, config.threshold_init)


def reconstruct_start(
    model: nn.Module, config: TrainConfig, images: ImageSet | FileSet, num_classes: int, device: torch.device
) -> None:
    """Tune the network to give, block by block, what the one of ``config.init`` gives, on some images; in place.

    Raises:
        ValueError: its images are normalised otherwise.
    """
    if not config.reconstruct or not any(True for _ in threshold_layers(model)):
        return
    source = config.weights_path(config.init)
    assert source is not None
    reference = _network_of_init(config, source, _content_of_init(config, source), num_classes).to(device)
    if config.channels_last:
        reference.to(memory_format=torch.channels_last)
    batches = unlabelled_images(config, images, config.reconstruct, device)
    reconstruct(model, reference, batches, Reconstruction(seed=config.seed))
    log.info("reconstructed from %s on %d images", source, min(config.reconstruct, len(images)))


def _content_of_init(config: TrainConfig, source: str) -> dict[str, Any]:
    return {"state_dict": torchvision_weights(config.arch)} if source == TORCHVISION else read_checkpoint(source)


def _network_of_init(config: TrainConfig, source: str, content: dict[str, Any], num_classes: int) -> nn.Module:
    # of the modules that the run's network has, at the bits of its own
    theirs = recorded_config(content, f"checkpoint {source}")
    made, bits = config, FLOAT_BITS
    if theirs is not None:
        if config.reconstruct and theirs.normalization() != config.normalization():
            raise ValueError(
                f"reconstruct {config.reconstruct}: the images of {source} are normalised by other means and "
                f"standard deviations {theirs.normalization()}: give them as mean and std"
            )
        per_channel = {name: getattr(theirs, name) for name in ("weight_per_channel", "act_per_channel")}
        made, bits = replace(config, preset=theirs.preset, **per_channel), theirs.bit
    if bits == FLOAT_BITS:
        model = load_weights(create_network(replace(made, bit=FLOAT_BITS), num_classes), content)
        return balance_filters(model) if config.balance_filters else model
    if config.balance_filters:
        raise ValueError(f"balance_filters: {source} has {bits} bits; name a float network with --init")
    return load_weights(create_network(replace(made, bit=bits), num_classes), content)
