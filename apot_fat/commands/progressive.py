"""Progressive training: apot-fat progressive --config digits/resnet20_apot [--bits 32,4,3,2]."""

from __future__ import annotations

from pathlib import Path

from apot_fat.command_line import log, make_parser, parse, say
from apot_fat.optional import MissingPackageError
from apot_fat.quant.spec import check_bits
from apot_fat.reporting import draw_runs, find_runs, runs_table
from apot_fat.training import train_chain
from apot_fat.training.distributed import launched


def main(argv: list[str] | None = None) -> None:
    """Train the chain, then print the table of all runs in the output folder and draw them."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--bits", metavar="B,B,…", help="chain of bit-widths (default: the recipe's)")
    parser.add_argument("--resume", choices=["auto"], help="what it does anyway: go on where the last run stopped")
    request = parse(parser, argv)
    if request.recipe is None:
        raise ValueError("no recipe for this network, data set and method under configs/: name one with --config")
    request.say_recipe()
    if "bit" in request.given:
        raise ValueError(f"--bit {request.given['bit']}: a chain has several; name them with --bits")
    bits = request.options.bits
    chain = request.recipe.chain if bits is None else _parse_chain(bits)
    summaries = train_chain(request.recipe, chain, request.given)
    if not launched().is_first:
        return
    output = summaries[0].folder.parent
    runs = find_runs(output)
    say(runs_table(runs))
    try:
        say(f"figure: {draw_runs(runs, Path(output) / 'progressive.png')}")
    except MissingPackageError as error:  # the chain is trained all the same
        log.warning("no figure: %s", error)


def _parse_chain(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"bits {text!r}: expected bit-widths, such as 32,4,3,2")
    chain = tuple(int(part) for part in parts)
    for bits in chain:
        check_bits(bits)
        if chain.count(bits) > 1:
            raise ValueError(f"bits {text!r}: {bits} twice; each has one run in the output folder")
    return chain
