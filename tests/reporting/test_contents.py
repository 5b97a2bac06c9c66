from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from apot_fat import clipping_table, weight_deactivate_freq
from apot_fat.checkpoint import read_checkpoint
from apot_fat.quant import QuantConv2d, QuantLinear, preset
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.measure import MOST_IMAGES, measure_input, measure_weight
from apot_fat.quant.normalization import normalize_weight
from apot_fat.reporting import cost_report
from apot_fat.reporting.contents import Report, build_report
from apot_fat.reporting.subject import Images, input_shape, load_images, load_subjects, read_once
from apot_fat.training import TrainConfig, summarize
from apot_fat.training.build import load_config_dataset
from apot_fat.training.folder import LAST

if TYPE_CHECKING:
    from tests.reporting.conftest import Demo

FP32, APOT, FAT, PACKED = range(4)


def rows(report: Report, table: str, run: int) -> list[dict[str, Any]]:
    return report.rows(table, run=run)


def sqnr(v: np.ndarray, q: np.ndarray) -> float:
    v, q = v.astype(np.float64), q.astype(np.float64)
    return float(10 * np.log10((v**2).sum() / ((v - q) ** 2).sum()))


def test_runs_say_what_summaries_say(demo: Demo) -> None:
    runs = demo.report.data["runs"]
    assert [run["label"] for run in runs] == [
        "fp32",
        "APoT 3 bits",
        "FAT 4 bits (runs0/resnet_20_4bit)",
        runs[3]["label"],
    ]
    assert [run["kind"] for run in runs] == ["run", "run", "run", "packed"]
    for run in runs[:3]:
        summary = summarize(Path(run["path"]))
        assert run["environment"] == read_checkpoint(Path(run["path"]) / LAST)["environment"]
        for name in ("method", "bits", "best_epoch", "best_on", "epochs"):
            assert run[name] == getattr(summary, name), name
        for name in ("last", "best", "seconds"):
            assert run[name] == pytest.approx(getattr(summary, name), rel=1e-5), name
    assert len({run["label"] for run in runs}) == 4
    assert len({(run["hue"], run["shade"]) for run in runs}) == 4
    assert runs[PACKED]["file_bytes"] == demo.packed.stat().st_size


def test_curves_and_thresholds_over_time_are_those_of_the_metrics(demo: Demo) -> None:
    for run, offset in ((FP32, 0), (APOT, 2), (FAT, 2)):  # both started from fp32's two epochs
        path = Path(demo.report.data["runs"][run]["path"])
        metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        curves = rows(demo.report, "epochs", run)
        assert [row["since"] for row in curves] == [offset + 1, offset + 2]
        thresholds = rows(demo.report, "thresholds", run)
        assert len(thresholds) == 2 * len(metrics[0]["layers"])
        for row in curves:
            for name in ("train_loss", "test_loss", "train_top1", "test_top1"):
                assert row[name] == pytest.approx(metrics[row["epoch"] - 1][name], rel=1e-5)
        for row in thresholds:
            layer = metrics[row["epoch"] - 1]["layers"][row["name"]]
            for name in ("weight_alpha", "act_alpha"):
                assert row[name] == pytest.approx(layer[name], rel=1e-5)


def test_costs_are_those_of_cost_report(demo: Demo) -> None:
    for run, subject in enumerate(demo.report.subjects):
        shape = tuple(demo.report.data["runs"][run]["input_shape"])
        assert shape == ((3, 32, 32) if run == PACKED else (3, 8, 8))
        cost = cost_report(subject.model, shape)
        shown = rows(demo.report, "costs", run)
        for row, expected in zip(shown, (*cost.rows, cost.total), strict=True):
            assert {name: row[name] for name in asdict(expected)} == asdict(expected)
            assert row["float_share"] == expected.float_share
        for name in ("packed_bytes", "float32_bytes", "bit_operations", "macs", "shift_adds", "parameters"):
            assert demo.report.data["runs"][run][name] == getattr(cost.total, name)
        assert demo.report.data["runs"][run]["float_bit_operations"] == cost.total.macs * 32 * 32


