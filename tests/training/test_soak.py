"""Half an hour of training with a checkpoint a second: python -m pytest -m slow -s tests/training/test_soak.py."""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path

import pytest

from apot_fat.checkpoint import read_checkpoint
from apot_fat.training import TrainConfig, train
from apot_fat.training.folder import LAST

MINUTES = float(os.environ.get("APOT_FAT_SOAK_MINUTES", "30"))


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(tmp_path: Path) -> None:
    samples: list[tuple[float, float, int]] = []
    done = threading.Event()
    start = time.perf_counter()

    def sample() -> None:
        while not done.wait(1):
            samples.append((time.perf_counter() - start, resident_mib(), open_files()))

    thread = threading.Thread(target=sample)
    thread.start()
    runs = 0
    files_before = open_files()
    try:
        while time.perf_counter() - start < 60 * MINUTES:
            arch = ("resnet20", "resnet_20")[runs % 2]
            config = TrainConfig(
                arch=arch, bit=4, epochs=3, lr=0.05, output=str(tmp_path / str(runs)), checkpoint_every=8, compile="off"
            )
            train(config)
            runs += 1
            assert read_checkpoint(tmp_path / str(runs - 1) / config.run_name / LAST)["epoch"] == 3
    finally:
        done.set()
        thread.join()
    assert not list(tmp_path.rglob("*.tmp"))
    assert open_files() <= files_before
    tenth = len(samples) // 10
    rows = [samples[i : i + tenth] for i in range(0, tenth * 10, tenth)]
    print(f"\n{runs} runs, minute: resident MiB, open files")
    medians = [(statistics.median(r[1] for r in row), statistics.median(r[2] for r in row)) for row in rows]
    for row, (memory, files) in zip(rows, medians, strict=True):
        print(f"{row[-1][0] / 60:5.1f}: {memory:7.1f} {files:4.0f}")
    assert medians[-1][0] < 1.05 * medians[2][0]
    assert max(files for _, files in medians[2:]) <= min(files for _, files in medians[2:]) + 2
