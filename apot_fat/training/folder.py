"""A run folder: what is written there while a run trains, and read from it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apot_fat.checkpoint import (
    atomic_write,
    copy_checkpoint,
    drop_damaged,
    read_newest,
    remove_leftovers,
    write_checkpoint,
)
from apot_fat.text import one_line
from apot_fat.training.board import Board
from apot_fat.training.config import BEST as BEST
from apot_fat.training.config import TrainConfig
from apot_fat.training.distributed import Processes, gather_objects, largest_over_processes, wait_for_all
from apot_fat.training.interruption import InterruptedRunError, SignalWatch
from apot_fat.training.loop import Position
from apot_fat.training.readback import CHECK_EVERY, LateRead
from apot_fat.training.recorded import recorded_config, recorded_history
from apot_fat.training.state import TrainState, rng_state

LAST, METRICS, CONFIG = "checkpoint.pth.tar", "metrics.jsonl", "config.toml"
log = logging.getLogger("apot_fat")


@dataclass(frozen=True)
class RunSummary:
    """What a finished run gave.

    Args:
        folder: the run folder.
        arch, method, bits: what was trained.
        epochs: epochs trained.
        last, best: top-1 on the test images, %, at the last and at the best epoch (``best_epoch``, from 1).
        last_val: top-1 on the held-out images at the last epoch, %; None without ``val_split``.
        best_on: what chose the best epoch: ``test``, as published, or ``val``.
        thresholds: every clipping threshold, or empty at 32 bits.
        seconds: wall time from when the images are there to the end of the last epoch, compiling and saving included.
    """

    folder: Path
    arch: str
    method: str
    bits: int
    epochs: int
    last: float
    last_val: float | None
    best: float
    best_epoch: int
    best_on: str
    thresholds: tuple[float, ...]
    seconds: float


def summarize(folder: Path) -> RunSummary:
    """The summary of a run folder, from its files.

    Raises:
        ValueError: no run there, or a damaged file.
    """
    config, content = read_run(folder)
    return summary_of(folder, config, content["history"])


def summary_of(folder: Path, config: TrainConfig, history: list[dict[str, Any]]) -> RunSummary:
    """The summary of a run from its rows, one an epoch, at least one."""
    best = best_index(history)
    alphas = [
        alpha for layer in history[-1]["layers"].values() for alpha in (layer["weight_alpha"], layer["act_alpha"])
    ]
    return RunSummary(
        folder=folder,
        arch=config.arch,
        method=config.method,
        bits=config.bit,
        epochs=len(history),
        last=history[-1]["test_top1"],
        last_val=history[-1].get("val_top1"),
        best=history[best]["test_top1"],
        best_epoch=best + 1,
        best_on=_selection_key(history).removesuffix("_top1"),
        thresholds=tuple(alpha for alpha in alphas if alpha is not None),
        seconds=sum(row["seconds"] for row in history),
    )


def best_or_last(folder: Path) -> Path:
    """The best checkpoint of a run folder, or where that is gone the last."""
    return folder / BEST if (folder / BEST).is_file() else folder / LAST


def read_run(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Config and newest checkpoint of a run folder with at least one finished epoch.

    Raises:
        ValueError: no run there, a damaged file, or no finished epoch.
    """
    content = read_newest(folder / LAST, log.warning)
    config = run_config(content, folder / LAST)
    if not content["history"]:
        raise ValueError(f"{folder}: the run has finished no epoch yet; go on with --resume auto")
    return config, content


def run_config(content: dict[str, Any], path: Path) -> TrainConfig:
    """The config inside one of our checkpoints, whose history is then known to be a run's too.

    Raises:
        ValueError: it holds none, or they are not a run's.
    """
    config = recorded_config(content, f"checkpoint {path}")
    recorded_history(content, f"checkpoint {path}")
    if config is None:
        raise ValueError(f"checkpoint {path}: not written by a training run of apot-fat")
    return config


def recorded_shape(content: dict[str, Any], where: str) -> tuple[int, int, int] | None:
    """(C, H, W) of the images that a run of ours trained on, as its checkpoint records it; None where it does not.

    Raises:
        ValueError: something else there than a shape.
    """
    shape = content.get("image_shape")
    if shape is None:
        return None
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(type(n) is int and 0 < n < 1 << 16 for n in shape):
        raise ValueError(f"{where}: image_shape {shape!r:.60}: not three sizes; the file is damaged, take another")
    return shape


def best_index(history: list[dict[str, Any]]) -> int:
    """Index of the best epoch: the first with the highest accuracy on the selecting images."""
    key = _selection_key(history)
    return max(range(len(history)), key=lambda i: (history[i][key], -i))


