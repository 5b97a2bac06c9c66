"""Whole runs on a CUDA device that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda import works
from tests.fake_cuda import CPU, DEVICE, FakeCuda


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
