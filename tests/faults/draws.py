"""Random runs and random faults against them, each a function of one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.faults.networks import SMALL

TRAINING_IMAGES, TEST_IMAGES, CLASSES = 101, 21, 3
FOLDER, STREAM = "folder", "stream"
PARENT = "parent.pth.tar"
"""Beside the images: the 32-bit network that a run starts from or learns from."""

DAMAGED, MOVED_OUTPUT, MOVED_DATA = "damaged checkpoint", "moved output", "moved data"
BETWEEN = (DAMAGED, MOVED_OUTPUT, MOVED_DATA)
"""Faults that come while no process runs."""
KILL, KILL_ALL = "SIGKILL to one", "SIGKILL to all"
TERM, TERM_ALL = "SIGTERM to one", "SIGTERM to all"
INT, INT_GROUP, INT_TWICE = "SIGINT to one", "SIGINT to the group", "SIGINT twice"
FULL_DISK, LOST_WORKER = "full disk", "lost worker"

_PRESETS = ("apot-cifar", "fat-cifar", "fat-cifar-log", "apot-imagenet-pot", "apot-imagenet-uniform", "lsq", "pact")
_LARGER = (("resnet20", "apot-cifar"), ("mobilenet_v2_x0_35", "uniform-mobilenet"))


@dataclass(frozen=True)
class Run:
    """A run.

    Args:
        processes: how many.
        images: ``npz``, ``folder`` or ``stream``.
        workers: decoding processes of each.
        starts_from_parent: whether its weights are another network's at first.
        options: further values of the config.
    """

    processes: int
    images: str
    workers: int
    starts_from_parent: bool
    options: dict[str, object]

    @property
    def argv(self) -> list[str]:
        """The command line but for places."""
        argv = ["--compile", "off", "--dist-timeout", "60", "--workers", str(self.workers), "--print-freq", "5"]
        argv += ["--loader", "stream" if self.images == STREAM else "memory"]
        for name, value in self.options.items():
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return argv

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        start = ", from a parent" if self.starts_from_parent else ""
        return f"{self.processes} processes, {self.images}, {self.workers} workers{start}, {options}"


@dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        kind: one of the names above.
        rank: of the process it befalls.
        at_file: whether it comes before an operation on a file, or else at any time.
        moment: how far the attempt has got, as a part of what is left of the run, [0, 1).
        amount: how much of the disk is left, or of the checkpoint, [0, 1).
    """

    kind: str
    rank: int
    at_file: bool
    moment: float
    amount: float

    def __str__(self) -> str:
        when = "" if self.kind in BETWEEN else f" {'before a file' if self.at_file else 'at'} {self.moment:.2f}"
        return f"{self.kind}{when}"


def draw_run(seed: int) -> Run:
    """The run of a seed."""
    draw = random.Random(seed)
    arch, preset = draw.choice(_LARGER) if draw.random() < 0.15 else (SMALL, draw.choice(_PRESETS))
    processes = draw.choice((1, 1, 2, 2, 3, 4))
    images = draw.choice(("npz", FOLDER, STREAM))
    workers = draw.choice((0, 1, 2)) if images == STREAM else 0
    accumulate = draw.choice((1, 2))
    parts = processes * accumulate
    sizes = [size for size in range(8, 17) if not size % parts]
    options: dict[str, object] = {
        "arch": arch,
        "preset": preset,
        "bit": draw.choice((2, 3, 4, 5, 32)),
        "epochs": draw.choice((2, 2, 3)),
        "batch_size": draw.choice(sizes),
        "accumulate": accumulate,
        "amp": draw.choice(("off", "off", "bf16")),
        "checkpoint_every": draw.choice((0, 0, 1, 3, 5)),
        "lr": 0.02,
        "seed": draw.randrange(1000),
        "crop_padding": 1,
        # a mobilenet's last features would be one pixel, and one image of one pixel has no variance
        "image_size": 40 if arch.startswith("mobilenet") else 8,
        "test_batch_size": draw.choice((5, 21)),
        "histogram_every": draw.choice((0, 0, 0, 0, 2)),
    }
    for name, value in _SWITCHES.items():
        if draw.random() < 0.25:
            options[name] = value
    if draw.random() < 0.5:
        options |= {"ema_decay": 0.8, "bn_batches": 2}
    if processes > 1 and draw.random() < 0.3:
        options["sync_bn"] = True
    starts = draw.random() < 0.3
    return Run(processes, images, workers, starts, options)


_SWITCHES: dict[str, object] = {
    "mixup": 0.4,
    "cutout": 3,
    "label_smoothing": 0.1,
    "dampening": 1e-4,
    "freeze_weights_from": 0.6,
    "val_split": 0.2,
    "schedule": "cosine",
    "threshold_init": "mse",
    "weight_per_channel": True,
    "skip_nonfinite": 2,
    "distill_weight": 0.5,
}


def draw_faults(seed: int, run: Run) -> list[Fault]:
    """The faults of a seed, in their order."""
    draw = random.Random(f"faults {seed}")
    kinds = [KILL_ALL, TERM_ALL, INT, INT_GROUP, INT_TWICE, FULL_DISK]
    kinds += [KILL, KILL, TERM] if run.processes > 1 else []
    kinds += [LOST_WORKER] * 3 if run.workers else []
    faults = []
    for _ in range(draw.choice((2, 3, 3))):
        faults.append(draw.choice(kinds))
        if draw.random() < 0.4:
            faults.append(draw.choice(BETWEEN))
    return [
        Fault(kind, draw.randrange(run.processes), draw.random() < 0.5, draw.uniform(0, 0.9), draw.random())
        for kind in faults
    ]
