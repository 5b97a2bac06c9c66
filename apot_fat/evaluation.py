"""Evaluation: which checkpoint, which network, which images; what ``apot-fat evaluate`` does."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apot_fat.checkpoint import fetch_released
from apot_fat.checkpoint.released import read_manifest
from apot_fat.quant.diagnosis import odd_layers
from apot_fat.training import loop
from apot_fat.training.build import check_classes, load_config_dataset, make_batches, sample_images
from apot_fat.training.compile import compile_network
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device, set_numerics
from apot_fat.training.loop import Result
from apot_fat.training.network import check_images, log_normalization, open_network

PUBLISHED_ARCH = "res20"  # what the published evaluation line leaves out

log = logging.getLogger("apot_fat")


@dataclass(frozen=True)
class Evaluation(Result):
    """What a checkpoint gave on test images; ``top1`` is its accuracy, %.

    Args:
        dataset: the images.
        config: the run's, as far as the file records it or was told.
        model: the network, on the device it was evaluated on.
    """

    dataset: str
    config: TrainConfig = field(repr=False)
    model: nn.Module = field(repr=False)


def evaluate(checkpoint: str | Path, *, model: str | None = None, cache: str | None = None, **given: Any) -> Evaluation:
    """Accuracy of a checkpoint on test images.

    One of our checkpoints knows its network, bits and data; a packed file its network and bits; a published one is that
    of a ResNet-20 on CIFAR-10 unless told.

    Args:
        checkpoint: its path, or the name of a released one (``evaluate_released``).
        model: ``FILE.py:FUNCTION`` that builds the network, float, where it is one of your own.
        cache: folder of downloaded checkpoints.
        given: fields of ``TrainConfig``, such as ``data="cifar10"``.

    Raises:
        ValueError: no such checkpoint, one of another network, or bits that are neither recorded nor given.
    """
    if str(checkpoint) in read_manifest() and not Path(checkpoint).exists():
        return evaluate_released(str(checkpoint), model=model, cache=cache, **given)
    TrainConfig.check_names(given, "evaluate")
    opened = open_network(checkpoint, given, model, arch=PUBLISHED_ARCH)
    config, network = opened.config, opened.model
    device = choose_device(config.device, config.gpu)
    set_numerics(config.numerics, device)
    dataset = load_config_dataset(config, need_train=False)
    check_classes(dataset, opened.num_classes, opened.where)
    log_normalization(config)
    network.to(device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    sample = sample_images(config, dataset.test, device)
    check_images(opened.where, network, sample[:1], dataset)
    for sentence in odd_layers(network, sample):
        log.warning("%s", sentence)
    # neither is as it was trained: one pass does not earn back a whole graph, and rounded products change classes
    mode, amp = given.get("compile", "auto"), given.get("amp", "off")
    compiled = network if mode == "auto" else compile_network(network, mode, device)
    batches = make_batches(config, dataset.test, device)
    result = loop.evaluate(compiled, batches, amp=amp, log=log.info, print_freq=config.print_freq)
    log.info(" * Prec %.3f%%", result.top1)
    log.info("%d of %d images correct (%s, test)", result.correct, result.total, dataset.name)
    return Evaluation(**vars(result), dataset=dataset.name, config=config, model=network)


def evaluate_released(name: str, *, model: str | None = None, cache: str | None = None, **given: Any) -> Evaluation:
    """Accuracy of a released checkpoint, packed here or published, which is fetched and verified; as ``evaluate``.

    Args:
        name: one of ``checkpoints/manifest.toml``.

    Raises:
        ValueError: as ``evaluate``, and as ``fetch_released``.
    """
    if model is not None:
        raise ValueError(f"--model {model} with --released {name}: its network is one of ours; leave out --model")
    entry, path = fetch_released(name, cache)
    of = f" on {entry.images}" if entry.images else ""
    log.info("%s: %s top-1 %.2f%%%s", entry.name, "recorded" if entry.file else "published", entry.top1, of)
    known: dict[str, Any] = {"arch": entry.arch, "preset": entry.preset, "bit": entry.bits}
    if entry.data:
        known["data"] = entry.data
    return evaluate(path, **(known | given))
