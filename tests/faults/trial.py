"""A run undisturbed, the same run under faults, and whether both end the same."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from apot_fat.checkpoint import before, read_checkpoint, write_checkpoint
from apot_fat.models import create_model
from apot_fat.training import evaluate
from apot_fat.training.build import load_config_dataset, make_batches
from apot_fat.training.folder import BEST, LAST, METRICS
from apot_fat.training.network import open_network
from tests.faults.draws import (
    BETWEEN,
    DAMAGED,
    FULL_DISK,
    IN_MEMORY,
    INT,
    INT_GROUP,
    INT_TWICE,
    KILL,
    KILL_ALL,
    LOST_WORKER,
    MOVED_DATA,
    MOVED_OUTPUT,
    STREAM,
    TERM,
    TERM_ALL,
    Fault,
    Run,
)
from tests.faults.launcher import Attempt, Launcher
from tests.training.same_run import assert_same_run

TRAINING_IMAGES, TEST_IMAGES, CLASSES = 101, 21, 3
_PARENT, _RECIPE = "parent.pth.tar", "recipe.toml"  # beside the images
_SIGNALS = {KILL: signal.SIGKILL, KILL_ALL: signal.SIGKILL, TERM: signal.SIGTERM, TERM_ALL: signal.SIGTERM}
_SIGNALS |= {INT: signal.SIGINT, INT_GROUP: signal.SIGINT, INT_TWICE: signal.SIGINT}


class Trial:
    """A run and its faults.

    Args:
        run, faults: what is tried.
        launcher: starts processes.
        folder: an empty one, for images and logs.
    """

    def __init__(self, run: Run, faults: Sequence[Fault], launcher: Launcher, folder: Path) -> None:
        self.run, self.faults, self.launcher, self.folder = run, faults, launcher, folder
        self.data, self.output = folder / "data", launcher.disk / "parts"
        self.had: list[Fault] = []
        """Faults that have befallen the run."""
        self.attempts, self.seconds, self.operations = 0, 0.0, 0
        _write_data(run, self.data)

    def check(self) -> None:
        """Run, disturb, compare."""
        whole = self.launcher.disk / "whole"
        try:
            self._run_whole(whole)
            for fault in self.faults:
                if fault.kind in BETWEEN:
                    self._disturb_between(fault)
                else:
                    self._disturb(fault)
            self._finish(self._start(self.output))
            for name in self.run.names:
                self._compare(self._seen(whole) / name, self._seen(self.output) / name)
        finally:
            for output in self.launcher.seen_disk.iterdir():
                shutil.rmtree(output)

    def _run_whole(self, output: Path) -> None:
        attempt = self._start(output)
        said = self._finish(attempt)
        self.seconds = attempt.seconds
        found = re.search(r"(\d+) operations on files", said)
        assert found, said
        self.operations = int(found[1])

    def _finish(self, attempt: Attempt) -> str:
        attempt.wait()
        said = attempt.log.read_text()
        assert not any(attempt.codes.values()), said
        attempt.check_nothing_is_left()
        return said

    def _seen(self, output: Path) -> Path:
        return self.launcher.seen_disk / output.relative_to(self.launcher.disk)

    def _start(self, output: Path, stop_at: int = 0) -> Attempt:
        self.attempts += 1
        return Attempt(
            self.launcher,
            ["progressive" if self.run.is_chain else "train", *self._arguments(output)],
            self.run.processes,
            self.folder / f"{self.attempts}.log",
            watched=output,
            stop_at=stop_at,
            has_workers=self.run.workers > 0,
        )

    def _arguments(self, output: Path) -> list[str]:
        options = {
            **self.run.options,
            **self._images(),
            "output": output,
            "resume": "auto",
            "workers": self.run.workers,
        }
        options |= {"compile": "off", "dist_timeout": 60, "print_freq": 5, "lr": 0.02, "crop_padding": 1}
        options |= {"loader": "stream" if self.run.images == STREAM else "memory"}
        if self.run.has_parent:
            options["init"] = self.data / _PARENT
        if self.run.is_chain:
            options |= {"config": self.data / _RECIPE, "bits": f"32,{options.pop('bit')}"}
            options.pop("distill_weight", None)  # the recipe says from whom, and that not the teacher itself does
        elif self.run.learns:
            options["teacher"] = self.data / _PARENT
        return [part for name, value in options.items() for part in _flag(name, value)]

    def _images(self) -> dict[str, str]:
        if self.run.images != IN_MEMORY:
            return {"data": str(self.data)}
        return {"data": str(self.data / "train.npz"), "test_data": str(self.data / "test.npz")}

    def _disturb_between(self, fault: Fault) -> None:
        checkpoints = [self._seen(self.output) / name / LAST for name in self.run.names]
        damageable = [path for path in checkpoints if path.exists() and before(path).exists()]
        if fault.kind == MOVED_DATA:
            self.data = self.data.rename(f"{self.data}-moved")
        elif fault.kind == MOVED_OUTPUT and self._seen(self.output).exists():
            moved = Path(f"{self.output}-moved")
            self._seen(self.output).rename(self._seen(moved))
            self.output = moved
        elif fault.kind == DAMAGED and damageable:
            _damage(random.Random(fault.amount).choice(damageable), fault.amount)
        else:
            return
        self.had.append(fault)

    def _disturb(self, fault: Fault) -> None:
        moment = fault.moment * self._left()
        attempt = self._start(self.output, 1 + int(moment * self.operations) if fault.at_file else 0)
        filler = self.launcher.seen_disk / "filler"
        try:
            if attempt.wait(lambda: attempt.stands_still if fault.at_file else attempt.seconds > moment * self.seconds):
                self._strike(fault, attempt, filler)
                attempt.wait()
        finally:
            filler.unlink(missing_ok=True)
        _check_end(fault, attempt.codes, attempt.log.read_text(), has_workers=self.run.workers > 0)
        attempt.check_nothing_is_left()
        if any(attempt.codes.values()):
            self.had.append(fault)

    def _left(self) -> float:
        """The part of the run that a resumed one has before it."""
        done = 0
        for name in self.run.names:
            try:
                done += read_checkpoint(self._seen(self.output) / name / LAST)["epoch"]
            except ValueError:  # none yet, or damaged
                break
        return 1 - done / (len(self.run.names) * int(str(self.run.options["epochs"])))

    def _strike(self, fault: Fault, attempt: Attempt, filler: Path) -> None:
        if fault.kind == FULL_DISK:
            self._fill_disk(int(fault.amount * 4e6), attempt, filler)
        elif fault.kind == LOST_WORKER:
            attempt.send(signal.SIGCONT)
            if attempt.wait(lambda: bool(attempt.workers())):
                os.kill(attempt.workers()[0], signal.SIGKILL)
        elif fault.kind == INT_GROUP:
            attempt.send_to_groups(signal.SIGINT)
        else:
            attempt.send(_SIGNALS[fault.kind], None if fault.kind in (KILL_ALL, TERM_ALL) else [fault.rank])
        attempt.send(signal.SIGCONT)
        if fault.kind == INT_TWICE:
            again = attempt.seconds + fault.amount * 0.1
            if attempt.wait(lambda: attempt.seconds > again):
                attempt.send(signal.SIGINT, [fault.rank])

    def _fill_disk(self, left: int, attempt: Attempt, filler: Path) -> None:
        if self.launcher.has_small_disk:
            free = os.statvfs(filler.parent)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize - left)
        else:  # the next best: no file may become larger, but for the log
            for pid in attempt.pids:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(left, 1 << 16),) * 2)

    def _compare(self, whole: Path, parts: Path) -> None:
        # of an epoch that the disk had no room for there are no curves
        assert_same_run(whole, parts, curves=all(fault.kind != FULL_DISK for fault in self.had))
        assert not list(parts.glob(".*.tmp"))
        assert before(parts / LAST).exists()
        rows = [json.loads(line) for line in (parts / METRICS).read_text().splitlines()]
        for name in (LAST, BEST):
            # the best checkpoint may name images that have moved since
            opened = open_network(parts / name, {**self._images(), "workers": 0})
            batches = make_batches(
                opened.config, load_config_dataset(opened.config, need_train=False).test, torch.device("cpu")
            )
            model = opened.model.to(memory_format=torch.channels_last)
            alone = evaluate(model, batches).top1
            history = opened.content["history"]
            assert alone == history[-1]["test_top1"] == rows[len(history) - 1]["test_top1"], name


def _flag(name: str, value: object) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def _check_end(fault: Fault, codes: dict[int, int], said: str, *, has_workers: bool) -> None:
    number = _SIGNALS.get(fault.kind, signal.SIGTERM)
    # Python itself says where the second SIGINT hit, workers that their process is gone, TensorBoard that it has ended
    is_said = fault.kind == INT_TWICE or (number == signal.SIGKILL and has_workers) or "goes on without" in said
    assert is_said or "Traceback" not in said, f"{codes}: {said}"
    allowed = {0, -number, 128 + number}
    if len(codes) > 1:  # and those who have lost one
        allowed |= {-signal.SIGTERM, 128 + signal.SIGTERM, 4}
    if fault.kind in (FULL_DISK, LOST_WORKER):
        allowed |= {4}
        assert 4 not in codes.values() or re.search("cannot be written|No space left|process is lost", said), said
    assert allowed.issuperset(codes.values()), f"{codes}: {said}"


def _damage(path: Path, amount: float) -> None:
    draw = random.Random(amount)
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    path.unlink()  # another name of it stays whole
    how = draw.randrange(5)
    if how == 0:
        return
    if how == 1:
        content = content[:start]
    elif how == 2:
        content[start] ^= 1 << draw.randrange(8)
    elif how == 3:
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    else:
        content = bytearray(len(content))
    path.write_bytes(content)


def _write_data(run: Run, folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (("train", TRAINING_IMAGES), ("test", TEST_IMAGES)):
        labels = np.arange(count) % CLASSES
        images = (rng.integers(0, 60, (count, 8, 8, 3)) + 90 * labels[:, None, None, None]).astype(np.uint8)
        if run.images == IN_MEMORY:
            np.savez(folder / f"{name}.npz", images=images, labels=labels.astype(np.uint8))
            continue
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / name / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    arch, bits = str(run.options["arch"]), run.options["bit"]
    parent = create_model(arch, bits=32, num_classes=CLASSES)
    write_checkpoint({"state_dict": parent.state_dict()}, folder / _PARENT)
    teacher = f'[bits.{bits}]\nteacher = "fp32"\ndistill_weight = 0.5\n' if run.learns else ""
    (folder / _RECIPE).write_text(f'arch = "{arch}"\n{teacher}')
