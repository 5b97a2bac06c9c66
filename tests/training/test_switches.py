"""The switches of a run: what each does to a whole, small run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apot_fat.checkpoint import read_checkpoint, write_checkpoint
from apot_fat.models import create_model
from apot_fat.quant.layers import quant_layers
from apot_fat.quant.thresholds import initialize_thresholds
from apot_fat.training import TrainConfig, train
from apot_fat.training.run import BEST, LAST, load_config_dataset, make_batches, make_objective
from apot_fat.training.teacher import load_teacher

CPU = torch.device("cpu")


@pytest.fixture
def make(tiny_npz: tuple[Path, Path], tmp_path: Path) -> Any:
    """Configs of a run of two epochs of three steps."""

    def config(**values: Any) -> TrainConfig:
        settings: dict[str, Any] = {"bit": 4, "epochs": 2, "batch_size": 16, "lr": 0.05, "crop_padding": 1}
        settings |= {
            "histogram_every": 0,
            "data": str(tiny_npz[0]),
            "test_data": str(tiny_npz[1]),
            "output": str(tmp_path / "out"),
        }
        return TrainConfig(**{**settings, **values})

    return config


def thresholds(state: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in state.items() if name.endswith("_alpha")}


def test_thresholds_are_fitted_on_the_first_batch_of_a_fresh_run(make: Any, tmp_path: Path) -> None:
    model = create_model("resnet20", bits=4, num_classes=3)
    for _, layer in quant_layers(model):
        layer.weight_alpha.data.fill_(7.0)  # type: ignore[union-attr]
    source = tmp_path / "source.pth"
    write_checkpoint({"state_dict": model.state_dict()}, source)
    frozen = {"act_alpha_lr": 1e-30, "weight_alpha_lr": 1e-30, "lr": 1e-30, "init": str(source)}
    carried = train(make(**frozen, epochs=1, output=str(tmp_path / "carried")))
    assert thresholds(read_checkpoint(carried.folder / LAST)["state_dict"])["layer1.0.conv1.weight_alpha"] == 7
    config = make(**frozen, epochs=1, threshold_init="mse")
    fitted = thresholds(read_checkpoint(train(config).folder / LAST)["state_dict"])
    batches = make_batches(config, load_config_dataset(config).train, CPU, training=True)  # type: ignore[arg-type]
    expected = thresholds(initialize_thresholds(model, next(iter(batches)).x).state_dict())
    assert fitted == expected
    more = train(make(**frozen, epochs=2, threshold_init="mse"), resume="auto")
    assert more.epochs == 2
    assert train(make(threshold_init="mse", bit=32, epochs=1)).bits == 32  # nothing to set


def test_the_teacher_is_the_network_its_checkpoint_says(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"distill_weight 0\.5: name the network to distil from with --teacher"):
        make(distill_weight=0.5)
    with pytest.raises(ValueError, match=r"resnet20_32bit/model_best\.pth\.tar: no such file"):
        make_objective(make(distill_weight=0.5, teacher="fp32"), 3, CPU)
    recorded = train(make(arch="resnet_20", bit=32, epochs=1)).folder / BEST
    student = make(distill_weight=0.5, teacher=str(recorded))
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
