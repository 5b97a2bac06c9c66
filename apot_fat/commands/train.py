"""Train one network at one bit-width: apot-fat train --arch res20 --bit 4 --init CHECKPOINT."""

from __future__ import annotations

from pathlib import Path

from apot_fat.command_line import make_parser, parse, say
from apot_fat.commands.evaluate import add_evaluation_options, evaluate_request
from apot_fat.training import train
from apot_fat.training.config import TrainConfig
from apot_fat.training.distributed import launched
from apot_fat.training.folder import BEST
from apot_fat.training.resume import resumed_config


def main(argv: list[str] | None = None) -> None:
    """Train, or with ``-e`` or ``--test_only`` evaluate."""
    parser = make_parser(__doc__ or "")
    add_evaluation_options(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on where a run stopped (`auto`: its folder's last checkpoint; a checkpoint's path: with its config)",
    )
    parser.add_argument(
        "--use_pretrain", "--use-pretrain", action="store_true", help="start from the next higher bit-width in --output"
    )
    request = parse(parser, argv)
    if request.options.evaluate or request.options.test_only or request.options.released:
        evaluate_request(request)
        return
    if request.options.use_pretrain and "init" not in request.given:
        request.given["init"] = str(next_higher_checkpoint(request.config()))
    resume = request.options.resume
    if resume not in (None, "auto") and not request.options.config:
        config = resumed_config(Path(resume), request.given)
    else:
        request.say_recipe()
        config = request.config()
    summary = train(config, resume=resume)
    if not launched().is_first:
        return
    best = f"best {summary.best:.3f}% (epoch {summary.best_epoch}, on {summary.best_on})"
    say(f"last {summary.last:.3f}%, {best}: {summary.folder}")


def next_higher_checkpoint(config: TrainConfig) -> Path:
    """The best checkpoint of the next higher bit-width in the output folder (the published ``--use_pretrain``).

    Raises:
        ValueError: there is none.
    """
    output = Path(config.output)
    higher = (*range(config.bit + 1, 9), 32)
    tried = [output / f"{config.arch}_{bits}bit" / BEST for bits in higher]
    for path in tried:
        if path.is_file():
            return path
    raise ValueError(f"--use_pretrain: {tried[0]} is not there, nor that of any higher bit-width; name one with --init")