@pytest.mark.parametrize("run", [APOT, FAT])
def test_weights_by_direct_counting(demo: Demo, run: int) -> None:
    model = demo.report.subjects[run].model
    layers = {row["name"]: row for row in rows(demo.report, "layers", run)}
    levels = rows(demo.report, "levels", run)
    bins = rows(demo.report, "bins", run)
    assert len(list(threshold_layers(model))) == 20
    for clipping, (name, layer) in zip(clipping_table(model), threshold_layers(model), strict=True):
        row = layers[name]
        for field in ("weight_alpha", "act_alpha"):
            assert row[field] == pytest.approx(getattr(clipping, field), rel=1e-5)
        if run == FAT:
            assert (row["mask_min"], row["mask_max"]) == pytest.approx((clipping.mask_min, clipping.mask_max), rel=1e-5)
        w, q = (t.detach().numpy().ravel() for t in (layer.transformed_weight(), layer.quantized_weight()))
        assert row["weight_sqnr"] == pytest.approx(sqnr(w, q), rel=1e-5)
        assert row["weight_clipped"] == pytest.approx((np.abs(w) > np.float32(clipping.weight_alpha)).mean(), rel=1e-5)
        own = {(r["side"], r["level"]): r["share"] for r in levels if r["name"] == name}
        shares = {level: share for (side, level), share in own.items() if side == "weight"}
        assert len(shares) == 2 * len(layer.spec.weight_set) - 1
        values, counts = np.unique(q, return_counts=True)
        for value, count in zip(values, counts, strict=True):
            nearest = min(shares, key=lambda level: abs(level - value))
            assert nearest == pytest.approx(value, rel=1e-5, abs=1e-7)
            assert shares[nearest] == pytest.approx(count / w.size, rel=1e-5)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        counted = [r for r in bins if r["name"] == name and r["side"] == "weight"]
        assert sum(r["count"] for r in counted) == np.count_nonzero(w)
        fullest = max(counted, key=lambda r: r["count"])
        inside = ((w >= fullest["low"] - 1e-4) & (w < fullest["high"] + 1e-4)).sum()
        assert abs(int(inside) - fullest["count"]) <= max(3, 0.01 * w.size)


def test_inputs_of_a_batch(demo: Demo, shared_npz: tuple[Path, Path]) -> None:
    subject = demo.report.subjects[FAT]
    images = load_images(subject, None, None, read_once())
    assert isinstance(images, Images)
    assert len(images.batch) == MOST_IMAGES
    name = "layer2.1.conv2"
    layer = subject.model.get_submodule(name)
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        subject.model(images.batch)
    assert isinstance(layer, QuantConv2d)
    x = torch.relu(seen[0])
    q = layer.quantized_input(seen[0])
    (row,) = [r for r in rows(demo.report, "layers", FAT) if r["name"] == name]
    assert row["input_count"] == x.numel()
    assert row["input_zeros"] == pytest.approx(float((x == 0).double().mean()), rel=1e-5)
    assert row["input_sqnr"] == pytest.approx(sqnr(x.numpy(), q.detach().numpy()), rel=1e-5)
    alpha = layer.act_alpha
    assert alpha is not None
    assert row["input_clipped"] == pytest.approx(float((x > alpha).double().mean()), rel=1e-5)
    levels = [r for r in rows(demo.report, "levels", FAT) if r["name"] == name and r["side"] == "input"]
    assert len(levels) == 16
    codes = (q.double() / alpha.double() * 15).round().long().flatten().bincount(minlength=16) / q.numel()
    assert [r["share"] for r in levels] == pytest.approx(codes.tolist(), rel=1e-5)


