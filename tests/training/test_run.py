from __future__ import annotations

import json
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apot_fat import evaluate
from apot_fat.checkpoint import load_weights, read_checkpoint, write_checkpoint
from apot_fat.models import create_model
from apot_fat.quant import QuantConv2d
from apot_fat.reporting.contents import build_report
from apot_fat.reporting.subject import load_subjects
from apot_fat.training import TrainConfig, read_recipe, summarize, train, train_chain
from apot_fat.training.device import choose_device
from apot_fat.training.folder import BEST, CONFIG, LAST, METRICS, recorded_shape
from apot_fat.training.network import create_network


def tiny(tiny_npz: tuple[Path, Path], output: Path, **values: Any) -> TrainConfig:
    train_path, test_path = tiny_npz
    settings = {"arch": "vgg_tiny", "bit": 4, "epochs": 3, "batch_size": 16, "lr": 0.05, "crop_padding": 1}
    settings |= {"data": str(train_path), "test_data": str(test_path), "output": str(output), "histogram_every": 2}
    return TrainConfig(**{**settings, **values})


def test_a_run_folder_holds_what_is_promised(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny(tiny_npz, tmp_path, arch="resnet_20", preset="fat-cifar", val_split=0.25)
    summary = train(config)
    folder = tmp_path / "resnet_20_4bit"
    assert summary.folder == folder
    assert summary.best_on == "val"
    assert {LAST, BEST, METRICS, CONFIG} < {entry.name for entry in folder.iterdir()}
    assert TrainConfig.from_dict(tomllib.loads((folder / CONFIG).read_text())) == config
    tags = EventAccumulator(str(folder)).Reload().Tags()
    for tag in ("train_acc", "test_acc", "val_acc", "loss/train", "loss/test", "lr/weights", "lr/act_alpha"):
        assert tag in tags["scalars"]
    for tag in ("weight_alpha", "act_alpha", "mask_max", "mask_min"):
        assert f"{tag}/layer1.0.conv1" in tags["scalars"]
    for tag in ("weight_sqnr_db", "weight_clipped", "act_sqnr_db", "act_clipped"):
        assert f"{tag}/layer1.0.conv1" in tags["scalars"]
    assert "weight/layer1.0.conv1" in tags["histograms"]
    assert "levels" in tags["images"]
    board = EventAccumulator(str(folder)).Reload()
    assert "_hparams_/session_start_info" in board.summary_metadata
    model = load_weights(create_network(config, 3), folder / LAST)
    layer = model.get_submodule("layer1.0.conv1")
    assert isinstance(layer, QuantConv2d)
    u, q = layer.transformed_weight().double(), layer.quantized_weight().double()
    sqnr = 10 * torch.log10(u.square().sum() / (u - q).square().sum())
    assert board.Scalars("weight_sqnr_db/layer1.0.conv1")[-1].value == pytest.approx(sqnr.item(), rel=1e-5)
    best = read_checkpoint(folder / BEST)
    assert {"state_dict", "epoch", "best_prec", "arch"} <= best.keys()
    assert best["epoch"] == summary.best_epoch
    assert best["history"][-1]["val_top1"] == max(row["val_top1"] for row in read_checkpoint(folder / LAST)["history"])
    assert summarize(folder) == summary


@pytest.mark.parametrize("what", ["write", "__init__"])
def test_an_epoch_is_saved_before_it_is_drawn_and_no_drawing_ends_a_run(
    tiny_npz: tuple[Path, Path],
    tmp_path: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any) -> None:
        rows = (tmp_path / "vgg_tiny_4bit" / METRICS).read_text().splitlines()
        assert what == "__init__" or (len(rows) == 1 and (tmp_path / "vgg_tiny_4bit" / LAST).exists())
        raise RuntimeError("Expected all tensors to be on the same device")

    monkeypatch.setattr(f"apot_fat.training.board.Board.{what}", broken)
    assert train(tiny(tiny_npz, tmp_path)).epochs == 3
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["the run goes on without its TensorBoard curves: Expected all tensors to be on the same device"]


def test_a_runs_seconds_are_the_walls_saving_included(
    tiny_npz: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_write(*args: Any, **options: Any) -> None:
        time.sleep(0.2)
        write_checkpoint(*args, **options)

    monkeypatch.setattr("apot_fat.training.folder.write_checkpoint", slow_write)
    begun = time.perf_counter()
    summary = train(tiny(tiny_npz, tmp_path, epochs=3))
    assert 2 * 0.2 < summary.seconds < time.perf_counter() - begun - 0.2  # all but the last


def test_a_run_ended_between_saving_and_drawing_draws_when_it_goes_on(
    tiny_npz: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for name in ("whole", "parts"):
        config = tiny(tiny_npz, tmp_path / name, ema_decay=0.5)
        if name == "parts":
            with monkeypatch.context() as patch:
                patch.setattr("apot_fat.training.board.Board.write", _killed)
                with pytest.raises(KeyboardInterrupt):
                    train(config)
        train(config, resume="auto")
        board = EventAccumulator(str(tmp_path / name / config.run_name)).Reload()
        curves.append({tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]})
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]["weight_sqnr_db/features.conv1"]] == [0, 2]


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_any_text_of_a_config_comes_back_from_its_file(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny(tiny_npz, tmp_path / 'a "b" \\ é 😀 \x7f', epochs=1, lr=1e-7, lr_steps=(), mean=(0.5, 0.25, 1e-9))
    folder = train(config).folder
    assert TrainConfig.from_dict(tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))) == config


