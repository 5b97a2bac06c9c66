"""Random runs under random faults end with the bits of the runs undisturbed: python -m pytest -m slow -s tests/faults.

APOT_FAT_FAULT_SEEDS: how many seeds (by default 60), or FIRST:END.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.draws import FULL_DISK, LOST_WORKER, STREAM, Fault, Run, draw_faults, draw_run
from tests.faults.launcher import Launcher
from tests.faults.networks import SMALL, small_network
from tests.faults.trial import Trial

SEEDS = os.environ.get("APOT_FAT_FAULT_SEEDS", "60").rpartition(":")
SHORT = {"arch": SMALL, "bit": 4, "epochs": 2, "batch_size": 16, "checkpoint_every": 3, "image_size": 8}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with small_network(), Launcher(tmp_path_factory.mktemp("disk")) as started:
        yield started


@pytest.mark.parametrize("seed", [0])
def test_a_disturbed_run_ends_with_the_same_bits(seed: int, launcher: Launcher, tmp_path: Path) -> None:
    run = draw_run(seed)
    trial = Trial(run, draw_faults(seed, run), launcher, tmp_path)
    trial.check()
    assert trial.had


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        pytest.param(
            Run(images=STREAM, workers=2, options=SHORT),
            Fault(LOST_WORKER, moment=0.5, at_file=True),
            marks=pytest.mark.slow,
        ),
        (Run(processes=2, options=SHORT), Fault(FULL_DISK, moment=0.5, at_file=True)),
    ],
)
def test_what_a_run_lacks_is_said_in_one_line(run: Run, fault: Fault, launcher: Launcher, tmp_path: Path) -> None:
    trial = Trial(run, [fault], launcher, tmp_path)
    trial.check()
    assert trial.had == [fault]


@pytest.mark.slow
def test_many_disturbed_runs_end_with_the_same_bits(launcher: Launcher, tmp_path: Path) -> None:
    failed, counted = [], Counter[str]()
    for seed in range(int(SEEDS[0] or 0), int(SEEDS[2])):
        start, run = time.monotonic(), draw_run(seed)
        trial = Trial(run, draw_faults(seed, run), launcher, tmp_path / str(seed))
        try:
            trial.check()
            outcome = "same bits"
            counted.update(["runs", *(fault.kind for fault in trial.had)])
        except Exception as error:
            failed.append(seed)
            outcome = f"FAILED, logs in {trial.folder}: {str(error)[-1500:]}"
        faults = ", ".join(map(str, trial.had))
        print(f"seed {seed}: {run}; {faults}; {time.monotonic() - start:.0f} s; {outcome}", flush=True)
    print(f"{counted.pop('runs', 0)} runs, {counted.total()} faults: {dict(counted)}")
    assert not failed