def test_spectrum_and_mask_of_fat(demo: Demo) -> None:
    name = "layer1.0.conv1"  # 144 weights a channel: 73 frequencies, a band each
    layer = demo.report.subjects[FAT].model.get_submodule(name)
    assert isinstance(layer, QuantConv2d)
    assert layer.transform is not None
    w = normalize_weight(layer.weight, layer.spec).detach()
    restored, _ = weight_deactivate_freq(w, layer.transform.detach())
    shown = [r for r in rows(demo.report, "frequencies", FAT) if r["name"] == name]
    assert [r["frequency"] for r in shown] == pytest.approx([k / 144 for k in range(73)], rel=1e-5)
    before, after = (np.abs(np.fft.rfft(t.double().reshape(16, -1).numpy())) for t in (w, restored))
    assert [r["before"] for r in shown] == pytest.approx(before.mean(0), rel=1e-4)
    assert [r["after"] for r in shown] == pytest.approx(after.mean(0), rel=1e-4)
    assert [r["mask_mean"] for r in shown] == pytest.approx((after / before).mean(0), rel=1e-4)
    long = [r for r in rows(demo.report, "frequencies", FAT) if r["name"] == "layer3.1.conv1"]
    assert len(long) == 96
    assert all(r["mask_min"] <= r["mask_mean"] <= r["mask_max"] for r in long)
    assert not rows(demo.report, "frequencies", APOT)


def test_what_cannot_be_shown_is_said(demo: Demo, tmp_path: Path) -> None:
    notes = [run["notes"] for run in demo.report.data["runs"]]
    assert set(notes[FP32]) == {"levels", "spectrum"}
    assert set(notes[APOT]) == {"spectrum"}
    assert set(notes[FAT]) == set()
    assert set(notes[PACKED]) == {
        "curves",
        "thresholds",
        "recipe",
        "environment",
        "inputs",
        "levels",
        "spectrum",
        "accuracy",
    }
    assert all(note.endswith(".") for of_run in notes for note in of_run.values())
    gone = replace(
        demo.report.subjects[FAT], config=replace(demo.report.subjects[FAT].config, data=str(tmp_path / "no"))
    )
    missing = load_images(gone, None, None, read_once())
    assert "not at hand" in str(missing)
    assert input_shape(gone, missing, None) == gone.shape == (3, 8, 8)
    with pytest.raises(ValueError, match="no data set"):
        load_images(gone, "absent", None, read_once())


def test_a_packed_file_lands_on_the_levels_of_its_network(demo: Demo) -> None:
    before, after = (
        [(r["name"], r["level"], r["share"]) for r in rows(demo.report, "levels", run) if r["side"] == "weight"]
        for run in (FAT, PACKED)
    )
    inner = [row for row in before if row[0] not in ("conv1", "fc")]
    assert [row for row in after if row[0] not in ("conv1", "fc")] == inner


def test_a_sweeps_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(demo: Demo, tmp_path: Path) -> None:
    fp32, apot = demo.output / "resnet20_32bit", demo.output / "resnet20_3bit"
    for recipe in ("published", "ours"):
        for folder in (fp32, apot):
            shutil.copytree(folder, tmp_path / recipe / "apot-cifar/seed0" / folder.name)
    (tmp_path / "sweep.csv").touch()
    runs = build_report(load_subjects(tmp_path)).data["runs"]
    labels = [run["label"] for run in runs]
    assert len(set(labels)) == 4
    assert f"APoT 3 bits (published/apot-cifar/seed0/{apot.name})" in labels
    assert sorted(run["first_epoch"] for run in runs) == [1, 1, 3, 3]  # each after the parent beside it


