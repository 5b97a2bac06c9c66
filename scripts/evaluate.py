"""Evaluate a checkpoint, ours or released, and print its thresholds: python scripts/evaluate.py --init PATH --bit 3."""

from __future__ import annotations

from apot_fat.command_line import make_parser, parse, run_main
from apot_fat.evaluation import add_evaluation_options, evaluate_request


def main(argv: list[str] | None = None) -> None:
    """Evaluate."""
    parser = make_parser(__doc__ or "")
    add_evaluation_options(parser)
    evaluate_request(parse(parser, argv))


if __name__ == "__main__":
    run_main(main)
