"""The command ``apot-fat``: one subcommand a module, loaded when it is called, for PyTorch takes seconds to load."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import apot_fat

COMMANDS = {
    "train": "train one network at one bit-width",
    "progressive": "train a chain of bit-widths, each from the best of the one before",
    "evaluate": "accuracy and thresholds of a checkpoint, ours, released or packed",
    "quantize": "quantize a trained network without labels",
    "export": "write a checkpoint's network as ONNX, packed weights or C",
    "report": "draw runs and checkpoints as one HTML page",
    "show-params": "the clipping thresholds in a checkpoint",
    "sweep": "runs of many recipes, methods, bits and seeds, and their tables",
    "recipes": "the recipes and sweeps that --config takes by name",
    "benchmark": "time and memory beside the baselines",
    "gpu-check": "check and time a GPU, in minutes",
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command that the first argument names; without one list them all."""
    called_as = Path(sys.argv[0])
    program = "python -m apot_fat" if called_as.name == "__main__.py" else called_as.name
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {program} COMMAND ...  ({program} COMMAND --help lists its options)\n")
        print("\n".join(f"  {command:<13}{about}" for command, about in COMMANDS.items()))
        sys.exit(0)
    if name == "--version":
        print(f"apot-fat {apot_fat.__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        from apot_fat.quant.spec import nearest

        print(f"{program}: error: no command {name!r}{nearest(name, COMMANDS)}: --help lists them", file=sys.stderr)
        sys.exit(2)
    from apot_fat.command_line import run_main

    sys.argv = [f"{program} {name}", *rest]  # the name that messages give
    run_main(import_module(f"apot_fat.commands.{name.replace('-', '_')}").main)
