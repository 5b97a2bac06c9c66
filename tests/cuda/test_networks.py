"""Networks on a CUDA device that is not there: no tensor is on the wrong device, nothing waits within a step, and what
comes out is what the CPU computes, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apot_fat.data import Batch, Batches
from apot_fat.quant.fast import layer_output
from apot_fat.training.averaging import WeightAverage
from apot_fat.training.build import make_batches
from apot_fat.training.loop import evaluate
from apot_fat.training.optim import make_optimizer
from tests.cuda import works
from tests.fake_cuda import CPU, DEVICE, FakeCuda, fake_cuda

slow = pytest.mark.slow
CIFAR, IMAGENET = ("apot-cifar", "fat-cifar"), ("apot-imagenet", "fat-imagenet")
UNIFORM = "apot-imagenet-uniform"
PRESETS = {arch: (*(CIFAR if size == 8 else IMAGENET), UNIFORM) for arch, size in works.SIZES.items()}
QUICK = {("resnet20", preset, "bf16") for preset in PRESETS["resnet20"]} | {
    ("resnet20", preset, "off") for preset in CIFAR
}
QUICK |= {("vgg_small", "apot-cifar", "off"), ("resnet18", "apot-imagenet", "off")}
QUICK |= {("mobilenet_v2_x0_35", "fat-imagenet", "bf16")}


def compare(work: Callable[[torch.device, Path], works.Found], folder: Path) -> None:
    """A work on the fake device gives what it gives on the CPU."""
    places = folder / "cpu", folder / "cuda"
    for place in places:
        place.mkdir()
    expected = work(CPU, places[0])
    with fake_cuda():
        found = work(DEVICE, places[1])
    assert found.keys() == expected.keys()
    for name in expected:
        assert same(found[name], expected[name]), f"{name}: {found[name]} and {expected[name]}"


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return bool(torch.equal(found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize(
    ("arch", "preset", "amp"),
    [
        pytest.param(arch, preset, amp, marks=() if (arch, preset, amp) in QUICK else slow)
        for arch, presets in PRESETS.items()
        for preset in presets
        for amp in ("off", "bf16")
    ],
)
def test_training(tmp_path: Path, arch: str, preset: str, amp: str) -> None:
    values = {} if arch == "resnet20" else {"batch_size": 12}  # one step
    compare(lambda device, _: works.training(device, arch, preset, amp=amp, **values), tmp_path)


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("apot-cifar", {"weight_per_channel": True}),
        ("apot-imagenet-pot", {"amp": "fp16"}),
        pytest.param("fat-cifar", {"threshold_init": "mse"}, marks=slow),
        pytest.param("lsq", {}, marks=slow),
        pytest.param("pact", {}, marks=slow),
    ],
)
def test_training_otherwise(tmp_path: Path, preset: str, values: dict[str, Any]) -> None:
    compare(lambda device, _: works.training(device, "vgg_tiny", preset, **values), tmp_path)


@pytest.mark.parametrize("preset", ["apot-cifar", "lsq"])  # with bytes for the levels, and without
def test_training_that_remembers_inputs(tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_output, "REMEMBER_ELEMENTS", 0)
    compare(lambda device, _: works.training(device, "vgg_tiny", preset), tmp_path)


@pytest.mark.parametrize(
    ("arch", "preset", "overrides"),
    [
        ("vgg_tiny", "fat-cifar", {"weight_per_channel": True}),
        ("vgg_tiny", "apot-cifar", {}),
        pytest.param("vgg_small", "apot-imagenet-uniform", {}, marks=slow),
        pytest.param("resnet18", "fat-imagenet", {}, marks=slow),
        pytest.param("mobilenet_v2_x0_35", "fat-imagenet", {}, marks=slow),
    ],
)
def test_what_is_looked_at_and_written(tmp_path: Path, arch: str, preset: str, overrides: dict[str, Any]) -> None:
    def work(device: torch.device, folder: Path) -> works.Found:
        looked_at, written = folder / "looks", folder / "files"
        written.mkdir()
        return works.looks(device, looked_at, arch, preset, **overrides) | works.files(
            device, written, arch, preset, **overrides
        )

    compare(work, tmp_path)
    for name in ("cpu", "cuda"):
        assert b"cuda" not in (tmp_path / name / "files" / "checkpoint").read_bytes()  # any machine reads it


@pytest.mark.parametrize("method", ["apot", "fat", "uniform"])
def test_conversion(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_output, "REMEMBER_ELEMENTS", 0)
    compare(lambda device, folder: works.conversion(device, folder, method), tmp_path)


@slow  # test_reached.py runs it, without comparing
@pytest.mark.parametrize("method", ["apot", "fat"])
def test_a_network_is_reconstructed(method: str, tmp_path: Path) -> None:
    compare(lambda device, folder: works.reconstruction(device, folder, method), tmp_path)


def test_batches_of_files(tmp_path: Path) -> None:
    compare(works.streamed, tmp_path)


def test_a_step_that_cannot_be_made(tmp_path: Path) -> None:
    compare(lambda device, _: works.non_finite(device), tmp_path)


class _Watched:
    """Batches, and how often the device had been waited for when each was asked for."""

    def __init__(self, batches: Batches, fake: FakeCuda) -> None:
        self.batches, self.fake = batches, fake
        self.before: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    @property
    def steps(self) -> int:
        return self.batches.steps

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.before.append(len(self.fake.waits))
            yield batch


@pytest.mark.usefixtures("fake")
def test_evaluation_multiplies_without_tf32_and_leaves_it_to_training() -> None:
    run, cudnn, seen = works.config("resnet20", "apot-cifar"), torch.backends.cudnn, []
    model = works.network(DEVICE, run.arch, "apot-cifar")
    model.register_forward_pre_hook(lambda *_: seen.append(cudnn.allow_tf32))
    assert cudnn.allow_tf32  # PyTorch's own choice
    evaluate(model, make_batches(run, works.images(run.arch), DEVICE))
    assert seen
    assert not any(seen)
    assert cudnn.allow_tf32


@pytest.mark.parametrize(("preset", "amp"), [("apot-cifar", "off"), (UNIFORM, "bf16"), ("fat-cifar", "off")])
def test_no_step_waits_for_the_device(fake: FakeCuda, preset: str, amp: str) -> None:
    run = works.config("resnet20", preset, amp=amp, batch_size=2)
    model = works.network(DEVICE, run.arch, preset)
    optimizer = make_optimizer(model, run)
    WeightAverage(model, 0.9, optimizer)
    batches = _Watched(make_batches(run, works.images(run.arch), DEVICE, training=True), fake)
    works.epoch(model, run, batches, optimizer, every=2)  # three looks at what was left out
    second, last = batches.before[1], batches.before[-1]  # in the first the tables of levels are made
    assert len(batches.before) == 6
    assert fake.waits[second:last] == []
