"""Evaluate a checkpoint, ours or released, and print its thresholds: apot-fat evaluate --init PATH --bit 3."""

from __future__ import annotations

import argparse
from pathlib import Path

from apot_fat.command_line import Request, add_model_option, make_parser, parse
from apot_fat.evaluation import Evaluation, evaluate, evaluate_released
from apot_fat.quant.all_layers import show_params
from apot_fat.training.folder import BEST


def main(argv: list[str] | None = None) -> None:
    """Evaluate."""
    parser = make_parser(__doc__ or "")
    add_evaluation_options(parser)
    evaluate_request(parse(parser, argv))


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


def evaluate_request(request: Request) -> Evaluation:
    """Evaluate what a command line names and print the published lines: test log, precision, thresholds.

    Raises:
        ValueError: as ``evaluate``, or no checkpoint named.
    """
    options, given = request.options, {key: value for key, value in request.given.items() if key != "init"}
    if options.released:
        result = evaluate_released(options.released, model=options.model, cache=options.cache, **given)
    else:
        result = evaluate(_checkpoint_path(request), model=options.model, **given)
    show_params(result.model)
    return result


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
