"""One seed: a run undisturbed, the same run under faults, and whether both are the same."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
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
    CLASSES,
    DAMAGED,
    FULL_DISK,
    INT,
    INT_GROUP,
    INT_TWICE,
    KILL,
    KILL_ALL,
    LOST_WORKER,
    MOVED_DATA,
    MOVED_OUTPUT,
    PARENT,
    TERM,
    TERM_ALL,
    TEST_IMAGES,
    TRAINING_IMAGES,
    Fault,
    draw_faults,
    draw_run,
)
from tests.faults.launcher import Attempt, Launcher
from tests.training.same_run import assert_same_run

_SIGNALS = {KILL: signal.SIGKILL, KILL_ALL: signal.SIGKILL, TERM: signal.SIGTERM, TERM_ALL: signal.SIGTERM}
_SIGNALS |= {INT: signal.SIGINT, INT_GROUP: signal.SIGINT, INT_TWICE: signal.SIGINT}


class Trial:
    """A seed's run and its faults.

    Args:
        seed: draws both.
        launcher: starts processes.
        folder: an empty one, for data and logs.
    """

    def __init__(self, seed: int, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        self.run, self.faults = draw_run(seed), draw_faults(seed, draw_run(seed))
        self.name = f"{self.run.options['arch']}_{self.run.options['bit']}bit"
        self.data, self.output = folder / "data", launcher.disk / f"{seed}"
        self.attempts = 0
        self.had: list[str] = []
        """Faults that have befallen the run."""
        self.seconds, self.operations = 0.0, 0
        _write_images(self.data, self.run.images, str(self.run.options["arch"]))

    def check(self) -> None:
        """Run, disturb, compare."""
        try:
            self._check(self.output.with_name(f"{self.output.name}-whole"))
        finally:
            for output in self.launcher.seen_disk.iterdir():
                shutil.rmtree(output)

    def _check(self, whole: Path) -> None:
        attempt = self._start(whole, 0)
        attempt.wait()
        said = attempt.log.read_text()
        assert not any(attempt.codes.values()), said
        attempt.check_nothing_is_left()
        self.seconds = attempt.seconds
        found = re.search(r"(\d+) operations on files", said)
        assert found, said
        self.operations = int(found[1])
        for fault in self.faults:
            if fault.kind in BETWEEN:
                self._disturb_between(fault)
            else:
                self._disturb(fault)
        attempt = self._start(self.output, 0)
        attempt.wait()
        assert not any(attempt.codes.values()), attempt.log.read_text()
        attempt.check_nothing_is_left()
        self._compare(self._seen(whole), self._seen(self.output))

    def _seen(self, output: Path) -> Path:
        return self.launcher.seen_disk / output.relative_to(self.launcher.disk) / self.name

    def _start(self, output: Path, stop_at: int) -> Attempt:
        self.attempts += 1
        argv = [*self.run.argv, "--output", str(output), "--resume", "auto", *self._inputs()]
        return Attempt(
            self.launcher,
            argv,
            self.run.processes,
            self.folder / f"{self.attempts}.log",
            watched=output,
            stop_at=stop_at,
            workers=self.run.workers > 0,
        )

    def _images(self) -> dict[str, str]:
        if self.run.images != "npz":
            return {"data": str(self.data)}
        return {"data": str(self.data / "train.npz"), "test_data": str(self.data / "test.npz")}

    def _inputs(self) -> list[str]:
        inputs = self._images()
        inputs |= {"teacher": str(self.data / PARENT)} if "distill_weight" in self.run.options else {}
        inputs |= {"init": str(self.data / PARENT)} if self.run.starts_from_parent else {}
        return [part for name, path in inputs.items() for part in (f"--{name}", path)]

    def _disturb_between(self, fault: Fault) -> None:
        if fault.kind == MOVED_OUTPUT and self._seen(self.output).exists():
            moved = self.output.with_name(f"{self.output.name}-moved")
            self._seen(self.output).parent.rename(self._seen(moved).parent)
            self.output = moved
        elif fault.kind == MOVED_DATA:
            self.data = self.data.rename(self.data.with_name(f"{self.data.name}-moved"))
        elif fault.kind == DAMAGED and before(self._seen(self.output) / LAST).exists():
            _damage(self._seen(self.output) / LAST, fault.amount)
        else:
            return
        self.had.append(str(fault))

    def _left(self) -> float:
        # part of the run that a resumed one has before it
        try:
            epoch = read_checkpoint(self._seen(self.output) / LAST)["epoch"]
        except ValueError:
            epoch = 0
        return 1 - epoch / int(str(self.run.options["epochs"]))

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
        said = attempt.log.read_text()
        _check_end(fault, attempt.codes, said)
        attempt.check_nothing_is_left()
        if any(attempt.codes.values()):
            self.had.append(str(fault))

    def _strike(self, fault: Fault, attempt: Attempt, filler: Path) -> None:
        if fault.kind == FULL_DISK:
            free = os.statvfs(filler.parent)
            size = free.f_bavail * free.f_bsize - int(fault.amount * 4e6)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        elif fault.kind == LOST_WORKER:
            attempt.signal(signal.SIGCONT)
            if attempt.wait(lambda: bool(attempt.workers())):
                os.kill(random.Random(fault.amount).choice(attempt.workers()), signal.SIGKILL)
        elif fault.kind == INT_GROUP:
            attempt.signal_groups(signal.SIGINT)
        else:
            attempt.signal(_SIGNALS[fault.kind], None if fault.kind in (KILL_ALL, TERM_ALL) else [fault.rank])
        attempt.signal(signal.SIGCONT)
        if fault.kind == INT_TWICE:
            moment = attempt.seconds + fault.amount * 0.1
            if attempt.wait(lambda: attempt.seconds > moment):
                attempt.signal(signal.SIGINT, [fault.rank])

    def _compare(self, whole: Path, parts: Path) -> None:
        assert_same_run(whole, parts, curves=FULL_DISK not in " ".join(self.had))
        assert not list(parts.glob(".*.tmp"))
        rows = [json.loads(line) for line in (parts / METRICS).read_text().splitlines()]
        for name in (LAST, BEST):
            # the data set as the best checkpoint names it may have moved since
            opened = open_network(parts / name, self._images())
            test = load_config_dataset(opened.config, need_train=False).test
            batches = make_batches(opened.config, test, torch.device("cpu"))
            model = opened.model.to(memory_format=torch.channels_last)
            alone = evaluate(model, batches, amp=opened.config.amp).top1
            history = opened.content["history"]
            assert alone == history[-1]["test_top1"] == rows[len(history) - 1]["test_top1"], name


def _check_end(fault: Fault, codes: dict[int, int], said: str) -> None:
    # the second SIGINT may hit a destructor, and Python says so
    assert "Traceback" not in said or fault.kind == INT_TWICE, said
    number = _SIGNALS.get(fault.kind, signal.SIGTERM)
    allowed = {0, -number, 128 + number}
    if len(codes) > 1:  # and those who lost one
        allowed |= {-signal.SIGTERM, 128 + signal.SIGTERM, 4}
    if fault.kind in (FULL_DISK, LOST_WORKER):
        allowed |= {4}
        assert 4 not in codes.values() or re.search("cannot be written|No space left|process is lost", said), said
    assert allowed.issuperset(codes.values()), f"{codes}: {said}"


def _damage(path: Path, amount: float) -> None:
    draw = random.Random(amount)
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    how = draw.randrange(4)
    if how == 0:
        content = content[:start]
    elif how == 1:
        content[start] ^= 1 << draw.randrange(8)
    elif how == 2:
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    else:
        content = bytearray(len(content))
    path.unlink()  # another name of it stays whole
    path.write_bytes(content)


def _write_images(folder: Path, kind: str, arch: str) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (("train", TRAINING_IMAGES), ("test", TEST_IMAGES)):
        labels = np.arange(count) % CLASSES
        images = (rng.integers(0, 60, (count, 8, 8, 3)) + 90 * labels[:, None, None, None]).astype(np.uint8)
        if kind == "npz":
            np.savez(folder / f"{name}.npz", images=images, labels=labels.astype(np.uint8))
            continue
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / name / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    parent = create_model(arch, bits=32, num_classes=CLASSES)
    write_checkpoint({"state_dict": parent.state_dict()}, folder / PARENT)
