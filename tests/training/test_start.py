"""How a run begins: reconstructed from the network before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apot_fat.checkpoint import read_checkpoint
from apot_fat.data import Dataset, ImageSet
from apot_fat.quant.convert import Reconstruction
from apot_fat.training import TrainConfig, train
from apot_fat.training.build import load_config_dataset, unlabelled_images
from apot_fat.training.folder import BEST, LAST, RunSummary

CPU = torch.device("cpu")
DIGITS: dict[str, Any] = {
    "batch_size": 32,
    "schedule": "cosine",
    "flip": False,
    "crop_padding": 1,
    "histogram_every": 0,
}
STILL = {"lr": 1e-30, "act_alpha_lr": 1e-30, "weight_alpha_lr": 1e-30, "epochs": 1, "bn_batches": 40}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "apot_fat.training.start.Reconstruction", lambda seed: Reconstruction(steps=15, joint_steps=40, seed=seed)
    )
    monkeypatch.setattr("apot_fat.training.build.MORE_VIEWS", 1)


def learned(arch: str, output: Path) -> RunSummary:
    """A float network that has learned the digits."""
    return train(TrainConfig(arch=arch, bit=32, epochs=5, **DIGITS, output=str(output)))


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """One of three convolutions."""
    return learned("vgg_tiny", tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """One of twenty, which rounding moves further."""
    return learned("resnet20", tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def few() -> Dataset:
    """Every fifth of the digits."""
    whole = load_config_dataset(TrainConfig())
    assert isinstance(whole.train, ImageSet)
    assert isinstance(whole.test, ImageSet)
    train, test = (images.subset(torch.arange(len(images)) % 5 == 0) for images in (whole.train, whole.test))
    return replace(whole, train=train, test=test)


def config(source: RunSummary, output: Path, **values: Any) -> TrainConfig:
    settings = {**DIGITS, "arch": source.arch, "bit": 3, "threshold_init": "mse", "init": str(source.folder / BEST)}
    return TrainConfig(**{**settings, "output": str(output), **values})


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["apot-cifar", "fat-cifar"])
def test_a_run_begins_close_to_the_network_before_it(deep: RunSummary, tmp_path: Path, preset: str) -> None:
    assert deep.best > 90
    # batch norms learn from the epoch's images, so that only the average, estimated on them, is the start's
    options = {**STILL, "bit": 2, "preset": preset, "ema_decay": 0.5}
    before = train(config(deep, tmp_path / "before", **options))
    after = train(config(deep, tmp_path / "after", reconstruct=256, **options))
    assert after.best > deep.best - 6
    assert after.best > before.best + 3


@pytest.mark.slow
def test_a_stage_begins_from_one_of_other_bits(deep: RunSummary, tmp_path: Path) -> None:
    four = train(config(deep, tmp_path, bit=4, reconstruct=256, **STILL))
    three = train(config(four, tmp_path, reconstruct=256, **STILL))
    assert three.best > deep.best - 6


def test_it_is_not_begun_twice_and_goes_on_to_the_same_bits(
    fp32: RunSummary, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps = Reconstruction(steps=3, joint_steps=4)
    monkeypatch.setattr("apot_fat.training.start.Reconstruction", lambda seed: replace(few_steps, seed=seed))
    states = []
    for name, epochs in (("whole", (2,)), ("resumed", (1, 2))):
        for count in epochs:
            values = {"reconstruct": 64, "epochs": count, "lr": 0.01, "schedule": "step"}
            run = train(config(fp32, tmp_path / name, **values), resume="auto", dataset=few)
        states.append(read_checkpoint(run.folder / LAST)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_images_are_some_of_the_training_images_and_no_more_than_there_are(tmp_path: Path) -> None:
    run = TrainConfig(output=str(tmp_path), flip=False, crop_padding=0)
    images = load_config_dataset(run).train
    assert images is not None
    some, again = (torch.cat(unlabelled_images(run, images, 50, CPU, augmented=False)) for _ in range(2))
    assert len(some) == 50
    assert torch.equal(some, again)
    views = torch.cat(unlabelled_images(run, images, 50, CPU))
    assert len(views) == 100
    assert torch.equal(torch.unique(views, dim=0), torch.unique(some, dim=0))  # nothing is cropped or mirrored
    cropped = torch.cat(unlabelled_images(TrainConfig(output=str(tmp_path)), images, 50, CPU))
    assert torch.equal(cropped[:50], some)
    assert len(torch.unique(cropped, dim=0)) > 80
    everything = torch.cat(unlabelled_images(run, images, 10_000, CPU, augmented=False))
    assert len(everything) == len(images)
    assert len(torch.unique(everything, dim=0)) > 1_400


def test_a_network_of_other_classes_gives_all_but_its_last_layer(
    fp32: RunSummary, tiny_npz: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three = {**STILL, "data": str(tiny_npz[0]), "test_data": str(tiny_npz[1]), "batch_size": 16}
    with caplog.at_level("INFO", logger="apot_fat"):
        run = train(config(fp32, tmp_path, **three))
    assert "has 10 outputs, the data 3 classes: the last layer begins anew" in caplog.text
    start, trained = (read_checkpoint(folder / BEST)["state_dict"] for folder in (fp32.folder, run.folder))
    assert trained["classifier.linear2.weight"].shape == (3, 128)
    assert torch.equal(trained["features.conv1.weight"], start["features.conv1.weight"])
    with pytest.raises(ValueError, match=r"reconstruct 64: checkpoint .* has 10 outputs, the data 3 classes"):
        train(config(fp32, tmp_path / "other", reconstruct=64, **three))


def test_what_cannot_be_is_said(fp32: RunSummary, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reconstruct 64: name the network to come close to with --init"):
        TrainConfig(reconstruct=64)
    with pytest.raises(ValueError, match="reconstruct -1: expected an integer at least 0"):
        TrainConfig(reconstruct=-1)
    other = config(fp32, tmp_path, reconstruct=64, mean=(0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="normalised by other means"):
        train(other)
    assert train(config(fp32, tmp_path, bit=32, epochs=1, reconstruct=64)).bits == 32  # nothing to tune


def test_filters_are_balanced_before_a_start(fp32: RunSummary, few: Dataset, tmp_path: Path) -> None:
    teacher = {"teacher": str(fp32.folder / BEST), "distill_weight": 1.0, "distill_temperature": 16.0}

    def distance(name: str, **values: Any) -> float:
        run = train(config(fp32, tmp_path / name, **STILL, **teacher, **values), dataset=few)
        return float(read_checkpoint(run.folder / LAST)["history"][0]["train_loss"])

    balanced = {"balance_filters": True}
    assert distance("8", bit=8, **balanced) < distance("plain", bit=8)  # means of weights are most of it
    assert distance("tuned", bit=2, **balanced, reconstruct=256) < distance("2", bit=2, **balanced)


def test_filters_of_a_quantized_start_are_not_balanced(fp32: RunSummary, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="balance_filters: name the float network with --init"):
        TrainConfig(balance_filters=True)
    three = train(config(fp32, tmp_path, epochs=1))
    with pytest.raises(ValueError, match=r"balance_filters: .* has 3 bits; name a float network with --init"):
        train(config(three, tmp_path / "again", bit=2, balance_filters=True))


@pytest.mark.parametrize("options", [{"balance_filters": True}, {"reconstruct": 16}])
def test_a_float_vgg_of_ours_is_a_start_like_any(
    tiny_npz: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    images: dict[str, Any] = {"data": str(tiny_npz[0]), "test_data": str(tiny_npz[1]), "arch": "vgg_tiny", "epochs": 1}
    images |= {"batch_size": 16, "output": str(tmp_path), "compile": "off"}
    before = train(TrainConfig(bit=32, **images))  # whose convolutions have biases
    assert train(TrainConfig(bit=4, init=str(before.folder / "model_best.pth.tar"), **images, **options)).epochs == 1
