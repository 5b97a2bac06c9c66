"""One place opens every file that holds a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from apot_fat import save_packed
from apot_fat.checkpoint import read_checkpoint, write_checkpoint
from apot_fat.models import create_model
from apot_fat.training import TrainConfig
from apot_fat.training.network import open_network


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A checkpoint as a run of ours writes it, with what only its machine had."""
    config = TrainConfig(arch="res20", bit=3, data="here.npz", test_data="there.npz", device="cuda:3", workers=7)
    content = {"config": config.to_dict(), "state_dict": create_model("res20", bits=3, num_classes=4).state_dict()}
    write_checkpoint({**content, "history": []}, tmp_path / "run.pth")
    return tmp_path / "run.pth"


def test_a_run_of_ours_says_all_but_its_machine(recorded: Path) -> None:
    opened = open_network(recorded)
    assert (opened.is_recorded, opened.num_classes, opened.model.training) == (True, 4, False)
    config = opened.config
    assert (config.arch, config.bit, config.data, config.test_data) == ("res20", 3, "here.npz", "there.npz")
    assert (config.device, config.workers) == ("auto", None)
    elsewhere = open_network(recorded, {"data": "other.npz", "device": "cpu", "bit": 3, "arch": "resnet20"}).config
    assert (elsewhere.data, elsewhere.test_data, elsewhere.device) == ("other.npz", None, "cpu")


def test_checkpoints_of_other_versions_are_read_as_far_as_is_needed(recorded: Path) -> None:
    content = read_checkpoint(recorded)
    content["config"] |= {"renamed_since": 3, 5: 1, "schedule": "linear", "lr": 10**400, "numerics": 5}
    del content["config"]["weight_decay"]  # added since
    write_checkpoint(content, recorded)
    config = open_network(recorded).config
    assert (config.bit, config.schedule, config.lr, config.weight_decay) == (3, "step", 0.1, 1e-4)
    for name, value in (("bit", "three"), ("data", 5), ("preset", "apot-2030"), ("mean", [1.0])):
        write_checkpoint({**content, "config": {**content["config"], name: value}}, recorded)
        with pytest.raises(ValueError, match=rf"run\.pth: its config does not fit: {name} "):
            open_network(recorded)
    broken: Any
    for broken in ({}, {"bit": 3}, [], "res20", {"arch": ["res20"]}):
        write_checkpoint({**content, "config": broken}, recorded)
        with pytest.raises(ValueError, match=r"checkpoint .*run\.pth: "):
            open_network(recorded)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bit": 4}, "holds a network of 3 bits, not 4; leave out --bit"),
        ({"arch": "res56"}, "holds res20, not res56; leave out --arch"),
        ({"preset": "fat-cifar"}, "holds apot-cifar, not fat-cifar; leave out --preset"),
    ],
)
def test_another_network_than_the_recorded_one_is_refused(recorded: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_network(recorded, given)
    packed = recorded.with_suffix(".safetensors")
    save_packed(open_network(recorded).model, packed)
    with pytest.raises(ValueError, match=message.replace("res20", "resnet20")):
        open_network(packed, given)


def test_a_file_that_records_nothing_is_known_by_what_is_said_or_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = create_model("res20", bits=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"records no network .*; give --arch and --bit"):
        open_network(tmp_path / "bare.pth")
    with caplog.at_level("INFO", logger="apot_fat"):
        assert open_network(tmp_path / "bare.pth", {"arch": "res20", "bit": 3}).config.data == "cifar10"
    assert "bare.pth records no network: taken for res20, apot-cifar, at 3 bits" in caplog.text
    (tmp_path / "res20_3bit").mkdir()
    named = shutil.copy(tmp_path / "bare.pth", tmp_path / "res20_3bit/model_best.pth.tar")
    opened = open_network(named)
    assert (opened.config.arch, opened.config.bit, opened.is_recorded) == ("res20", 3, False)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(opened.model(x), model.eval()(x), rtol=0, atol=0)
    torch.save({"state_dict": create_model("res20", bits=32).state_dict()}, named)
    assert open_network(tmp_path / "res20_3bit/model_best.pth.tar").config.bit == 32  # no thresholds
