"""Evaluation from the command line: which checkpoint, which network, which images; and what is printed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from apot_fat.checkpoint import fetch_released
from apot_fat.command_line import Request, add_model_option, log
from apot_fat.quant.all_layers import show_params
from apot_fat.quant.diagnosis import odd_layers
from apot_fat.training.build import load_config_dataset, make_batches, sample_images
from apot_fat.training.compile import compile_network
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device, set_numerics
from apot_fat.training.folder import BEST
from apot_fat.training.loop import Result, evaluate
from apot_fat.training.network import open_network

PUBLISHED_ARCH = "res20"  # what the published evaluation line leaves out


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """The published ``-e/--evaluate`` and ``--test_only``, and ``--released``."""
    parser.add_argument("-e", "--evaluate", action="store_true", help="evaluate the checkpoint of --init")
    parser.add_argument(
        "--test_only", "--test-only", action="store_true", help="evaluate <output>/<arch>_<bit>bit/model_best.pth.tar"
    )
    parser.add_argument(
        "--released", metavar="NAME", help="evaluate a published checkpoint of checkpoints/manifest.toml"
    )
    add_model_option(parser)
    parser.add_argument("--cache", metavar="DIR", help="where published checkpoints are kept")


def evaluate_request(request: Request) -> Result:
    """Evaluate what a command line names and print the published lines: test log, precision, thresholds.

    One of our checkpoints knows its network, bits and data; a packed file its network and bits; a published one is that
    of a ResNet-20 on CIFAR-10 unless told.

    Raises:
        ValueError: no such checkpoint, one of another network, or bits that are neither recorded nor given.
    """
    if request.options.released:
        entry, path = fetch_released(request.options.released, request.options.cache)
        for name, value in (("arch", entry.arch), ("preset", entry.preset), ("bit", entry.bits), ("data", entry.data)):
            if value:
                request.given.setdefault(name, value)
        log.info("%s: %s top-1 %.2f%%", entry.name, "recorded" if entry.file else "published", entry.top1)
    else:
        path = _checkpoint_path(request)
    opened = open_network(path, {**request.given, "init": None}, request.options.model, arch=PUBLISHED_ARCH)
    config, model = opened.config, opened.model
    device = choose_device(config.device, config.gpu)
    set_numerics(config.numerics, device)
    dataset = load_config_dataset(config, need_train=False)
    if opened.num_classes is not None and int(dataset.test.labels_N.max()) >= opened.num_classes:
        raise ValueError(
            f"{opened.where}: has {opened.num_classes} outputs, {dataset.name} has {len(dataset.classes)} classes"
        )
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    for sentence in odd_layers(model, sample_images(config, dataset.test, device)):
        log.warning("%s", sentence)
    mode = request.given.get("compile", "auto")  # not as it was trained: one pass does not earn back a whole graph
    network = model if mode == "auto" else compile_network(model, mode, device)
    result = evaluate(
        network, make_batches(config, dataset.test, device), amp=config.amp, log=log.info, print_freq=config.print_freq
    )
    log.info(" * Prec %.3f%%", result.top1)
    log.info("%d of %d images correct (%s, test)", result.correct, result.total, dataset.name)
    show_params(model)
    return result


def next_higher_checkpoint(config: TrainConfig) -> Path:
    """The best checkpoint of the next higher bit-width in the output folder (the published ``--use_pretrain``).

    Raises:
        ValueError: there is none.
    """
    output = Path(config.output)
    higher = (*range(config.bit + 1, 9), 32)
    tried = [output / f"{config.arch}_{bits}bit" / BEST for bits in higher]
    for path in tried:
        if path.is_file():
            return path
    raise ValueError(f"--use_pretrain: {tried[0]} is not there, nor that of any higher bit-width; name one with --init")


def _checkpoint_path(request: Request) -> Path:
    if "init" in request.given:
        return Path(request.given["init"])
    config = request.config()
    if not request.options.test_only:
        raise ValueError("no checkpoint to evaluate: name one with --init PATH, or use --test_only")
    tried = [Path(folder) / config.run_name / BEST for folder in dict.fromkeys([config.output, "test_dir"])]
    for path in tried:
        if path.is_file():
            return path
    raise ValueError(f"--test_only: {tried[0]} is not there; name a checkpoint with --init")
