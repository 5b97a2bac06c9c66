"""Quantize a trained network without labels: apot-fat quantize --init CHECKPOINT --bits 4 --output FILE."""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from apot_fat.checkpoint import PACKED_SUFFIX, output_file, save_packed
from apot_fat.command_line import OneLineParser, add_model_option, add_normalization_options, log
from apot_fat.data import Dataset
from apot_fat.quant import FLOAT_BITS, Reconstruction, allocate_bits, quantize
from apot_fat.quant.convert import METHODS
from apot_fat.quant.convert.plan import EDGE_BITS, base_spec
from apot_fat.quant.integers import integer_weight
from apot_fat.quant.layers import QuantLinear
from apot_fat.quant.spec import LOW_BITS
from apot_fat.training.build import load_config_dataset, make_batches, sample_images, unlabelled_images
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device, set_numerics
from apot_fat.training.loop import Result, evaluate
from apot_fat.training.network import check_images, log_normalization, open_network

RUN_OPTIONS = ("arch", "data", "test_data", "image_size", "mean", "std", "device", "seed")
DEFAULT_BITS = 4
AVERAGE_CHOICES = (2, 3, 4, 5, 8)


def main(argv: list[str] | None = None) -> None:
    """Quantize, print what became of each layer and the accuracy before and after, and write a packed file."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--init", required=True, metavar="PATH", help="a full-precision checkpoint, ours or released; or torchvision"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help=f"the packed file to write ({PACKED_SUFFIX})")
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument(
        "--bits",
        type=int,
        choices=LOW_BITS,
        metavar="N",
        help=f"of weights and inputs, 2 to 8 (default: {DEFAULT_BITS})",
    )
    how_many.add_argument("--average", type=float, help="bits a weight, chosen layer by layer, in place of --bits")
    parser.add_argument("--method", choices=list(METHODS), default="apot", help="levels (default: apot)")
    parser.add_argument(
        "--images", type=int, default=1024, help="training images to look at, no labels (default: 1024)"
    )
    parser.add_argument("--no-augment", action="store_true", help="look at them as they are, not also as in training")
    parser.add_argument("--reconstruct", action="store_true", help="tune each block to what it computed, on them")
    for name, text in (("steps", "of each block"), ("joint_steps", "of all blocks together")):
        default = getattr(Reconstruction, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"--reconstruct: {text} (default: {default})")
    parser.add_argument(
        "--edge-bits", type=int, choices=EDGE_BITS, default=8, help="of first and last layer: 8, or 32 for float"
    )
    parser.add_argument("--seed", type=int, default=0, help="of images and reconstruction (default: 0)")
    for name, text in (
        ("arch", "network; our checkpoints record theirs"),
        ("data", "images, as --data of train; by default those the checkpoint records, or of the network's papers"),
        ("test_data", "test images, as --test-data of train"),
        ("device", "auto (CUDA where there is one), cpu, cuda, cuda:N"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", help=text)
    parser.add_argument("--image-size", type=int, help="height and width of the images, pixels")
    add_normalization_options(parser)
    add_model_option(parser)
    options = parser.parse_args(argv)
    if options.images < 1:
        raise ValueError(f"--images {options.images}: give at least 1")
    tuning = _reconstruction(options)
    bits = DEFAULT_BITS if options.bits is None else options.bits
    choices = [choice for choice in AVERAGE_CHOICES if _why_not_packed(options.method, choice) is None]
    if options.average is not None and not choices[0] <= options.average <= choices[-1]:
        raise ValueError(f"--average {options.average:g}: choose a number from {choices[0]} to {choices[-1]}")
    if options.average is None and (reason := _why_not_packed(options.method, bits)) is not None:
        raise ValueError(f"--method {options.method} --bits {bits}: no packed file holds it ({reason})")
    output = output_file(options.output, PACKED_SUFFIX, options.init)
    if output.suffix != PACKED_SUFFIX:
        raise ValueError(f"--output {output}: a packed file ends in {PACKED_SUFFIX}")
    given = {name: getattr(options, name) for name in RUN_OPTIONS}
    opened = open_network(options.init, given, options.model, bit=FLOAT_BITS)
    config, model = opened.config, opened.model
    if config.bit != FLOAT_BITS:
        raise ValueError(f"{opened.where}: holds a network of {config.bit} bits; give the full-precision one")
    device = choose_device(config.device, config.gpu)
    set_numerics(config.numerics, device)
    dataset = load_config_dataset(config)
    log_normalization(config)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    check_images(opened.where, model, sample_images(config, dataset.test, device)[:1], dataset)

    output.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after
    before = _test(model, config, dataset, device)
    assert dataset.train is not None
    images = unlabelled_images(config, dataset.train, options.images, device, augmented=not options.no_augment)
    begun = time.monotonic()
    overrides = None
    if options.average is not None:
        overrides = allocate_bits(model, images, options.average, choices, method=options.method)
        log.info("%s\n", overrides)
    conversion = quantize(
        model,
        bits,
        options.method,
        edge_bits=options.edge_bits,
        overrides=overrides,
        calibration=images,
        reconstruct=tuning or False,
    )
    seconds = time.monotonic() - begun
    mean, std = config.normalization()
    size = save_packed(model, output, mean=mean, std=std)
    log.info("%s\n", conversion)
    after = _test(model, config, dataset, device)
    how = "reconstructed" if options.reconstruct else "calibrated"
    shown = f"{min(options.images, len(dataset.train)):,} images"
    for result, network in ((before, "float"), (after, f"{options.method}, {how} on {shown}")):
        counts = f"{result.correct:,} of {result.total:,} correct"
        log.info("%s, %.3f%%: %s (%s, test)", counts, result.top1, network, config.test_data or dataset.name)
    log.info("%s: %s bytes, in %.0f s", output, f"{size:,}", seconds)


def _reconstruction(options: argparse.Namespace) -> Reconstruction | None:
    steps = {name: value for name in ("steps", "joint_steps") if (value := getattr(options, name)) is not None}
    if options.reconstruct:
        return Reconstruction(seed=options.seed, **steps)
    for name in steps:
        raise ValueError(f"--{name.replace('_', '-')} {steps[name]}: counts steps of --reconstruct, which is not given")
    return None


def _why_not_packed(method: str, bits: int) -> str | None:
    try:
        integer_weight(QuantLinear(1, 1, spec=base_spec(method, bits)))
    except ValueError as error:
        return str(error)
    return None


def _test(model: nn.Module, config: TrainConfig, dataset: Dataset, device: torch.device) -> Result:
    return evaluate(model, make_batches(config, dataset.test, device))
