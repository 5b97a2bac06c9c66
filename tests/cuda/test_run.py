"""Whole runs on a CUDA device that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from apot_fat.checkpoint import save_packed
from apot_fat.models import create_model
from apot_fat.reporting import build_report, load_subjects
from tests.cuda import works
from tests.fake_cuda import CPU, DEVICE, FakeCuda, fake_cuda


@pytest.mark.parametrize("preset", ["apot-cifar", pytest.param("fat-cifar", marks=pytest.mark.slow)])
def test_a_run_is_the_cpus(tmp_path: Path, fake: FakeCuda, caplog: pytest.LogCaptureFixture, preset: str) -> None:
    expected = works.whole_run(CPU, tmp_path / "cpu", preset=preset)
    found = works.whole_run(DEVICE, tmp_path / "cuda", preset=preset)
    assert found["rows"] == expected["rows"]
    assert found["evaluated"] == expected["evaluated"]
    assert found["curves"] == expected["curves"]
    assert all(value.equal(expected["best"][name]) for name, value in found["best"].items())
    said = [record.message for record in caplog.records if record.name == "apot_fat"]
    assert said == []  # a board that cannot be drawn ends no run


def test_a_report_measures_accuracy_on_the_device(tmp_path: Path, tiny_npz: tuple[Path, Path]) -> None:
    save_packed(create_model("resnet20", bits=3, num_classes=3).eval(), tmp_path / "packed.safetensors")
    (subject,) = load_subjects(tmp_path / "packed.safetensors")

    def run() -> dict[str, object]:
        return build_report([subject], data=str(tiny_npz[1])).data["runs"][0]

    expected = run()
    with fake_cuda() as device:
        assert run() == expected
        assert any("training.loop" in wait for wait in device.waits), set(device.waits)
    assert {parameter.device for parameter in subject.model.parameters()} == {CPU}
