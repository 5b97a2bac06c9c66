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


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two contents are not equal to the bit, but for times and places."""
    if isinstance(a, dict) and isinstance(b, dict):
        lacking = [f"{where}.{key} in one alone" for key in a.keys() ^ b.keys()]
        both = [key for key in a if key in b and key not in _TIMES_AND_PLACES]
        return lacking + [found for key in both for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{where}[{i}]")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{where}: {int((a != b).sum())} of {a.numel()}"]
    return [] if a == b else [f"{where}: {a!r:.100} and {b!r:.100}"]


def assert_same(a: Any, b: Any, where: str) -> None:
    found = differences(a, b, where)
    assert not found, f"{len(found)} differences: {'; '.join(found[:5])}"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves."""
    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def assert_same_run(one: Path, other: Path, *, curves: bool = True) -> None:
    for name in (LAST, BEST):
        a, b = (read_checkpoint(folder / name) for folder in (one, other))
        for content in (a, b):
            assert content.pop("environment")["torch"] == torch.__version__
            for key in ("epochs", "checkpoint_every", "print_freq", "workers"):
                content["config"].pop(key, None)
        assert_same(a, b, name)
    rows, others = ([json.loads(line) for line in (run / METRICS).read_text().splitlines()] for run in (one, other))
    assert_same(rows, others, METRICS)
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    if curves:
        assert_same(scalars(one), scalars(other), "curves")
