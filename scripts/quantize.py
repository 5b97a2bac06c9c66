"""Quantize a trained network without labels: quantize.py --init CHECKPOINT --bits 4 --reconstruct --output FILE."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apot_fat.checkpoint import (
    PACKED_SUFFIX,
    TORCHVISION,
    load_weights,
    num_outputs,
    read_checkpoint,
    save_packed,
    torchvision_weights,
)
from apot_fat.command_line import OneLineParser, log, run_main
from apot_fat.data import Dataset
from apot_fat.models import find_architecture
from apot_fat.quant import FLOAT_BITS, Reconstruction, allocate_bits, quantize
from apot_fat.quant.convert import METHODS
from apot_fat.training.build import create_network, load_config_dataset, make_batches, unlabelled_images
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device, set_numerics
from apot_fat.training.loop import Result, evaluate
from apot_fat.training.recorded import recorded_config

RUN_OPTIONS = ("arch", "data", "test_data", "image_size", "device", "seed")


def main(argv: list[str] | None = None) -> None:
    """Quantize, print what became of each layer and the accuracy before and after, and write a packed file."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--init", required=True, metavar="PATH", help="a full-precision checkpoint, ours or released; or torchvision"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help=f"the packed file to write ({PACKED_SUFFIX})")
    parser.add_argument("--bits", type=int, default=4, help="of weights and inputs, 2 to 8 (default: 4)")
    parser.add_argument("--average", type=float, help="bits a weight, chosen layer by layer, in place of --bits")
    parser.add_argument("--method", choices=list(METHODS), default="apot", help="levels (default: apot)")
    parser.add_argument(
        "--images", type=int, default=1024, help="training images to look at, no labels (default: 1024)"
    )
    parser.add_argument("--no-augment", action="store_true", help="look at them as they are, not also as in training")
    parser.add_argument("--reconstruct", action="store_true", help="tune each block to what it computed, on them")
    parser.add_argument("--steps", type=int, default=Reconstruction.steps, help="of each block (default: %(default)s)")
    parser.add_argument(
        "--joint-steps",
        type=int,
        default=Reconstruction.joint_steps,
        help="of all blocks together (default: %(default)s)",
    )
    parser.add_argument("--edge-bits", type=int, default=8, help="of first and last layer: 8, or 32 for float")
    parser.add_argument("--seed", type=int, default=0, help="of images and reconstruction (default: 0)")
    for name, text in (
        ("arch", "network; our checkpoints record theirs"),
        ("data", "images, as train.py's --data; by default those the checkpoint records, or of the network's papers"),
        ("test_data", "test images, as train.py's --test-data"),
        ("device", "auto (CUDA where there is one), cpu, cuda, cuda:N"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", help=text)
    parser.add_argument("--image-size", type=int, help="height and width of the images, pixels")
    options = parser.parse_args(argv)
    if options.images < 1:
        raise ValueError(f"--images {options.images}: give at least 1")
    output = Path(options.output)
    if output.suffix != PACKED_SUFFIX:
        raise ValueError(f"--output {output}: a packed file ends in {PACKED_SUFFIX}")
    given = {name: value for name in RUN_OPTIONS if (value := getattr(options, name)) is not None}
    config, model = _float_network(options.init, given)
    device = choose_device(config.device, config.gpu)
    set_numerics(config.numerics, device)
    dataset = load_config_dataset(config)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)

    output.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after
    before = _test(model, config, dataset, device)
    assert dataset.train is not None
    images = unlabelled_images(config, dataset.train, options.images, device, augmented=not options.no_augment)
    begun = time.monotonic()
    overrides = None
    if options.average is not None:
        overrides = allocate_bits(model, images, options.average, method=options.method)
        log.info("%s\n", overrides)
    tuning = Reconstruction(options.steps, options.joint_steps, seed=config.seed)
    conversion = quantize(
        model,
        options.bits,
        options.method,
        edge_bits=options.edge_bits,
        overrides=overrides,
        calibration=images,
        reconstruct=tuning if options.reconstruct else False,
    )
    seconds = time.monotonic() - begun
    size = save_packed(model, output)
    log.info("%s\n", conversion)
    after = _test(model, config, dataset, device)
    how = "reconstructed" if options.reconstruct else "calibrated"
    shown = f"{min(options.images, len(dataset.train)):,} images"
    for result, network in ((before, "float"), (after, f"{options.method}, {how} on {shown}")):
        counts = f"{result.correct:,} of {result.total:,} correct"
        log.info("%s, %.3f%%: %s (%s, test)", counts, result.top1, network, config.test_data or dataset.name)
    log.info("%s: %s bytes, in %.0f s", output, f"{size:,}", seconds)


def _float_network(init: str, given: dict[str, Any]) -> tuple[TrainConfig, nn.Module]:
    """The network of a checkpoint, and how its images are made."""
    if init == TORCHVISION:
        if "arch" not in given:
            raise ValueError(f"--init {TORCHVISION}: name the network with --arch")
        content: Any = {"state_dict": torchvision_weights(given["arch"])}
    else:
        content = read_checkpoint(init)
    recorded = recorded_config(content, f"checkpoint {init}")
    if recorded is not None:
        if recorded.bit != FLOAT_BITS:
            raise ValueError(f"checkpoint {init}: holds a network of {recorded.bit} bits; give the full-precision one")
        values = recorded.to_dict()
        if "data" in given:
            values["test_data"] = None
    elif "arch" not in given:
        raise ValueError(f"checkpoint {init}: does not record its network; give --arch")
    else:
        values = {"bit": FLOAT_BITS, "data": find_architecture(given["arch"]).dataset}
    config = TrainConfig.from_dict({**values, **given}, f"checkpoint {init}")
    model = create_network(config, num_outputs(content, f"checkpoint {init}"))
    return config, load_weights(model, content).eval()


def _test(model: nn.Module, config: TrainConfig, dataset: Dataset, device: torch.device) -> Result:
    return evaluate(model, make_batches(config, dataset.test, device), amp=config.amp)


if __name__ == "__main__":
    run_main(main)
