"""The switches of a run: what each does to a whole, small run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apot_fat.checkpoint import read_checkpoint, write_checkpoint
from apot_fat.models import create_model
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.thresholds import initialize_thresholds
from apot_fat.training import TrainConfig, evaluate, train
from apot_fat.training.averaging import WeightAverage
from apot_fat.training.build import load_config_dataset, make_batches, make_objective
from apot_fat.training.folder import BEST, LAST
from apot_fat.training.objective import mixed
from apot_fat.training.teacher import load_teacher

CPU = torch.device("cpu")


@pytest.fixture
def make(tiny_npz: tuple[Path, Path], tmp_path: Path) -> Any:
    """Configs of a run of two epochs of three steps."""

    def config(**values: Any) -> TrainConfig:
        settings: dict[str, Any] = {"arch": "vgg_tiny", "bit": 4, "epochs": 2, "batch_size": 16, "lr": 0.05}
        settings |= {"crop_padding": 1, "histogram_every": 0}
        settings |= {"data": str(tiny_npz[0]), "test_data": str(tiny_npz[1]), "output": str(tmp_path / "out")}
        return TrainConfig(**{**settings, **values})

    return config


def thresholds(state: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in state.items() if name.endswith("_alpha")}


def test_thresholds_are_fitted_on_the_first_batch_of_a_fresh_run(make: Any, tmp_path: Path) -> None:
    model = create_model("vgg_tiny", bits=4, num_classes=3)
    for _, layer in threshold_layers(model):
        layer.weight_alpha.data.fill_(7.0)  # type: ignore[union-attr]
    source = tmp_path / "source.pth"
    write_checkpoint({"state_dict": model.state_dict()}, source)
    frozen = {"act_alpha_lr": 1e-30, "weight_alpha_lr": 1e-30, "lr": 1e-30, "init": str(source)}
    carried = train(make(**frozen, epochs=1, output=str(tmp_path / "carried")))
    assert thresholds(read_checkpoint(carried.folder / LAST)["state_dict"])["features.conv1.weight_alpha"] == 7
    config = make(**frozen, epochs=1, threshold_init="mse")
    fitted = thresholds(read_checkpoint(train(config).folder / LAST)["state_dict"])
    batches = make_batches(config, load_config_dataset(config).train, CPU, training=True)  # type: ignore[arg-type]
    expected = thresholds(initialize_thresholds(model, next(iter(batches)).x).state_dict())
    assert fitted == expected
    more = train(make(**frozen, epochs=2, threshold_init="mse"), resume="auto")
    assert more.epochs == 2
    assert train(make(threshold_init="mse", bit=32, epochs=1)).bits == 32  # nothing to set


def test_the_teacher_is_the_network_its_checkpoint_says(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apot_fat.training.teacher.has_fast_bfloat16", lambda device: False)
    for none in (None, "none"):
        with pytest.raises(ValueError, match=r"distill_weight 0\.5: name the network to distil from with --teacher"):
            make(distill_weight=0.5, teacher=none)
    with pytest.raises(ValueError, match=r"resnet20_32bit/model_best\.pth\.tar: no such file"):
        make_objective(make(arch="resnet20", distill_weight=0.5, teacher="fp32"), 3, CPU)
    recorded = train(make(arch="resnet_20", bit=32, epochs=1)).folder / BEST
    student = make(arch="resnet20", distill_weight=0.5, teacher=str(recorded))
    teacher = load_teacher(student, str(recorded), 3, CPU)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    # it was trained with FAT's mean and standard deviation, the student's images have APoT's
    config = load_config_dataset(student)
    theirs, own = (make_batches(make(arch=arch), config.test, CPU) for arch in ("resnet20", "resnet_20"))
    model = create_model("resnet_20", bits=32, num_classes=3).eval()
    model.load_state_dict(read_checkpoint(recorded)["state_dict"])
    torch.testing.assert_close(teacher(next(iter(theirs)).x), model(next(iter(own)).x), rtol=1e-4, atol=1e-4)
    bare = tmp_path / "bare.pth"
    write_checkpoint({"state_dict": model.state_dict()}, bare)
    plain = load_teacher(student, str(bare), 3, CPU)
    x = next(iter(own)).x
    torch.testing.assert_close(plain(x), model(x))
    with pytest.raises(ValueError, match="has 3 outputs, the data 10 classes"):
        load_teacher(student, str(bare), 10, CPU)


@pytest.mark.parametrize("fast", [True, False])
def test_the_teacher_answers_in_bfloat16_where_that_is_fast(
    fast: bool, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apot_fat.training.teacher.has_fast_bfloat16", lambda device: fast)
    model = create_model("vgg_tiny", bits=32, num_classes=3).eval()
    write_checkpoint({"state_dict": model.state_dict()}, tmp_path / "bare.pth")
    teacher = load_teacher(make(distill_weight=1.0, teacher="x"), str(tmp_path / "bare.pth"), 3, CPU)
    x = torch.randn(8, 3, 8, 8)
    found, expected = teacher(x), model(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5) != fast


def test_the_average_is_what_is_tested_and_kept(make: Any) -> None:
    config = make(ema_decay=0.5, bn_batches=2, epochs=1, val_split=0.25)
    plain = read_checkpoint(train(make(epochs=1, val_split=0.25, output=config.output + "2")).folder / LAST)
    last = read_checkpoint(train(config).folder / LAST)
    best = read_checkpoint(Path(config.output) / config.run_name / BEST)
    averaged, trained = last["state_dict"], last["average"]["trained"]
    assert last["average"]["steps"] == 3
    assert all(torch.equal(trained[name], value) for name, value in plain["state_dict"].items())  # averaging only looks
    assert all(torch.equal(best["state_dict"][name], value) for name, value in averaged.items())
    changed = [name for name in averaged if not torch.equal(averaged[name], trained[name])]
    assert "features.conv1.weight_alpha" in changed
    assert "features.conv1.weight" in changed
    assert last["history"][0]["layers"]["features.conv1"]["act_alpha"] == averaged["features.conv1.act_alpha"].item()
    # the tested accuracy is that of the average
    model = create_model("vgg_tiny", bits=4, num_classes=3)
    model.load_state_dict(averaged)
    dataset = load_config_dataset(config)
    assert evaluate(model, make_batches(config, dataset.test, CPU)).loss == last["history"][0]["test_loss"]
    # and its batch norm that of the averaged network over the first two training batches
    batches = make_batches(config, dataset.train, CPU, training=True)  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule("features.conv0").register_forward_hook(lambda module, x, y: seen.append(y.detach()))
    for batch in list(batches)[:2]:
        model(batch.x)
    handle.remove()
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(averaged["features.norm0.running_mean"], mean)


def test_batch_norm_of_the_last_epoch_is_that_of_the_network_as_it_ended(make: Any, tmp_path: Path) -> None:
    write_checkpoint({"state_dict": create_model("vgg_tiny", bits=32, num_classes=3).state_dict()}, tmp_path / "t.pth")
    options = {"teacher": str(tmp_path / "t.pth"), "distill_weight": 1.0, "distill_mixup": 1.0}
    content = read_checkpoint(train(make(**options)).folder / LAST)
    config = make(**options, final_bn_batches=7, output=str(tmp_path / "other"))
    again = read_checkpoint(train(config).folder / LAST)
    assert again["history"][0]["test_loss"] == content["history"][0]["test_loss"]  # the last epoch alone
    assert again["history"][1]["train_loss"] == content["history"][1]["train_loss"]
    trained, kept = content["state_dict"], again["state_dict"]
    changed = {name for name in trained if not torch.equal(trained[name], kept[name])}
    norms = {name for name in trained if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed == norms
    # as evaluated
    model = create_model("vgg_tiny", bits=4, num_classes=3)
    model.load_state_dict(kept)
    dataset = load_config_dataset(config)
    assert evaluate(model, make_batches(config, dataset.test, CPU)).loss == again["history"][1]["test_loss"]
    # seven batches as training's: three of the last epoch and four of what would follow, mixed as the teacher sees them
    assert dataset.train is not None
    batches = make_batches(config, dataset.train, CPU, training=True)
    images: list[torch.Tensor] = []
    for epoch in range(1, 4):
        batches.set_epoch(epoch)
        images += [batch.x for batch in batches]
    torch.set_rng_state(again["rng"][0]["cpu"])
    outputs = [model.get_submodule("features.conv0")(mixed(x, 1.0)) for x in images[:7]]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(kept["features.norm0.running_mean"], mean)
    torch.testing.assert_close(kept["features.norm0.running_var"], variance)


def test_the_average_follows_by_its_decay() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    average = WeightAverage(model, 0.9, optimizer)
    expected = None
    for _ in range(4):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        now = model.weight.item()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
        assert average.state_dict()["weight"].item() == pytest.approx(expected)
