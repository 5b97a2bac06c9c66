"""What the checks share: where they run, what they find, and how it is shown."""

from __future__ import annotations

import gc
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apot_fat.quant.seam import get_kernels, set_kernels
from apot_fat.text import aligned
from apot_fat.training.interruption import InterruptedRunError

OK, MISSED, FAILED, NOT_JUDGED = "ok", "missed", "FAILED", "–"
_SHOWN = 110  # characters of what was found; the JSON file has it whole


@dataclass(frozen=True)
class Check:
    """What is checked.

    Args:
        device: where.
        quick: everything tiny, to check the checks.
        folder: for files that are thrown away.
    """

    device: torch.device
    quick: bool
    folder: Path

    def verdict(self, reached: bool) -> str:
        """Of a goal that is set for GPUs."""
        if self.quick or self.device.type != "cuda":
            return NOT_JUDGED
        return OK if reached else MISSED


class Found(NamedTuple):
    """What a check found: in words, what it should be, whether it is, and numbers for the JSON file."""

    value: str
    goal: str = ""
    verdict: str = OK
    numbers: dict[str, Any] | None = None


Item = tuple[str, Callable[[], Found]]
Section = Callable[[Check], Iterator[Item]]


@dataclass(frozen=True)
class Row:
    """A row of the table; ``notes`` are the warnings that came meanwhile, each once."""

    section: str
    what: str
    value: str
    goal: str = ""
    verdict: str = FAILED
    seconds: float = 0.0
    numbers: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    traceback: str = ""


def run_section(name: str, section: Section, check: Check, match: str = "") -> Iterator[Row]:
    """The rows of a section, those in whose name ``match`` is; an error in one is its row, and the rest goes on."""
    kernels = get_kernels()
    torch.manual_seed(0)
    try:
        for what, measure in section(check):
            if match in what:
                yield _row(name, what, measure)
    except Exception as error:
        yield Row(name, "(preparation)", _said(error), traceback=traceback.format_exc())
    finally:
        set_kernels(kernels)
        torch.compiler.reset()  # and with it the memory of CUDA graphs
        gc.collect()
        torch.cuda.empty_cache()


def _row(section: str, what: str, measure: Callable[[], Found]) -> Row:
    start = time.perf_counter()
    with _noted() as notes:
        try:
            found = measure()
        except InterruptedRunError:  # a signal from outside
            raise
        except Exception as error:
            seconds = time.perf_counter() - start
            return Row(section, what, _said(error), seconds=seconds, notes=notes, traceback=traceback.format_exc())
    return Row(section, what, *found[:3], time.perf_counter() - start, found.numbers, notes)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {_joined(str(error))}"


def _joined(text: str) -> str:
    return " ".join(text.split())


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, and below them what was warned of."""
    head = ("", "what", "found", "goal", "verdict", "s")
    cells = [
        (
            row.section,
            row.what,
            row.value[:_SHOWN],
            row.goal,
            row.verdict + (" *" if row.notes else ""),
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    places: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            places.setdefault(note, []).append(f"{row.section} {row.what}")
    notes = [f"* {note[: 2 * _SHOWN]} ({at[0]}{'; …' if len(at) > 1 else ''})" for note, at in places.items()]
    return "\n".join([aligned(head, cells, left=head[:-1]), *notes])


@contextmanager
def _noted() -> Iterator[list[str]]:
    # what is warned of meanwhile, in our log and by Python
    handler = _Notes()
    logger = logging.getLogger("apot_fat")
    before, logger.handlers = logger.handlers, [handler]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)  # within PyTorch
            yield handler.found
    finally:
        logger.handlers = before
        for warning in caught:
            handler.note(f"{warning.category.__name__}: {warning.message}")


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.note(record.getMessage())

    def note(self, message: str) -> None:
        message = _joined(message)
        if message not in self.found and not message.startswith("SIGTERM"):  # our own signals
            self.found.append(message)
