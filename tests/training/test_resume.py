"""A run and what it reads may move; other images, or another teacher, are not the same run."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apot_fat.checkpoint import before as checkpoint_before
from apot_fat.checkpoint import read_checkpoint, write_checkpoint
from apot_fat.data import ImageSet, load_dataset
from apot_fat.evaluation import evaluate
from apot_fat.models import create_model
from apot_fat.reporting.subject import Images, load_images, load_subjects, read_once
from apot_fat.training import TrainConfig, train, train_chain
from apot_fat.training.folder import BEST, LAST, METRICS
from apot_fat.training.recipe import read_recipe


def chain(folder: Path, data: tuple[Path, Path], epochs: int) -> list[float]:
    """The last loss of each stage of a chain that learns from its first."""
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(
        'arch = "vgg_tiny"\nbatch_size = 16\ncrop_padding = 1\nlr = 0.01\nchain = [32, 4]\n'
        "[bits.4]\nteacher = 'fp32'\ndistill_weight = 0.5\n"
    )
    given = {"data": str(data[0]), "test_data": str(data[1]), "output": str(folder), "epochs": epochs}
    read = read_recipe(recipe)
    summaries = train_chain(read, read.chain, given)
    return [read_checkpoint(run.folder / LAST)["history"][-1]["test_loss"] for run in summaries]


def test_a_moved_chain_with_moved_images_is_finished_or_goes_on(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    whole = chain(tmp_path / "whole", tiny_npz, 2)
    chain(tmp_path / "one", tiny_npz, 2)
    four = tmp_path / "one/vgg_tiny_4bit" / LAST
    content = read_checkpoint(four)
    shutil.move(tmp_path / "one", tmp_path / "two")
    moved = [Path(shutil.copy(path, tmp_path / f"moved_{path.name}")) for path in tiny_npz]
    assert chain(tmp_path / "two", (moved[0], moved[1]), 2) == whole  # finished: skipped
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "two/vgg_tiny_32bit", parts / "vgg_tiny_32bit")
    config = TrainConfig.from_dict(content["config"] | {"output": str(parts), "epochs": 1})
    train(TrainConfig.from_dict(config.to_dict() | {"init": str(tmp_path / "two/vgg_tiny_32bit/model_best.pth.tar")}))
    assert chain(parts, (moved[0], moved[1]), 2)[1] == whole[1]


@pytest.fixture
def short(tiny_npz: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """A run of an epoch that learns from a teacher and starts from it."""
    for name, seed in (("teacher", 0), ("other", 1)):
        torch.manual_seed(seed)
        model = create_model("vgg_tiny", bits=32, num_classes=3)
        write_checkpoint({"state_dict": model.state_dict()}, tmp_path / f"{name}.pth")
    teacher = str(tmp_path / "teacher.pth")
    given: dict[str, Any] = {"data": str(tiny_npz[0]), "test_data": str(tiny_npz[1]), "output": str(tmp_path / "out")}
    given |= {"arch": "vgg_tiny", "epochs": 1, "bit": 4, "batch_size": 16, "crop_padding": 1, "lr": 0.01}
    given |= {"init": teacher, "teacher": teacher, "distill_weight": 0.5}
    train(TrainConfig(**given))
    return {**given, "epochs": 2}


def test_other_content_is_not_the_same_run(
    short: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with np.load(short["data"]) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    other = str(tmp_path / "other.npz")
    np.savez(other, images=images ^ 1, labels=labels)
    before = (tmp_path / "out/vgg_tiny_4bit" / LAST).read_bytes()
    for name, value in (
        ("data", other),
        ("teacher", str(tmp_path / "other.pth")),
        ("init", str(tmp_path / "other.pth")),
    ):
        with pytest.raises(ValueError, match=f"{name} '{value}' does not hold what the run began with; give that"):
            train(TrainConfig(**{**short, name: value}), resume="auto")
    with pytest.raises(ValueError, match=r"was run with init = .*, not None; give that value"):
        train(TrainConfig(**{**short, "init": None}), resume="auto")
    shutil.copy(other, short["data"])  # at the same place
    with pytest.raises(ValueError, match="does not hold what the run began with"):
        train(TrainConfig(**short), resume="auto")
    assert (tmp_path / "out/vgg_tiny_4bit" / LAST).read_bytes() == before
    np.savez(short["data"], images=images, labels=labels)
    start = str(tmp_path / "start.pth")
    shutil.copy(short["init"], start)
    with pytest.raises(ValueError, match="was run with init"):  # gone, and its place is another
        train(TrainConfig(**{**short, "init": str(tmp_path / "absent.pth")}), resume="auto")
    train(TrainConfig(**{**short, "init": start}), resume="auto")
    Path(start).write_bytes(Path(tmp_path / "other.pth").read_bytes())
    train(TrainConfig(**{**short, "init": start, "epochs": 3}), resume="auto")
    assert "start.pth is not what it was when" in caplog.text
    Path(start).unlink()
    assert train(TrainConfig(**{**short, "init": start, "epochs": 4}), resume="auto").epochs == 4


@pytest.mark.parametrize("loader", ["memory", "stream"])
def test_a_moved_folder_of_images_is_the_same_and_one_with_another_image_is_not(tmp_path: Path, loader: str) -> None:
    for part in ("train", "test"):
        for number in range(6):
            (tmp_path / "a" / part / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "a" / part / f"class{number % 2}" / f"{number}.png")
    given: dict[str, Any] = {"arch": "vgg_tiny", "bit": 32, "batch_size": 3, "crop_padding": 1, "lr": 0.01}
    given |= {"loader": loader, "workers": 0, "image_size": 8, "output": str(tmp_path / "out")}
    train(TrainConfig(**given, data=str(tmp_path / "a"), epochs=1))
    shutil.move(tmp_path / "a", tmp_path / "b")
    train(TrainConfig(**given, data=str(tmp_path / "b"), epochs=2), resume="auto")
    (tmp_path / "b/train/class0/0.png").rename(tmp_path / "b/train/class0/00.png")
    (tmp_path / "b/train/class0/2.png").unlink()
    with pytest.raises(ValueError, match=r"data '.*b' does not hold what the run began with"):
        train(TrainConfig(**given, data=str(tmp_path / "b"), epochs=3), resume="auto")


def test_a_checkpoint_of_before_names_its_places(short: dict[str, Any], tmp_path: Path) -> None:
    last = tmp_path / "out/vgg_tiny_4bit" / LAST
    content = read_checkpoint(last)
    del content["sources"]
    write_checkpoint(content, last)
    moved = shutil.copy(short["data"], tmp_path / "moved.npz")
    with pytest.raises(ValueError, match="was run with data"):
        train(TrainConfig(**{**short, "data": str(moved)}), resume="auto")
    assert train(TrainConfig(**short), resume="auto").epochs == 2


def one(tiny_npz: tuple[Path, Path], output: Path, **values: Any) -> TrainConfig:
    given: dict[str, Any] = {"data": str(tiny_npz[0]), "test_data": str(tiny_npz[1]), "output": str(output)}
    given |= {"arch": "vgg_tiny", "bit": 4, "batch_size": 16, "crop_padding": 1, "lr": 0.01, "schedule": "cosine"}
    return TrainConfig(**{**given, **values})


def test_a_finished_cosine_goes_on_and_says_so_and_an_unfinished_one_keeps_its_end(
    tiny_npz: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(one(tiny_npz, tmp_path, epochs=1))
    assert train(one(tiny_npz, tmp_path, epochs=2), resume="auto").epochs == 2
    assert "cosine schedule depends on: goes on as one of 2 would from here" in caplog.text
    last = tmp_path / "vgg_tiny_4bit" / LAST
    content = read_checkpoint(last)
    rates = content["history"][1]["lr"]  # of the last of six steps
    assert rates["weights"] == pytest.approx(0.01 * (1 + math.cos(math.pi * 5 / 6)) / 2)
    assert rates["act_alpha"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 5 / 6)) / 2)
    write_checkpoint({**content, "config": {**content["config"], "epochs": 3}}, last)
    with pytest.raises(ValueError, match="not 4: finish it first, or name another --output"):
        train(one(tiny_npz, tmp_path, epochs=4), resume="auto")


def test_a_folder_with_what_is_no_run_of_its_own_is_left_alone(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "vgg_tiny_4bit"
    folder.mkdir()
    lone = folder / BEST
    write_checkpoint({"state_dict": create_model("vgg_tiny", bits=4).state_dict()}, lone)
    before = lone.read_bytes()
    for resume in (None, "auto"):
        with pytest.raises(ValueError, match="of no run in this folder; move it, or name another --output"):
            train(one(tiny_npz, tmp_path, epochs=1), resume=resume)
    assert [entry.name for entry in folder.iterdir()] == [BEST]
    assert lone.read_bytes() == before
    lone.unlink()
    (folder / METRICS).write_text("{}\n{}\n")
    with pytest.raises(ValueError, match="the metrics of a run whose"):
        train(one(tiny_npz, tmp_path, epochs=1))
    (folder / METRICS).unlink()
    train(one(tiny_npz, tmp_path, epochs=1))
    last = folder / LAST
    last.rename(checkpoint_before(last))  # a run killed between two names
    with pytest.raises(ValueError, match="holds a run already"):
        train(one(tiny_npz, tmp_path, epochs=1))
    assert train(one(tiny_npz, tmp_path, epochs=1), resume="auto").epochs == 1


def test_a_damaged_checkpoint_does_not_push_out_the_sound_one(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    config = one(tiny_npz, tmp_path, epochs=2)
    train(config)
    last = tmp_path / "vgg_tiny_4bit" / LAST
    last.write_bytes(last.read_bytes()[:-100])
    train(config, resume="auto")
    assert read_checkpoint(last)["epoch"] == 2
    assert read_checkpoint(checkpoint_before(last))["epoch"] == 1


def test_a_teacher_written_again_with_the_same_weights_is_the_same(short: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint({**read_checkpoint(short["teacher"]), "seconds": 2.0}, tmp_path / "again.pth")
    again = str(tmp_path / "again.pth")
    assert train(TrainConfig(**{**short, "init": again, "teacher": again}), resume="auto").epochs == 2


def test_a_run_is_not_brought_over_one_that_it_does_not_go_on_from(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "step", "compile": "off"}
    train(one(tiny_npz, tmp_path / "a", epochs=1, **options))
    early = Path(shutil.copytree(tmp_path / "a/vgg_tiny_4bit", tmp_path / "early")) / LAST
    train(one(tiny_npz, tmp_path / "a", epochs=3, **options), resume="auto")
    last = tmp_path / "a/vgg_tiny_4bit" / LAST
    before = last.read_bytes()
    with pytest.raises(ValueError, match=r"holds 3 epochs of a run that .*early.*, with 1, does not go on"):
        train(one(tiny_npz, tmp_path / "a", epochs=2, **options), resume=str(early))
    assert last.read_bytes() == before
    train(one(tiny_npz, tmp_path / "b", epochs=1, seed=1, **options))
    with pytest.raises(ValueError, match="was run with seed = 1, not 0"):
        train(one(tiny_npz, tmp_path / "b", epochs=2, **options), resume=str(early))
    # over the epochs that it holds itself it may come
    shutil.copytree(early.parent, tmp_path / "c/vgg_tiny_4bit")
    assert train(one(tiny_npz, tmp_path / "c", epochs=3, **options), resume=str(last)).epochs == 3


def test_a_best_checkpoint_alone_is_not_written_over(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    config = one(tiny_npz, tmp_path, epochs=3, compile="off")
    train(config)
    folder = tmp_path / "vgg_tiny_4bit"
    content = read_checkpoint(folder / LAST)
    write_checkpoint(content, folder / BEST)  # whichever it was
    for entry in (entry for entry in folder.iterdir() if entry.name != BEST):
        entry.unlink()
    before = (folder / BEST).read_bytes()
    for resume in (None, "auto"):
        with pytest.raises(ValueError, match=f"epoch 3 of a run whose {LAST} is gone; move it, or name another"):
            train(config, resume=resume)
    assert (folder / BEST).read_bytes() == before


def test_the_best_checkpoint_comes_along_to_another_folder_or_is_missed(
    tiny_npz: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"schedule": "step", "compile": "off"}
    run = train(one(tiny_npz, tmp_path / "a", epochs=2, **options))
    again = one(tiny_npz, tmp_path / "b", epochs=2, **options)
    train(again, resume=str(run.folder / LAST))
    assert (tmp_path / "b/vgg_tiny_4bit" / BEST).read_bytes() == (run.folder / BEST).read_bytes()
    assert not caplog.messages or "is gone" not in caplog.text
    (run.folder / BEST).unlink()
    train(one(tiny_npz, tmp_path / "a", epochs=2, **options), resume="auto")
    assert f"{BEST}: that of epoch {run.best_epoch}, the best so far, is gone" in caplog.text


def test_two_processes_do_not_train_in_one_folder(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "vgg_tiny_4bit"
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process trains there; wait for it, or name another --output"):
        train(one(tiny_npz, tmp_path, epochs=1))
    assert not list(folder.iterdir())
    os.close(other)
    assert train(one(tiny_npz, tmp_path, epochs=1)).epochs == 1


def test_images_that_moved_are_normalised_as_they_were(tmp_path: Path) -> None:
    options: dict[str, Any] = {"arch": "vgg_tiny", "preset": "apot-cifar", "bit": 4, "compile": "off", "epochs": 1}
    run = train(TrainConfig(data="digits", output=str(tmp_path), **options))
    digits = load_dataset("digits")
    for name, images in (("train", digits.train), ("test", digits.test)):
        assert isinstance(images, ImageSet)
        np.savez(tmp_path / f"{name}.npz", images=images.images_NHWC.numpy(), labels=images.labels_N.numpy())
    moved: dict[str, Any] = {"data": str(tmp_path / "train.npz"), "test_data": str(tmp_path / "test.npz")}
    assert evaluate(run.folder / LAST, data=str(tmp_path / "test.npz")).top1 == run.last
    shown = load_images(load_subjects(run.folder)[0], str(tmp_path / "test.npz"), None, read_once())
    assert isinstance(shown, Images)
    assert shown.result is not None
    assert shown.result.top1 == run.best  # of one epoch the last
    again = train(TrainConfig(output=str(tmp_path), **moved, **{**options, "epochs": 2}), resume="auto")
    elsewhere = train(TrainConfig(data="digits", output=str(tmp_path / "whole"), **{**options, "epochs": 2}))
    assert again.last == elsewhere.last
    other = TrainConfig(output=str(tmp_path), mean=(0.5, 0.5, 0.5), **moved, **{**options, "epochs": 3})
    with pytest.raises(ValueError, match=r"was run with mean = \[0.305, .*, not \[0.5"):
        train(other, resume="auto")
