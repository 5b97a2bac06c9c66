"""Tiny runs that the tests of reports share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from apot_fat.checkpoint import save_packed
from apot_fat.reporting.contents import Report, build_report
from apot_fat.reporting.subject import load_subjects
from apot_fat.training import TrainConfig, train


@dataclass(frozen=True)
class Demo:
    """A folder of runs (fp32, from it APoT 3 bits and FAT 4 bits), a packed file of the last, and a report of all."""

    output: Path
    packed: Path
    report: Report


@pytest.fixture(scope="session")
def demo(shared_npz: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Demo:
    output = tmp_path_factory.mktemp("runs")
    init = None
    for arch, bits in (("resnet20", 32), ("resnet20", 3), ("resnet_20", 4)):
        config = TrainConfig(
            arch=arch,
            bit=bits,
            epochs=2,
            batch_size=16,
            lr=0.02,
            data=str(shared_npz[0]),
            test_data=str(shared_npz[1]),
            output=str(output),
            init=init,
            histogram_every=0,
        )
        folder = train(config).folder
        init = init or str(folder / "model_best.pth.tar")
    subjects = load_subjects(output)
    packed = output / "fat.safetensors"
    save_packed(subjects[-1].model, packed)
    return Demo(output, packed, build_report([*subjects, *load_subjects(packed, group=1)]))
