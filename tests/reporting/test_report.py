from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from apot_fat.reporting import draw_runs, find_runs, runs_table
from apot_fat.text import aligned

if TYPE_CHECKING:
    from tests.reporting.conftest import Demo


def test_table_and_figure_of_an_output_folder(demo: Demo, tmp_path: Path) -> None:
    runs = find_runs(demo.output)
    assert [(run.method, run.bits) for run in runs] == [("fp32", 32), ("apot-cifar", 3), ("fat-cifar", 4)]
    lines = runs_table(runs).splitlines()
    assert len(lines) == 5
    assert all(word in lines[0] for word in ("bits", "last %", "best %", "thresholds", "seconds"))
    assert f"{runs[1].last:.2f}" in lines[3]
    figure = draw_runs(runs, tmp_path / "runs.png")
    with Image.open(figure) as image:
        assert image.size == (1320, 880)
    assert draw_runs(runs[:1], tmp_path / "fp32.png").exists()


def test_columns_are_aligned() -> None:
    table = aligned(("name", "value"), [("a", "1.5"), ("longer", "10.25")], left=("name",))
    assert table.splitlines() == ["name    value", "──────  ─────", "a         1.5", "longer  10.25"]
