"""Print the clipping thresholds in a checkpoint: apot-fat show-params PATH [--table | --csv | --json]."""

from __future__ import annotations

import csv
import json
import sys

from apot_fat.checkpoint import PACKED_SUFFIX, checkpoint_thresholds, packed_thresholds, read_checkpoint
from apot_fat.command_line import OneLineParser, say
from apot_fat.quant.all_layers import ThresholdRow, threshold_table
from apot_fat.quant.layers import threshold_line
from apot_fat.text import csv_cell
from apot_fat.training.folder import BEST
from apot_fat.training.network import best_of_run

HEAD = ("layer", "weight_alpha", "act_alpha")


def main(argv: list[str] | None = None) -> None:
    """Print the published line of every quantized layer, or a table."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, ours, released, or packed (.safetensors); or a run folder")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--table", action="store_true", help="an aligned table with bars")
    form.add_argument("--csv", action="store_true", help=f"comma-separated: {','.join(HEAD)}")
    form.add_argument("--json", action="store_true", help="a list of objects with those keys")
    options = parser.parse_args(argv)
    path = str(best_of_run(options.checkpoint))
    if path != options.checkpoint and not options.csv and not options.json:
        say(f"{options.checkpoint}: its {BEST}")
    rows = read_thresholds(path)
    if options.table:
        say(threshold_table(rows))
    elif options.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([HEAD, *(tuple(map(csv_cell, row)) for row in rows)])
    elif options.json:
        print(json.dumps([dict(zip(HEAD, row, strict=True)) for row in rows], indent=1))
    else:
        for _, weight_alpha, act_alpha in rows:
            say(threshold_line(weight_alpha, act_alpha))


def read_thresholds(path: str) -> list[ThresholdRow]:
    """Layer, weight threshold and activation threshold of every quantized layer; None for a float side.

    Raises:
        ValueError: a file that is no checkpoint, or one of full precision.
    """
    if path.endswith(PACKED_SUFFIX):
        found = packed_thresholds(path)
    else:
        found = checkpoint_thresholds(read_checkpoint(path), f"checkpoint {path}")
    rows = [(name, *alphas) for name, alphas in found.items()]
    if not rows:
        raise ValueError(
            f"checkpoint {path}: holds no clipping thresholds: its layers are float, or 8-bit, without any"
        )
    return rows
