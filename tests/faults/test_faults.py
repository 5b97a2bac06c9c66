"""Random runs under random faults end with the bits of the runs undisturbed: python -m pytest -m slow -s tests/faults.

APOT_FAT_FAULT_SEEDS: how many seeds (default 60), or FIRST:END.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.launcher import Launcher
from tests.faults.networks import small_network
from tests.faults.trial import Trial

SEEDS = os.environ.get("APOT_FAT_FAULT_SEEDS", "60").rpartition(":")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with small_network(), Launcher(tmp_path_factory.mktemp("disk")) as started:
        yield started


@pytest.mark.parametrize("seed", [0, 1])
def test_a_disturbed_run_ends_with_the_same_bits(seed: int, launcher: Launcher, tmp_path: Path) -> None:
    Trial(seed, launcher, tmp_path).check()


@pytest.mark.slow
def test_many_disturbed_runs_end_with_the_same_bits(launcher: Launcher, tmp_path: Path) -> None:
    failed, counted = [], Counter[str]()
    for seed in range(int(SEEDS[0] or 0), int(SEEDS[2])):
        start = time.monotonic()
        trial = Trial(seed, launcher, tmp_path / str(seed))
        try:
            trial.check()
            outcome = "same bits"
            counted.update(["runs"] + [fault.partition(" before")[0].partition(" at ")[0] for fault in trial.had])
        except Exception as error:
            failed.append(seed)
            outcome = f"FAILED {trial.folder}: {str(error)[-1500:]}"
        print(
            f"seed {seed}: {trial.run}; {', '.join(trial.had)}; {time.monotonic() - start:.0f} s; {outcome}", flush=True
        )
    print(f"{counted.pop('runs', 0)} runs, {counted.total()} faults: {dict(counted)}")
    assert not failed