class Records:
    """The files of a run folder, written by the first process alone.

    An epoch is saved first and drawn then: a board that cannot be drawn ends no run, and is given up with a warning.

    Args:
        folder: the run folder.
        config: the run.
        processes: its processes.
        history: its rows so far, one an epoch.
        about: what its checkpoints say of the images and files it reads: ``image_shape``, (C, H, W), and ``sources``.
        sample: a few of the images, what layers are measured with.
        drawn_again: the tested network at the end of the last of these epochs: a run that was ended between saving and
            drawing it draws it again; None where the network is beyond that.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        processes: Processes,
        history: list[dict[str, Any]],
        about: dict[str, Any],
        sample: Tensor,
        drawn_again: nn.Module | None = None,
    ) -> None:
        self.folder, self.config, self.processes = folder, config, processes
        self.done, self.about, self.sample = list(history), about, sample
        self.drawn_again = drawn_again if history else None
        self.board: Board | None = None
        self.lock = ExitStack()

    def __enter__(self) -> Records:
        if self.processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(_locked(self.folder))
            remove_leftovers(self.folder)
            drop_damaged(self.folder / LAST)
            with atomic_write(self.folder / CONFIG) as temporary:
                temporary.write_text(_toml(self.config.to_dict()), encoding="utf-8")
            with atomic_write(self.folder / METRICS) as temporary:  # without rows of an epoch that was not saved
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.done), encoding="utf-8")
            with self._drawing():
                self.board = Board(self.folder, self.config, len(self.done) - (self.drawn_again is not None))
                if self.drawn_again is not None:
                    self._draw(self.done[-1], self.drawn_again)
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock, self._drawing():
            if self.board is not None:
                self.board.close()

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the run is worth more than its curves
            self.board = None
            log.warning("the run goes on without its TensorBoard curves: %s", one_line(error))

    def _draw(self, row: dict[str, Any], tested: nn.Module) -> None:
        with self._drawing():
            if self.board is not None:
                self.board.write(row, tested, self.sample, row["epoch"] - 1)

    def save_within_epoch(self, state: TrainState, history: list[dict[str, Any]], position: Position) -> None:
        """Write a checkpoint between two steps; every process waits until it is there."""
        states = gather_objects((rng_state(state.device), position._asdict()))
        if self.processes.is_first:
            checkpoint = self._checkpoint(state, history, [rng for rng, _ in states])
            checkpoint["positions"] = [position for _, position in states]
            write_checkpoint(checkpoint, self.folder / LAST, keep_before=True)
        wait_for_all()

    def save(self, state: TrainState, history: list[dict[str, Any]]) -> None:
        """Record the epoch just ended; every process waits until its files are there."""
        rng = gather_objects(rng_state(state.device))
        if self.processes.is_first:
            row, best = history[-1], best_index(history)
            is_best = best == len(history) - 1
            log.info("best acc: %f", history[best][_selection_key(history)])
            checkpoint = self._checkpoint(state, history, rng)
            if is_best:
                write_checkpoint(checkpoint, self.folder / BEST)
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if is_best:
                copy_checkpoint(self.folder / BEST, self.folder / LAST, keep_before=True)
            else:
                write_checkpoint(checkpoint, self.folder / LAST, keep_before=True)
            self._draw(row, state.tested)
        wait_for_all()

    def _checkpoint(
        self, state: TrainState, history: list[dict[str, Any]], rng: list[dict[str, Tensor]]
    ) -> dict[str, Any]:
        return {
            "arch": self.config.arch,
            "epoch": len(history),
            "best_prec": history[best_index(history)]["test_top1"] if history else None,
            **state.content(),
            "rng": rng,
            "config": self.config.to_dict(),
            **self.about,
            "history": history,
        }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # a lock of the folder itself: it leaves nothing behind, and a killed process holds none
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{folder}: another process trains there; wait for it, or name another --output") from None
    except OSError:  # a file system without locks
        log.debug("%s: not locked", folder)
    try:
        yield
    finally:
        os.close(descriptor)


class StepSaver:
    """Saves within an epoch: every so many steps, and when a signal ends the run."""

    def __init__(
        self,
        records: Records,
        state: TrainState,
        history: list[dict[str, Any]],
        watch: SignalWatch,
        every: int,
    ) -> None:
        self.records, self.state, self.history, self.watch, self.every = records, state, history, watch, every
        self.steps = 0
        self.position: Callable[[], Position] | None = None
        self.agreement = LateRead()

    def after_step(self, batches: int, position: Callable[[], Position]) -> None:
        """Called after each optimiser step."""
        self.steps += 1
        self.position = position
        due = self.every > 0 and self.steps % self.every == 0
        if due:
            self._save()
        self._stop(self._asked(), saved=due)

    def after_test_batch(self) -> None:
        """Called after each batch of evaluation."""
        # processes see different numbers of batches and cannot agree here: several go on to the epoch's end
        if not self.records.processes.is_distributed:
            self._stop(self.watch.received or 0, saved=False)

    def stop_if_asked(self) -> None:
        """At an epoch's end, saved: end the run if a signal came to any process."""
        self._stop(int(largest_over_processes(self._received())), saved=True)

    def _received(self) -> Tensor:
        return torch.full((1,), self.watch.received or 0, device=self.state.device)

    def _asked(self) -> int:
        # a signal may reach the processes in different steps: they agree every so often, and none waits for it
        if not self.records.processes.is_distributed:
            return self.watch.received or 0
        if self.steps % CHECK_EVERY:
            return 0
        agreed = self.agreement.exchange(largest_over_processes(self._received()))
        return 0 if agreed is None else int(agreed[0])

    def _stop(self, asked: int, *, saved: bool) -> None:
        if not asked:
            return
        if not saved:
            self._save()
        raise InterruptedRunError(asked, f"saved in {self.records.folder}; go on with --resume auto")

    def _save(self) -> None:
        if self.position is not None:
            self.records.save_within_epoch(self.state, self.history, self.position())


def _toml(values: dict[str, str | int | float | bool | list[Any]]) -> str:
    # of flat values JSON's spelling is TOML's too, but for one character
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        for name, value in values.items()
    )


def _selection_key(history: list[dict[str, Any]]) -> str:
    return "val_top1" if "val_top1" in history[0] else "test_top1"
