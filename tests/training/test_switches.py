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
from apot_fat.training.run import LAST, load_config_dataset, make_batches

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
