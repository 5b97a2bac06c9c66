"""Fixtures of the scripts' tests."""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apot_fat.command_line import run_main

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


def load_script(name: str) -> Callable[[list[str] | None], None]:
    """The ``main`` of a script."""
    main: Callable[[list[str] | None], None] = runpy.run_path(str(ROOT / "scripts" / name))["main"]
    return main


@pytest.fixture(autouse=True)
def _same_log() -> Iterator[None]:
    """What ``run_main`` tells the log holds for the test alone."""
    logger = logging.getLogger("apot_fat")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers = handlers
    logger.setLevel(level)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a script in a fresh folder: (exit code, standard output, standard error)."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(name: str, *argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(SystemExit) as stopped:
            run_main(load_script(name), [str(argument) for argument in argv])
        logging.getLogger("apot_fat").handlers = []
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call