def test_training_learns(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    summary = train(tiny(tiny_npz, tmp_path, bit=32, epochs=6, schedule="onecycle", lr=0.1))
    assert summary.best == 100


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_what_a_run_records_is_what_its_checkpoint_gives_in_float32(
    tiny_npz: tuple[Path, Path], tmp_path: Path, amp: str
) -> None:
    config = tiny(tiny_npz, tmp_path, amp=amp, epochs=2)
    summary = train(config)
    found = evaluate(tmp_path / config.run_name / LAST)
    row = json.loads((tmp_path / config.run_name / METRICS).read_text().splitlines()[-1])
    assert (found.top1, found.loss) == (summary.last, row["test_loss"])
    in_bfloat16 = evaluate(tmp_path / config.run_name / LAST, amp="bf16")
    assert in_bfloat16.loss != found.loss


def test_a_checkpoint_says_what_it_was_computed_with(
    tiny_npz: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(tiny_npz, tmp_path, epochs=2)
    train(replace(config, epochs=1))
    last = tmp_path / config.run_name / LAST
    content = read_checkpoint(last)
    assert content["environment"]["torch"] == torch.__version__
    assert {"commit", "python", "apot-fat", "device"} <= content["environment"].keys()
    assert content["image_shape"] == (3, 8, 8)
    with pytest.raises(ValueError, match=r"net.pth: image_shape \[8, 8\]: not three sizes"):
        recorded_shape({"image_shape": [8, 8]}, "net.pth")
    content["environment"]["torch"] = "1.0"
    write_checkpoint(content, last)
    train(config, resume="auto")
    assert f"was computed with torch 1.0 (now {torch.__version__})" in caplog.text


def test_an_odd_layer_is_warned_about_once(
    tiny_npz: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"state_dict": create_model("vgg_tiny", bits=4, num_classes=3).state_dict()}
    content["state_dict"]["features.conv1.weight_alpha"].fill_(-1.0)
    start = tmp_path / "negative.pth"
    write_checkpoint(content, start)
    summary = train(tiny(tiny_npz, tmp_path, epochs=2, lr=1e-9, weight_alpha_lr=1e-9, init=str(start)))
    assert caplog.text.count("features.conv1: its weight threshold is at its floor") == 1
    assert min(summary.thresholds) > 0


def test_nothing_is_overwritten_or_mixed(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny(tiny_npz, tmp_path, epochs=1)
    train(config)
    before = (tmp_path / config.run_name / LAST).read_bytes()
    with pytest.raises(ValueError, match="holds a run already: go on with --resume auto"):
        train(config)
    with pytest.raises(ValueError, match=r"was run with lr = 0\.05, not 0\.2"):
        train(tiny(tiny_npz, tmp_path, lr=0.2, epochs=2), resume="auto")
    stranger = tmp_path / "stranger.pth"
    write_checkpoint({"state_dict": {"w": torch.ones(1)}}, stranger)
    with pytest.raises(ValueError, match="not written by a training run"):
        train(tiny(tiny_npz, tmp_path / "d"), resume=str(stranger))
    assert not (tmp_path / "d").exists()
    assert (tmp_path / config.run_name / LAST).read_bytes() == before


def test_bad_starts_create_nothing(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.pth"
    text.write_text("hello")
    output = tmp_path / "out"
    for options, message in (
        ({"init": str(text)}, "not a PyTorch checkpoint"),
        ({"init": str(tmp_path / "absent")}, "no such file"),
        ({"data": str(tmp_path / "absent")}, "no data set"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny(tiny_npz, output, **options))
    assert not output.exists()


def test_a_chain_starts_each_stage_from_the_best_before_and_skips_finished_ones(
    tiny_npz: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('arch = "vgg_tiny"\nepochs = 1\nbatch_size = 16\nchain = [32, 4]\n[bits.4]\nlr = 0.02\n')
    given = {"data": str(tiny_npz[0]), "test_data": str(tiny_npz[1]), "output": str(tmp_path / "out")}
    recipe = read_recipe(path)
    full, four = train_chain(recipe, recipe.chain, given)
    assert (full.bits, four.bits) == (32, 4)
    assert read_checkpoint(four.folder / LAST)["config"]["init"] == str(full.folder / BEST)
    assert read_checkpoint(four.folder / LAST)["config"]["lr"] == 0.02
    stamps = [(run.folder / LAST).stat().st_mtime_ns for run in (full, four)]
    (four.folder / LAST).unlink()
    with caplog.at_level("INFO", logger="apot_fat"):
        again = train_chain(recipe, recipe.chain, given)
    assert "finished before, skipped" in caplog.text
    assert (full.folder / LAST).stat().st_mtime_ns == stamps[0]
    assert again[0] == full
    assert again[1].last == four.last


def test_devices(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device().type in ("cpu", "cuda")
    for device, gpu, message in (("tpu", None, "choose auto"), ("auto", "a", "expected device numbers")):
        with pytest.raises(ValueError, match=message):
            choose_device(device, gpu)
    if not torch.cuda.is_available():
        assert choose_device("auto", "0,1").type == "cpu"
        assert "is ignored, running on the CPU" in caplog.text


def test_a_checkpoint_is_evaluated_on_the_classes_it_was_trained_on(tmp_path: Path) -> None:
    for part, names in (("train", "abc"), ("test", "bc")):
        for label, name in enumerate(names, start="abc".index(names[0])):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(8):
                shade = 60 + 80 * label + index
                Image.new("RGB", (8, 8), (shade, shade, shade)).save(tmp_path / f"images/{part}/{name}/{index}.png")
    last = train(TrainConfig(data=str(tmp_path / "images"), output=str(tmp_path), epochs=1, batch_size=8)).folder / LAST
    recorded = read_checkpoint(last)["history"][-1]
    assert evaluate(last).loss == pytest.approx(recorded["test_loss"], rel=1e-5)
    alone = str(tmp_path / "images/test")
    one_line = r"has 3 outputs, .*images/test names 2 classes, .*give --data the folder that holds the train/ [^\n]*$"
    with pytest.raises(ValueError, match=one_line):
        evaluate(last, data=alone)
    with pytest.raises(ValueError, match=one_line):
        build_report(load_subjects(last.parent), data=alone)
    numbers = tmp_path / "two.npz"
    np.savez(numbers, images=np.full((2, 3, 8, 8), 140, np.uint8), labels=[1, 1])
    assert evaluate(last, data=str(numbers)).total == 2


@pytest.mark.parametrize(("batch_size", "accumulate", "fits"), [(8, 1, 7), (1, 1, 3), (3, 3, 9)])
def test_a_batch_of_one_image_is_refused_only_where_batch_norm_sees_one_value_a_channel(
    tmp_path: Path, batch_size: int, accumulate: int, fits: int
) -> None:
    def run(side: int, batch_size: int) -> None:
        path = str(tmp_path / f"{side}.npz")
        np.savez(path, images=np.random.default_rng(0).integers(0, 256, (9, 3, side, side), np.uint8), labels=[2] * 9)
        output = str(tmp_path / f"{side}-{batch_size}")
        options: dict[str, Any] = {"data": path, "test_data": path, "output": output, "epochs": 1, "lr": 0.01}
        train(TrainConfig(batch_size=batch_size, accumulate=accumulate, **options))

    message = rf"^batch_size {batch_size}: one of 9 training images [^\n]*layer3\.\d[^\n]*; give --batch-size {fits}$"
    with pytest.raises(ValueError, match=message):
        run(4, batch_size)  # 1 × 1 where the network ends
    assert not list(tmp_path.glob("4-*"))
    run(4, fits)
    run(8, batch_size)
