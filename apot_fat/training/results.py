"""Results of a sweep as CSV: one row a run."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from apot_fat.checkpoint import atomic_write


@dataclass(frozen=True)
class ResultRow:
    """One finished run of a sweep; the columns of the CSV.

    Args:
        recipe, method, bits, seed: which one; the published recipe is ``published``, ours ``ours``.
        epochs: trained.
        top1: on the test images after the last epoch, %.
        best: on the test images at the best epoch, %: the best test epoch, as published, or with held-out images the
            one best on those.
        val_top1: on the held-out training images after the last epoch, %; None where none were held out.
        seconds: training and evaluation, wall time.
    """

    recipe: str
    method: str
    bits: int
    seed: int
    epochs: int
    top1: float
    best: float
    val_top1: float | None
    seconds: float


def write_results(rows: Sequence[ResultRow], path: str | os.PathLike[str]) -> None:
    """Write rows as CSV, atomically."""
    with atomic_write(Path(path)) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in rows:
            values = asdict(row) | {"seconds": f"{row.seconds:.2f}"}
            for name in ("top1", "best", "val_top1"):
                values[name] = "" if values[name] is None else f"{values[name]:.3f}"
            writer.writerow([values[name] for name in _COLUMNS])


def read_results(path: str | os.PathLike[str]) -> list[ResultRow]:
    """The rows of a CSV that ``write_results`` wrote; more columns are ignored.

    Raises:
        ValueError: no such file, a column that is missing, or a value that is no number.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            found = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"results {path}: not readable as CSV") from error
    missing = [name for name in _COLUMNS if name not in columns and name not in ("best", "val_top1")]
    if missing:
        raise ValueError(f"results {path}: no column {', '.join(missing)}; expected {','.join(_COLUMNS)}")
    rows = []
    for number, cells in enumerate(found, start=2):
        try:
            rows.append(
                ResultRow(
                    cells["recipe"],
                    cells["method"],
                    int(cells["bits"]),
                    int(cells["seed"]),
                    int(cells["epochs"]),
                    float(cells["top1"]),
                    float(cells.get("best") or cells["top1"]),
                    float(cells["val_top1"]) if cells.get("val_top1") else None,
                    float(cells["seconds"]),
                )
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"results {path}: line {number}: a value that is no number") from error
    return rows


_COLUMNS = tuple(column.name for column in fields(ResultRow))
