from __future__ import annotations

from pathlib import Path

import pytest

from apot_fat.reporting import draw_against_seconds, draw_sweep, seeds_table, sweep_table
from apot_fat.training.results import ResultRow, read_results, write_results

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
STORED = """\
recipe,method,bits,seed,epochs,top1,best,val_top1,seconds
published,apot-cifar,4,0,2,90.000,90.500,89.000,10.00
published,apot-cifar,4,1,2,91.000,91.000,90.000,12.00
published,apot-cifar,3,0,2,88.000,88.000,87.000,10.00
ours,apot-cifar,4,0,1,92.000,92.000,91.000,6.00
ours,apot-cifar,4,1,1,92.500,92.500,91.500,6.50
ours,apot-cifar,3,0,1,87.500,88.000,88.000,6.00
ours,lsq,3,0,1,86.000,86.000,85.000,5.00
"""
TABLE = """\
| recipe | apot-cifar 4 | apot-cifar 3 | lsq 3 | mean gain | lowest gain |
| --- | --- | --- | --- | --- | --- |
| published | 90.50 ± 0.71 | 88.00 | – | – | – |
| ours | 92.25 ± 0.35 | 87.50 | 86.00 | +0.62 | -0.50 |"""
SEEDS = """\
| recipe | method | bits | epochs | mean | std | each seed | seconds |
| --- | --- | --- | --- | --- | --- | --- | --- |
| published | apot-cifar | 4 | 2 | 90.50 | 0.71 | 90.00, 91.00 | 11 |
| published | apot-cifar | 3 | 2 | 88.00 | – | 88.00 | 10 |
| ours | apot-cifar | 4 | 1 | 92.25 | 0.35 | 92.00, 92.50 | 6 |
| ours | apot-cifar | 3 | 1 | 87.50 | – | 87.50 | 6 |
| ours | lsq | 3 | 1 | 86.00 | – | 86.00 | 5 |"""


@pytest.fixture
def rows(tmp_path: Path) -> list[ResultRow]:
    (tmp_path / "stored.csv").write_text(STORED)
    return read_results(tmp_path / "stored.csv")


def test_tables_are_those_of_the_stored_results(rows: list[ResultRow], tmp_path: Path) -> None:
    assert sweep_table(rows) == TABLE
    assert seeds_table(rows) == SEEDS
    write_results(rows, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == STORED
    assert draw_sweep(rows, tmp_path / "results.png").stat().st_size > 1000
    assert draw_against_seconds(rows, tmp_path / "seconds.png").stat().st_size > 1000


def test_the_published_tables_are_those_of_the_stored_results() -> None:
    stored = read_results(CHECKPOINTS / "cifar10_ablation.csv")
    text = (CHECKPOINTS / "README.md").read_text(encoding="utf-8")
    for table in (sweep_table(stored), sweep_table(stored, measure="val_top1"), seeds_table(stored)):
        assert table in text


def test_by_another_measure_and_baseline(rows: list[ResultRow]) -> None:
    assert "| published | 89.50 ± 0.71 | 87.00 | – | -1.38 | -1.75 |" in sweep_table(rows, "ours", "val_top1")
    with pytest.raises(ValueError, match="baseline 'theirs': choose one of published, ours"):
        sweep_table(rows, "theirs")
    with pytest.raises(ValueError, match="measure 'top5': choose one of top1, best, val_top1"):
        sweep_table(rows, measure="top5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column recipe, method, bits, seed, epochs, top1, seconds"),
        (STORED.replace("90.000", "high"), "line 2: a value that is no number"),
    ],
)
def test_stored_results_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(path)
