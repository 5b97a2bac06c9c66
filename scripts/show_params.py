"""Print the clipping thresholds in a checkpoint: python scripts/show_params.py PATH."""

from __future__ import annotations

from apot_fat.checkpoint import checkpoint_thresholds, read_checkpoint
from apot_fat.command_line import OneLineParser, run_main
from apot_fat.quant.layers import threshold_line


def main(argv: list[str] | None = None) -> None:
    """Print the published line of every quantized layer."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="a checkpoint, ours or released")
    path = parser.parse_args(argv).checkpoint
    thresholds = checkpoint_thresholds(read_checkpoint(path), f"checkpoint {path}")
    if not thresholds:
        raise ValueError(f"checkpoint {path}: holds no clipping thresholds, it is full precision")
    for weight_alpha, act_alpha in thresholds.values():
        print(threshold_line(weight_alpha, act_alpha))


if __name__ == "__main__":
    run_main(main)
