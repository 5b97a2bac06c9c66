"""What it means that two runs are the same: helpers of the tests of interrupted runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apot_fat.checkpoint import read_checkpoint
from apot_fat.training.folder import BEST, LAST, METRICS

_TIMES_AND_PLACES = ("seconds", "output", "data", "test_data", "init", "teacher")


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, but for times and places."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in _TIMES_AND_PLACES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves."""
    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def assert_same_run(one: Path, other: Path, *, curves: bool = True) -> None:
    for name in (LAST, BEST):
        contents = [read_checkpoint(folder / name) for folder in (one, other)]
        for content in contents:
            assert content.pop("environment")["torch"] == torch.__version__
            for key in ("epochs", "checkpoint_every", "print_freq", "workers"):
                content["config"].pop(key, None)
        assert same(*contents), name
    rows = [[json.loads(line) for line in (folder / METRICS).read_text().splitlines()] for folder in (one, other)]
    assert same(*rows)
    assert [row["epoch"] for row in rows[0]] == list(range(1, len(rows[0]) + 1))
    if curves:
        assert scalars(one) == scalars(other)