def test_images_are_read_once(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(config: TrainConfig, **given: Any) -> Any:
        read.append(config.data)
        return load_config_dataset(config, **given)

    monkeypatch.setattr("apot_fat.reporting.subject.load_config_dataset", counted)
    assert len({run["images_from"] for run in build_report(demo.report.subjects[:3]).data["runs"]}) == 1
    assert len(read) == 1


def test_accuracy_is_measured_on_named_images(demo: Demo, shared_npz: tuple[Path, Path]) -> None:
    path = Path(demo.report.data["runs"][FAT]["path"])
    (run,) = build_report(load_subjects(path), data=str(shared_npz[1])).data["runs"]
    assert run["measured"] == pytest.approx(run["best"], rel=1e-5)  # the run's own test images
    assert run["correct"] == round(run["measured"] * 0.21)
    assert (run["images"], run["batch"]) == (21, MOST_IMAGES)


def test_a_released_checkpoint(reference: Path) -> None:
    path = reference / "reference/released/res20_3bit/model_best.pth.tar"
    report = build_report(load_subjects(path))
    (run,) = report.data["runs"]
    assert (run["label"], run["best"], run["packed_bytes"]) == ("APoT 3 bits", 92.51, 115_008)
    assert run["notes"]["inputs"] == "No images: this file names none. Name some with --data."
    first = report.rows("layers")[1]
    assert (round(first["weight_alpha"], 3), round(first["act_alpha"], 3)) == (1.569, 1.438)


@pytest.mark.parametrize("name", ["lsq", "pact"])
def test_levels_that_hold_their_negatives_and_thresholds_a_channel(name: str) -> None:
    layer = QuantLinear(8, 3, spec=preset(name, bits=3, weight_per_channel=True))
    assert layer.weight_alpha is not None
    w, q = layer.transformed_weight().detach().double(), layer.quantized_weight().detach().double()
    alpha = layer.weight_alpha.detach().double()[:, None]
    found = measure_weight(layer)
    assert found.levels == pytest.approx(
        [n / layer.spec.weight_set.denominator for n in layer.spec.weight_set.numerators]
    )
    counted = [((q / alpha - level).abs() < 1e-5).double().mean().item() for level in found.levels]
    assert found.shares == pytest.approx(counted)
    assert found.sqnr == pytest.approx(sqnr(w.numpy(), q.numpy()))
    outside = (w / alpha > found.levels[-1]) | (w / alpha < found.levels[0])
    assert found.clipped == pytest.approx(outside.double().mean().item())


def test_a_layer_by_hand() -> None:
    spec = preset("uniform-mobilenet", bits=3, weight_norm="none", weight_alpha=3.0, act_alpha=7.0)
    layer = QuantLinear(4, 2, bias=False, spec=spec)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.2, -2.0, 6.0], [3.0, -3.0, 0.4, 0.0]]))
    weight = measure_weight(layer)
    assert weight.levels == pytest.approx((-3, -2, -1, 0, 1, 2, 3))
    assert weight.shares == (1 / 8, 1 / 8, 0, 3 / 8, 1 / 8, 0, 2 / 8)
    assert (weight.count, weight.zeros, weight.clipped) == (8, 0.25, 1 / 8)
    assert weight.sqnr == pytest.approx(10 * math.log10((1.44 + 4 + 36 + 9 + 9 + 0.16) / (0.04 + 9 + 0.16)), rel=1e-6)
    x = torch.tensor([[-1.1, 0.0, 2.4, 8.0]])
    inputs = measure_input(layer, x)  # this variant does not clip below 0
    assert inputs.levels == pytest.approx((-1, 0, 1, 2, 3, 4, 5, 6, 7))
    assert inputs.shares == (1 / 4, 1 / 4, 0, 1 / 4, 0, 0, 0, 0, 1 / 4)
    assert inputs.clipped == 0.25
    signed = QuantLinear(4, 2, spec=preset("apot-cifar", bits=3, act_signed=True, act_alpha=2.0))
    assert len(measure_input(signed, x).levels) == 7
    assert measure_input(signed, x).clipped == 0.5
    plain = measure_input(nn.Linear(4, 2), x)
    assert (plain.levels, plain.sqnr, plain.clipped) == ((), None, None)
    assert sum(plain.histogram.counts) == 3
