"""Run folders as an aligned table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from apot_fat.text import aligned
from apot_fat.training.folder import LAST, RunSummary, summarize

log = logging.getLogger("apot_fat")


def find_runs(output: Path) -> list[RunSummary]:
    """Summaries of all run folders in an output folder: by architecture as spelled, then from many bits to few.

    What cannot be read, or has finished no epoch, is left out with a warning.
    """
    summaries = []
    for path in sorted(output.glob(f"*/{LAST}")):
        try:
            summaries.append(summarize(path.parent))
        except ValueError as error:
            log.warning("not in the table: %s", error)
    return sorted(summaries, key=lambda run: (run.arch.count("_"), run.arch, -run.bits))


def runs_table(runs: Sequence[RunSummary]) -> str:
    """Network, method, bits, last and best top-1 (%), range of the clipping thresholds, epochs and seconds."""
    head = ("network", "method", "bits", "last %", "best %", "thresholds", "epochs", "seconds")
    rows = [
        (
            run.arch,
            run.method,
            str(run.bits),
            f"{run.last:.2f}",
            f"{run.best:.2f}",
            f"{min(run.thresholds):.3f} … {max(run.thresholds):.3f}" if run.thresholds else "–",
            str(run.epochs),
            f"{run.seconds:.1f}",
        )
        for run in runs
    ]
    return aligned(head, rows, left=("network", "method", "thresholds"))
