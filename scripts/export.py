"""Write a checkpoint's network as a small or portable file: export.py PATH --to onnx|packed --output FILE."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from apot_fat.checkpoint import load_weights, num_outputs, read_checkpoint
from apot_fat.command_line import OneLineParser, log, run_main
from apot_fat.export import WRITERS
from apot_fat.report.subject import usual_shape
from apot_fat.training.build import create_network, load_config_dataset, make_batches
from apot_fat.training.config import TrainConfig
from apot_fat.training.folder import recorded_shape
from apot_fat.training.recorded import recorded_config

VERIFY_IMAGES = 100


def main(argv: list[str] | None = None) -> None:
    """Export."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="a checkpoint, ours or released")
    parser.add_argument("--to", choices=list(WRITERS), required=True, help="kind of file")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--mode", choices=["float", "int8"], default="float", help="onnx: arithmetic (default: float)")
    parser.add_argument("--arch", help="network; our checkpoints record theirs")
    parser.add_argument("--bit", type=int, help="bits; our checkpoints record theirs")
    parser.add_argument("--preset", help="quantization variant; by default what the spelling of --arch stands for")
    parser.add_argument("--image-size", type=int, help="height and width of the images, pixels")
    parser.add_argument(
        "--data", metavar="NAME", help="images to measure ranges and compare on: as train.py's --data (default: noise)"
    )
    options = parser.parse_args(argv)
    content = read_checkpoint(options.checkpoint)
    names = ("arch", "bit", "preset", "image_size", "data")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    recorded = recorded_config(content, f"checkpoint {options.checkpoint}")
    if recorded is None:
        missing = [f"--{name}" for name in ("arch", "bit") if name not in given]
        if missing:
            raise ValueError(
                f"checkpoint {options.checkpoint}: does not record its network; give {' and '.join(missing)}"
            )
    if "data" in given:
        given["test_data"] = None  # the recorded one belongs to other data
    values = recorded.to_dict() if recorded else {}
    config = TrainConfig.from_dict({**values, **given}, f"checkpoint {options.checkpoint}")
    classes = num_outputs(content, f"checkpoint {options.checkpoint}")
    model = load_weights(create_network(config, classes), content).eval()
    images = _images(config) if "data" in given else None
    shape = recorded_shape(content, f"checkpoint {options.checkpoint}")
    input_shape = usual_shape(config, shape, options.image_size) if images is None else tuple(images.shape[1:])
    said = WRITERS[options.to](model, Path(options.output), input_shape, images, options.mode)
    log.info("%s: %s", options.output, said)


def _images(config: TrainConfig) -> Tensor:
    is_one_set = Path(config.data).is_file() and config.test_data is None
    dataset = load_config_dataset(config, need_train=not is_one_set)
    batches = make_batches(config, dataset.train or dataset.test, torch.device("cpu"))
    found: list[Tensor] = []
    for batch in batches:
        found.append(batch[0])
        if sum(map(len, found)) >= VERIFY_IMAGES:
            break
    return torch.cat(found)[:VERIFY_IMAGES]


if __name__ == "__main__":
    run_main(main)
