from __future__ import annotations

from pathlib import Path

from PIL import Image

from apot_fat.report import draw_runs, find_runs, runs_table
from apot_fat.text import aligned
from apot_fat.training import TrainConfig, train


def test_table_and_figure_of_an_output_folder(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    for arch, bits in (("resnet_20", 3), ("resnet20", 4), ("resnet20", 32)):
        train(
            TrainConfig(
                arch=arch, bit=bits, epochs=1, data=str(tiny_npz[0]), test_data=str(tiny_npz[1]), output=str(output)
            )
        )
    runs = find_runs(output)
    assert [(run.method, run.bits) for run in runs] == [("fp32", 32), ("apot-cifar", 4), ("fat-cifar", 3)]
    lines = runs_table(runs).splitlines()
    assert len(lines) == 5
    assert all(word in lines[0] for word in ("bits", "last %", "best %", "thresholds", "seconds"))
    assert f"{runs[1].last:.2f}" in lines[3]
    figure = draw_runs(runs, output / "runs.png")
    with Image.open(figure) as image:
        assert image.size == (1320, 880)
    assert draw_runs(runs[:1], output / "fp32.png").exists()


def test_columns_are_aligned() -> None:
    table = aligned(("name", "value"), [("a", "1.5"), ("longer", "10.25")], left=("name",))
    assert table.splitlines() == ["name    value", "──────  ─────", "a         1.5", "longer  10.25"]
