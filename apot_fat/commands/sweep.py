"""Recipes × methods × bits × seeds: apot-fat sweep --config sweeps/NAME, or --table FILE.csv."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from apot_fat.checkpoint import output_file
from apot_fat.command_line import log, make_parser, parse_values, say
from apot_fat.optional import MissingPackageError
from apot_fat.reporting import draw_against_seconds, draw_sweep, seeds_table, sweep_table
from apot_fat.reporting.sweep import MEASURES
from apot_fat.training.distributed import launched
from apot_fat.training.finite import NonFiniteError
from apot_fat.training.folder import RunSummary
from apot_fat.training.recipe import PUBLISHED
from apot_fat.training.results import ResultRow, read_results, write_results
from apot_fat.training.sweep import Cell, Sweep, read_sweep, run_sweep

_PARTS = {"recipe": "recipes", "method": "methods", "bits": "bits", "seed": "seeds"}
_PART_OF = {"preset": "--methods", "bit": "--bits", "seed": "--seeds"}


def main(argv: list[str] | None = None) -> None:
    """Run what is not finished, then print the tables; or with ``--table`` print those of stored results."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "sweep", nargs="?", metavar="SWEEP", help="what to run, as --config; options given beside it come over it"
    )
    parser.add_argument("--table", metavar="FILE.csv", help="print the tables of stored results and run nothing")
    parser.add_argument("--figure", metavar="FILE.png", help="with --table: where to draw the gain over the baseline")
    parser.add_argument("--seconds", metavar="FILE.png", help="with --table: where to draw accuracy over time")
    parser.add_argument("--baseline", metavar="RECIPE", help="what gains are over (default: the sweep's, or published)")
    parser.add_argument(
        "--by", metavar="MEASURE", default="top1", help=f"{', '.join(MEASURES)}: what the tables show (default: top1)"
    )
    for name in _PARTS.values():
        parser.add_argument(f"--{name}", metavar="A,B,…", help=f"run these {name} alone")
    options, given = parse_values(parser, argv)
    if options.by not in MEASURES:
        raise ValueError(f"--by {options.by!r}: choose one of {', '.join(MEASURES)}")
    if options.table:
        for figure in filter(None, (options.figure, options.seconds)):
            output_file(figure, ".png", options.table)
        stored, baseline = read_results(options.table), options.baseline or "published"
        print_tables(stored, baseline, options.by)
        if options.figure:
            log.info("figure: %s", draw_sweep(stored, Path(options.figure), baseline, options.by))
        if options.seconds:
            log.info("figure: %s", draw_against_seconds(stored, Path(options.seconds), options.by))
        return
    source = options.config or options.sweep
    if not source:
        raise ValueError("no sweep: name a file of configs/sweeps/ with --config, or stored results with --table")
    if options.recipe != PUBLISHED:
        raise ValueError(f"--recipe {options.recipe}: a sweep has several; run a part of it with --recipes")
    for name in ("preset", "bit", "seed"):
        if name in given:
            raise ValueError(f"--{name} {given[name]}: the sweep has its own; run a part of it with {_PART_OF[name]}")
    if options.figure or options.seconds:
        raise ValueError("--figure and --seconds go with --table FILE.csv; a sweep draws into its --output")
    sweep = read_sweep(source)
    if options.baseline and options.baseline not in sweep.methods:
        raise ValueError(f"--baseline {options.baseline!r}: choose one of {', '.join(sweep.methods)}")
    output = Path(given.setdefault("output", str(Path("result") / sweep.path.stem)))
    if options.by == "val_top1":
        for cell in sweep.cells:
            if not sweep.config(cell, given).val_split:
                raise ValueError(f"--by val_top1: {cell} holds no images out; give --val-split, or choose top1 or best")
    first = launched().is_first

    def after_cell(cell: Cell, run: RunSummary, rows: list[ResultRow]) -> None:
        if first:
            held_out = "" if run.last_val is None else f", held out {run.last_val:.2f}%"
            tqdm.write(f"{cell}: last {run.last:.2f}%{held_out}, {run.seconds:.0f} s")
            write_results(rows, output / "results.csv")

    logging.getLogger("apot_fat").setLevel(logging.WARNING)  # the runs' own lines
    rows, failed = run_sweep(sweep, given, wanted=chosen(sweep, options), after_cell=after_cell)
    if first:
        show(sweep, rows, output, options)
    if failed:
        reasons = "; ".join(f"{cell} {reason}" for cell, reason in failed.items())
        raise NonFiniteError(f"{len(failed)} runs have not finished: {reasons}")


def show(sweep: Sweep, rows: list[ResultRow], output: Path, options: argparse.Namespace) -> None:
    """Store the results, print their tables and draw them."""
    write_results(rows, output / "results.csv")
    if not rows:
        return
    rows = read_results(output / "results.csv")  # what is printed is what is stored
    baseline = options.baseline or sweep.baseline
    has_baseline = bool(options.baseline) or any(row.recipe == baseline for row in rows)
    print_tables(rows, baseline if has_baseline else None, options.by)
    say(f"\nresults: {output / 'results.csv'}")
    try:
        if has_baseline:
            say(f"figure: {draw_sweep(rows, output / 'results.png', baseline, options.by)}")
        say(f"figure: {draw_against_seconds(rows, output / 'seconds.png', options.by)}")
    except MissingPackageError as error:  # the results are there all the same
        log.warning("no figure: %s", error)


def chosen(sweep: Sweep, options: argparse.Namespace) -> Callable[[Cell], bool]:
    """Which cells the options ask for.

    Raises:
        ValueError: one that the sweep does not have.
    """
    cells = sweep.cells
    parts = {}
    for part, name in _PARTS.items():
        text: str | None = getattr(options, name)
        if text is None:
            continue
        known = list(dict.fromkeys(str(getattr(cell, part)) for cell in cells))
        parts[part] = text.split(",")
        for item in parts[part]:
            if item not in known:
                raise ValueError(f"--{name} {item!r}: choose of {', '.join(known)}")
    return lambda cell: all(str(getattr(cell, part)) in wanted for part, wanted in parts.items())


def print_tables(rows: list[ResultRow], baseline: str | None, measure: str) -> None:
    """The table of recipes, then that of seeds, as Markdown."""
    say(sweep_table(rows, baseline, measure))
    say("")
    say(seeds_table(rows, measure))
