"""Write a checkpoint's network as a small or portable file: apot-fat export PATH --to KIND --output FILE."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from apot_fat.checkpoint import output_file
from apot_fat.command_line import OneLineParser, add_model_option, add_normalization_options, log
from apot_fat.export import WRITERS, Export, FileKind
from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.reporting.subject import usual_shape
from apot_fat.training.build import load_config_dataset, make_batches
from apot_fat.training.config import TrainConfig
from apot_fat.training.folder import recorded_shape
from apot_fat.training.network import check_images, log_normalization, open_network

VERIFY_IMAGES = 100


def main(argv: list[str] | None = None) -> None:
    """Export."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, ours or released")
    parser.add_argument("--to", choices=list(WRITERS), required=True, help="kind of file")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--mode", choices=["float", "int8"], help="onnx: arithmetic (default: float)")
    parser.add_argument("--arch", help="network; our checkpoints record theirs")
    parser.add_argument("--bit", type=int, help="bits; our checkpoints record theirs")
    parser.add_argument("--preset", help="quantization variant; by default what the spelling of --arch stands for")
    parser.add_argument("--image-size", type=int, help="height and width of the images, pixels")
    parser.add_argument(
        "--data", metavar="NAME", help="images to measure ranges and compare on: as --data of train (default: noise)"
    )
    parser.add_argument("--multiply", action="store_true", help="c: products by * instead of shifts and adds")
    parser.add_argument(
        "--grid-bits",
        type=int,
        help=f"c, qonnx, vectors, verilog: bits of skip connections beside the sign (default: {Export.grid_bits})",
    )
    parser.add_argument(
        "--accumulator-bits",
        type=int,
        help=f"the same: bits of sums beside the sign; float32 carries 24 (default: {Export.accumulator_bits})",
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="qonnx: images are (N, H, W, C), as FINN and hls4ml read them"
    )
    add_normalization_options(parser)
    add_model_option(parser)
    options = parser.parse_args(argv)
    kind = WRITERS[options.to]
    _refuse_idle(options, kind)
    output = output_file(options.output, kind.suffix, options.checkpoint)
    kind.check_name(output)
    for suffix in kind.beside:
        output_file(str(output.with_suffix(suffix)), suffix, options.checkpoint)
    names = ("arch", "bit", "preset", "image_size", "data", "mean", "std")
    opened = open_network(options.checkpoint, {name: getattr(options, name) for name in names}, options.model)
    if options.mode == "int8":
        if opened.config.bit == FLOAT_BITS:
            raise ValueError(f"--mode int8: {opened.where} holds a full-precision network; give a quantized one")
        if options.data is None:
            raise ValueError("--mode int8: the ranges of sums are measured on images: name some with --data")
    images = _images(opened.config) if options.data else None
    shape = recorded_shape(opened.content, opened.where)
    input_shape = usual_shape(opened.config, shape, options.image_size) if images is None else tuple(images.shape[1:])
    if images is not None or options.to == "onnx":  # which is compared on noise without images
        sample = torch.zeros(1, *input_shape) if images is None else images[:1]
        check_images(opened.where, opened.model, sample)
    mean, std = opened.config.normalization()
    export = Export(
        model=opened.model,
        path=output,
        input_shape=input_shape,
        images=images,
        mean=mean,
        std=std,
        mode=options.mode or Export.mode,
        products="multiply" if options.multiply else "shift",
        grid_bits=Export.grid_bits if options.grid_bits is None else options.grid_bits,
        accumulator_bits=Export.accumulator_bits if options.accumulator_bits is None else options.accumulator_bits,
        channels_last=options.channels_last,
    )
    said = kind.write(export)
    log.info("%s: %s", output, said)


def _refuse_idle(options: argparse.Namespace, kind: FileKind) -> None:
    # options that would make no difference
    for name in dict.fromkeys(name for other in WRITERS.values() for name in other.takes):
        flag = f"--{name.replace('_', '-')}"
        if getattr(options, name) in (None, False):
            continue
        if name not in kind.takes:
            kinds = ", ".join(to for to, other in WRITERS.items() if name in other.takes)
            raise ValueError(f"{flag} with --to {options.to}: is for {kinds}; leave it out")
        if name in ("mean", "std") and options.data is None:
            raise ValueError(f"{flag}: is for the images of --data; name some, or leave it out")


def _images(config: TrainConfig) -> Tensor:
    is_one_set = Path(config.data).is_file() and config.test_data is None
    dataset = load_config_dataset(config, need_train=not is_one_set)
    log_normalization(config)
    batches = make_batches(config, dataset.train or dataset.test, torch.device("cpu"))
    found: list[Tensor] = []
    for batch in batches:
        found.append(batch[0])
        if sum(map(len, found)) >= VERIFY_IMAGES:
            break
    return torch.cat(found)[:VERIFY_IMAGES]
