"""The command line that the commands share: one option a config field, recipes, one-line errors."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from tqdm.auto import tqdm

from apot_fat.models import default_preset, find_architecture
from apot_fat.text import one_line, printable
from apot_fat.training.config import TrainConfig, field_type
from apot_fat.training.distributed import launched, of_another_process
from apot_fat.training.finite import NonFiniteError
from apot_fat.training.interruption import InterruptedRunError
from apot_fat.training.recipe import PUBLISHED, Recipe, find_recipe, read_recipe, recipe_name

EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_ENVIRONMENT, EXIT_INTERRUPTED = 2, 3, 4, 130

log = logging.getLogger("apot_fat")


@dataclass(frozen=True)
class Request:
    """A parsed command line.

    Args:
        given: config values named on the command line.
        implied: config values that follow from those.
        recipe: the recipe of ``--config``, or the packaged one for the network, data and method, or None.
        options: the command's own options.
    """

    given: dict[str, Any]
    implied: dict[str, Any]
    recipe: Recipe | None
    options: argparse.Namespace

    def config(self, bit: int | None = None) -> TrainConfig:
        """The run at a bit-width: recipe, then command line."""
        bit = bit if bit is not None else self.given.get("bit", self._usual_bits)
        values = {**self.implied, **self.given, "bit": bit}
        return self.recipe.config(bit, values) if self.recipe else TrainConfig.from_dict(values, "command line")

    @property
    def _usual_bits(self) -> int:
        chain = self.recipe.chain if self.recipe else ()
        return chain[0] if len(chain) == 1 else TrainConfig.bit

    def say_recipe(self) -> None:
        """Log which packaged recipe was found for a command line that names none."""
        if self.recipe and not self.options.config:
            log.info("recipe: %s", recipe_name(self.recipe.path))


def make_parser(description: str) -> OneLineParser:
    """A parser with one option for every field of ``TrainConfig``, and ``--config``."""
    parser = OneLineParser(description=description)
    parser.add_argument(
        "--config",
        metavar="NAME|FILE.toml",
        help="recipe: a name that `apot-fat recipes` lists, or a file; options given beside it come over it",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        default=PUBLISHED,
        help="which packaged recipe where --config names none: published, ours or short (default: published)",
    )
    group = parser.add_argument_group("run (each is a TOML key of the same name)")
    for option in fields(TrainConfig):
        dashed, underscored = f"--{option.name.replace('_', '-')}", f"--{option.name}"
        short = [flag for flag in option.metadata["flags"] if not flag.startswith("--")]
        others = {underscored, *option.metadata["flags"]} - {dashed, *short}  # accepted, but not listed
        element, many, _ = field_type(option)
        settings: dict[str, Any] = {"dest": f"config.{option.name}", "default": argparse.SUPPRESS}
        help_text = f"{option.metadata['help']} (default: {_shown(option.default)})".replace("%", "%%")
        if option.metadata["choices"]:
            help_text = f"{', '.join(option.metadata['choices'])}: {help_text}"
        if element is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": _many(element) if many else _one(element), "metavar": _METAVARS[element]}
        group.add_argument(*short, dashed, help=help_text, **settings)
        if others:
            group.add_argument(*sorted(others), help=argparse.SUPPRESS, **settings)
    return parser


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """``--model``, for files that hold a network which is none of ours."""
    parser.add_argument(
        "--model", metavar="FILE.py:FUNCTION", help="what builds the file's network, float, where it is one of your own"
    )


def add_normalization_options(parser: argparse.ArgumentParser) -> None:
    """``--mean`` and ``--std``, for networks whose file does not record them."""
    options = {option.name: option for option in fields(TrainConfig)}
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=_many(float), metavar="X,X,X", help=options[name].metadata["help"])


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> Request:
    """Parse, and find the recipe.

    Without ``--data``, ``--arch``, ``--config`` the embedded digits are used; a named architecture without ``--data``
    means the data set of its papers, so that the published command lines do what they did.

    Raises:
        ValueError: a bad value or an unknown key.
    """
    options, given = parse_values(parser, argv)
    if options.config:
        return Request(given, {}, read_recipe(options.config), options)
    arch = given.get("arch", TrainConfig.arch)
    implied = {"data": find_architecture(arch).dataset} if "arch" in given and "data" not in given else {}
    data = given.get("data") or implied.get("data") or TrainConfig.data
    preset = given.get("preset") or default_preset(arch)
    recipe = find_recipe(data, arch, preset, options.recipe)
    if recipe is None and options.recipe != PUBLISHED:
        raise ValueError(f"--recipe {options.recipe!r}: configs/ has none for {arch} with {preset} on {data}")
    return Request(given, implied, recipe, options)


def parse_values(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse; (the options, the config values among them)."""
    options = parser.parse_args(argv)
    given = {key.removeprefix("config."): value for key, value in vars(options).items() if key.startswith("config.")}
    return options, given


def run_main(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> NoReturn:
    """Run a command's main: log to standard output, a ``ValueError`` as one line on standard error with exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no × or █ shows a question mark
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("apot_fat").addHandler(handler)
    try:
        processes = launched()
    except ValueError as error:
        _end(error, EXIT_BAD_INPUT)
    is_first = processes.is_first
    logging.getLogger("apot_fat").setLevel(logging.INFO if is_first else logging.ERROR)
    try:
        main(argv)
    except ValueError as error:
        if not is_first:
            time.sleep(3)  # torchrun ends this process meanwhile if the first met, and said, the same
        where = f" in process {processes.rank}" if not is_first else ""
        _end(error, EXIT_BAD_INPUT, where)
    except NonFiniteError as error:
        if is_first:
            _end(error, EXIT_NON_FINITE)
        sys.exit(EXIT_NON_FINITE)
    except InterruptedRunError as error:
        log.info("%s", error)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output, such as head, has enough
        sys.exit(0)
    except OSError as error:
        _end(error, EXIT_ENVIRONMENT)
    except RuntimeError as error:
        if not of_another_process(error):
            raise
        lost = f"process {processes.rank} has lost another ({one_line(error):.200})"
        _end(f"{lost}; go on with --resume auto", EXIT_ENVIRONMENT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        try:
            sys.stdout.flush()  # or Python does at its end, and complains if the reader has gone
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _end(error: Exception | str, code: int, where: str = "") -> NoReturn:
    print(f"{program()}: error{where}: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(code)


def program() -> str:
    """What this command was called as: ``apot-fat train``, or a script's name."""
    return Path(sys.argv[0]).name


def say(text: str) -> None:
    """Print lines to standard output, as ``printable``."""
    print(printable(text))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def __init__(self, *, description: str | None) -> None:
        super().__init__(prog=program(), description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(
            EXIT_BAD_INPUT, f"{self.prog}: error: {printable(' '.join(message.split()))} (--help lists the options)\n"
        )


class _TqdmHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stdout)
        sys.stdout.flush()


# Text that is no number goes on as text: the config's own check then names the field and what is allowed.
def _one(element: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        for number in (int, float) if element in (int, float) else ():
            try:
                return number(text)
            except ValueError:
                pass
        return text

    return convert


def _many(element: type) -> Callable[[str], Any]:
    one = _one(element)
    return lambda text: [one(part) for part in text.split(",")]


_METAVARS = {int: "N", float: "X", str: "NAME"}


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
