"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apot_fat.quant import get_kernels, set_kernels
from tests.left_out import left_out

if "APOT_FAT_KERNELS" not in os.environ and find_spec("apot_fat.quant.fast"):
    # a compilation takes seconds: the tests of compiled kernels ask for them
    vars(import_module("apot_fat.quant.fast.kernels"))["AUTO_ELEMENTS"] = 1 << 62
torch.set_num_threads(1)  # the suite runs on as many processes as cores
_slow = pytest.StashKey[int]()  # how many slow tests were left out


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_slow] = 0


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items and not items[0].config.option.keyword:
        items[0].config.stash[_slow] += sum(item.get_closest_marker("slow") is not None for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes, which all look at all tests
        session.config.workeroutput["slow"] = session.config.stash[_slow]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_slow] = getattr(node, "workeroutput", {}).get("slow", 0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    """Say in one line what was left out, and how to run it."""
    yield
    skipped = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    if line := left_out(skipped, config.stash[_slow]):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of exact fixtures and released checkpoints; tests that need it are skipped without it."""
    folder = os.environ.get("APOT_FAT_REFERENCE")
    if not folder or not Path(folder).is_dir():
        pytest.skip("APOT_FAT_REFERENCE does not name the folder of reference data")
    return Path(folder)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_kernels() -> Iterator[None]:
    """The choice of kernels that a test makes is its own."""
    before = get_kernels()
    yield
    set_kernels(before)


@pytest.fixture(autouse=True)
def _count_event_files_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    # a reader takes TensorBoard's files of one process and one second in the order of their names, 10 before 9
    if writer := sys.modules.get("tensorboard.summary.writer.event_file_writer"):
        monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))


@pytest.fixture
def tiny_npz(tmp_path: Path) -> tuple[Path, Path]:
    """Training and test images, 8 × 8, three classes told apart by their brightness."""
    return _write_images(tmp_path)


@pytest.fixture(scope="session")
def shared_npz(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The images of ``tiny_npz`` for fixtures that live longer than a test."""
    return _write_images(tmp_path_factory.mktemp("images"))


def _write_images(folder: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    paths = []
    for name, count in (("train", 48), ("test", 21)):
        labels = np.arange(count) % 3
        images = (rng.integers(0, 60, (count, 3, 8, 8)) + 90 * labels[:, None, None, None]).astype(np.uint8)
        path = folder / f"{name}.npz"
        np.savez(path, images=images, labels=labels.astype(np.uint8))
        paths.append(path)
    return paths[0], paths[1]
