from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from apot_fat.training import TrainConfig, find_recipe, read_recipe
from apot_fat.training.recipe import CONFIG_ROOT

RECIPES = sorted(path for path in CONFIG_ROOT.glob("*/*.toml") if path.parent.name != "sweeps")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_are_complete(path: Path) -> None:
    recipe = read_recipe(path)
    text = path.read_text()
    for word in ("command:", "hardware:", "time:", "expected:", "source:"):
        assert f"\n# {word}" in text
    for bits in recipe.chain:
        config = recipe.config(bits)
        assert config.bit == bits
        name = next((name for name in ("ours", "short") if path.stem.endswith(f"_{name}")), "published")
        if path.parent.name != "speedrun":  # named by its path alone
            assert find_recipe(config.data, config.arch, config.preset_name, name) == recipe


def test_recipes_hold_the_published_values() -> None:
    apot = read_recipe(CONFIG_ROOT / "cifar10/resnet20_apot.toml")
    assert apot.chain == (32, 4, 3, 2)
    values = {b: (apot.config(b).lr, apot.config(b).weight_decay, apot.config(b).batch_size) for b in apot.chain}
    assert values == {32: (0.1, 5e-4, 128), 4: (0.04, 1e-4, 128), 3: (0.04, 1e-4, 128), 2: (0.04, 3e-5, 128)}
    fat = read_recipe(CONFIG_ROOT / "cifar10/resnet56_fat.toml")
    assert fat.chain == (32, 5, 4, 3)
    four = fat.config(4)
    assert (four.lr, four.weight_decay, four.batch_size, four.epochs) == (0.04, 5e-4, 256, 400)
    assert (four.act_alpha_lr, four.weight_alpha_lr, four.alpha_weight_decay) == (0.1, 0.02, 1e-4)
    assert four.lr_steps == (150, 225)
    assert read_recipe(CONFIG_ROOT / "cifar10/vggsmall_fat.toml").config(3).batch_size == 128
    assert four.normalization()[1] == (0.2023, 0.1994, 0.2010)


def test_every_field_survives_a_round_trip() -> None:
    config = TrainConfig(arch="resnet_20", bit=3, mean=(0.5, 0.5, 0.5), lr_steps=(3, 5), init="x.pth")
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bit": 1.5}, "bit 1.5: choose an integer from 2 to 8, or 32"),
        ({"bit": 33}, "bit 33: choose an integer from 2 to 8, or 32"),
        ({"lr": -0.1}, "lr -0.1: expected a number above 0"),
        ({"lr": float("nan")}, "lr nan: expected a number above 0"),
        ({"lr": "fast"}, "lr 'fast': expected a number above 0"),
        ({"epochs": 0}, "epochs 0: expected an integer at least 1"),
        ({"epochs": True}, "epochs True: expected an integer at least 1"),
        ({"flip": "yes"}, "flip 'yes': expected a true-or-false value"),
        ({"schedule": "linear"}, "schedule 'linear': choose one of step, cosine, onecycle"),
        ({"lr_steps": 150}, "lr_steps 150: expected a list of integers"),
        ({"mean": [0.5]}, r"mean \[0.5\]: expected three numbers"),
        ({"val_split": 1.0}, "val_split 1.0: expected a number at least 0 and at most 0.9"),
        ({"preset": "fat"}, "preset 'fat'"),
        ({"lrr": 0.1}, "unknown key 'lrr' .did you mean 'lr'"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize("name", [option.name for option in fields(TrainConfig)])
def test_no_field_takes_a_dict(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TrainConfig.from_dict({name: {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr = 1", "unknown key 'lrr'"),
        ("lr = -1", "lr -1.0: expected a number above 0"),
        ("chain = 4", "chain 4: expected a list"),
        ("chain = [7.5]", "chain 7.5"),
        ("[bits.nine]\nlr = 1", "expected a bit-width"),
        ("[bits.4]\nfrob = 1", "unknown key 'frob'"),
        ("bits = 4", "expected tables"),
        ("lr = ", "not TOML"),
    ],
)
def test_bad_recipes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_recipe(path)
    assert str(path) in str(raised.value)


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_recipe(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not readable as text"):
        read_recipe(tmp_path / "binary.toml")


def test_without_a_recipe_nothing_is_found() -> None:
    assert find_recipe("cifar10", "resnet32", "apot-cifar") is None
    found = find_recipe("/some/folder", "vgg_7_bn", "fat-cifar-log")
    assert found is not None
    assert found.path.name == "vggsmall_fat-log.toml"
