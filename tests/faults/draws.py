"""Random runs and random faults against them, each a function of one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.faults.networks import SMALL

IN_MEMORY, FOLDER, STREAM = "arrays", "folder", "stream"

DAMAGED, MOVED_OUTPUT, MOVED_DATA = "damaged checkpoint", "moved output", "moved data"
BETWEEN = (DAMAGED, MOVED_OUTPUT, MOVED_DATA)
"""Faults that come while no process runs."""
KILL, KILL_ALL = "SIGKILL to one", "SIGKILL to all"
TERM, TERM_ALL = "SIGTERM to one", "SIGTERM to all"
INT, INT_GROUP, INT_TWICE = "SIGINT to one", "SIGINT to the group", "SIGINT twice"
FULL_DISK, LOST_WORKER = "full disk", "lost worker"

_PRESETS = ("apot-cifar", "fat-cifar", "fat-cifar-log", "apot-imagenet-pot", "apot-imagenet-uniform", "lsq", "pact")
_LARGER = (("resnet20", "apot-cifar"), ("mobilenet_v2_x0_35", "uniform-mobilenet"))
_SWITCHES: dict[str, object] = {
    "label_smoothing": 0.1,
    "val_split": 0.2,
    "schedule": "cosine",
    "threshold_init": "mse",
    "weight_per_channel": True,
    "skip_nonfinite": 2,
    "distill_weight": 0.5,
}


@dataclass(frozen=True)
class Run:
    """A run, or a chain of two.

    Args:
        processes: how many.
        images: ``arrays``, ``folder`` or ``stream``.
        workers: decoding processes of each.
        is_chain: whether a 32-bit run comes first, which the other starts from, and learns from if it learns.
        has_parent: whether it starts from a network beside the images, as without a chain it learns from that.
        options: of the command line.
    """

    processes: int = 1
    images: str = IN_MEMORY
    workers: int = 0
    is_chain: bool = False
    has_parent: bool = False
    options: dict[str, object] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether it has a teacher."""
        return "distill_weight" in self.options

    @property
    def names(self) -> list[str]:
        """Of its run folders, in their order."""
        bits = ([32] if self.is_chain else []) + [self.options["bit"]]
        return [f"{self.options['arch']}_{number}bit" for number in bits]

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        images = f"{self.images}, {self.workers} workers" if self.images == STREAM else self.images
        kind = "chain, " if self.is_chain else "from a parent, " if self.has_parent else ""
        return f"{kind}{self.processes} processes, {images}, {options}"


@dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        kind: one of the names above.
        rank: of the process it befalls.
        moment: how far the processes have got, as a part of what is left of the run, [0, 1).
        at_file: whether it comes before that operation on a file, or at that time.
        amount: how much of the disk is left, or of the checkpoint, [0, 1).
    """

    kind: str
    rank: int = 0
    moment: float = 0.0
    at_file: bool = False
    amount: float = 0.0

    def __str__(self) -> str:
        if self.kind in BETWEEN:
            return self.kind
        return f"{self.kind} {'at a file' if self.at_file else 'at'} {self.moment:.2f}"


def draw_run(seed: int) -> Run:
    """The run of a seed."""
    draw = random.Random(seed)
    arch, preset = draw.choice(_LARGER) if draw.random() < 0.15 else (SMALL, draw.choice(_PRESETS))
    is_chain = draw.random() < 0.2
    processes = draw.choice((1, 2) if is_chain else (1, 1, 2, 2, 3, 4))
    accumulate = draw.choice((1, 2))
    images = draw.choice((IN_MEMORY, FOLDER, STREAM))
    options: dict[str, object] = {
        "arch": arch,
        "preset": preset,
        "bit": draw.choice((2, 3, 4, 5) if is_chain else (2, 3, 4, 5, 32)),
        "epochs": draw.choice((2, 2, 3)),
        "batch_size": draw.choice([size for size in range(8, 17) if size % (processes * accumulate) == 0]),
        "accumulate": accumulate,
        "amp": draw.choice(("off", "off", "bf16", "fp16")),
        "checkpoint_every": draw.choice((0, 0, 1, 3, 5)),
        "seed": draw.randrange(1000),
        # a mobilenet's last features would be one pixel, and one image of one pixel has no variance
        "image_size": 40 if arch.startswith("mobilenet") else 8,
        "test_batch_size": draw.choice((5, 21)),
        "histogram_every": draw.choice((0, 0, 0, 0, 2)),
        **{name: value for name, value in _SWITCHES.items() if draw.random() < 0.25},
    }
    if draw.random() < 0.5:
        options |= {"ema_decay": 0.8, "bn_batches": 2}
    if processes > 1 and draw.random() < 0.3:
        options["sync_bn"] = True
    workers = draw.choice((0, 1, 2)) if images == STREAM else 0
    return Run(processes, images, workers, is_chain, draw.random() < 0.3, options)


def draw_faults(seed: int, run: Run) -> list[Fault]:
    """The faults of a seed, in their order."""
    draw = random.Random(f"faults {seed}")
    kinds = [KILL_ALL, TERM_ALL, INT, INT_GROUP, INT_TWICE, FULL_DISK]
    kinds += [KILL, KILL, TERM] if run.processes > 1 else []
    kinds += [LOST_WORKER] * 3 if run.workers else []
    faults = []
    for _ in range(3):
        faults.append(draw.choice(kinds))
        if draw.random() < 0.4:
            faults.append(draw.choice(BETWEEN))
    return [
        Fault(kind, draw.randrange(run.processes), draw.uniform(0, 0.9), draw.random() < 0.5, draw.random())
        for kind in faults
    ]
