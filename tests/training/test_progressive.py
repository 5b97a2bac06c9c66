"""Chains of bit-widths: what each stage starts and learns from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from apot_fat.checkpoint import read_checkpoint
from apot_fat.evaluation import evaluate
from apot_fat.training import read_recipe, train_chain
from apot_fat.training.folder import LAST
from apot_fat.training.progressive import chain_configs
from apot_fat.training.sweep import Cell, read_sweep

BEST = "model_best.pth.tar"


def test_each_stage_starts_from_the_one_before() -> None:
    recipe = read_recipe("cifar10/resnet20_apot")
    configs = chain_configs(recipe, (32, 4, 3), {"output": "out"})
    assert [config.init for config in configs] == [None, f"out/resnet20_32bit/{BEST}", f"out/resnet20_4bit/{BEST}"]
    first, second = chain_configs(recipe, (4, 3), {"output": "out", "init": "float.pth"})
    assert (first.init, second.init) == ("float.pth", f"out/resnet20_4bit/{BEST}")


def test_or_from_the_float_network_and_learns_from_it() -> None:
    recipe = read_recipe("speedrun/resnet20_apot")
    configs = chain_configs(recipe, (32, 4, 3), {"output": "out"})
    assert [config.init for config in configs] == ["none", "fp32", "fp32"]
    assert configs[0].weights_path(configs[0].init) is None
    for config in configs[1:]:
        assert config.weights_path(config.init) == config.weights_path(config.teacher) == f"out/resnet20_32bit/{BEST}"
    # a chain without the float network starts from one, and each of its stages does
    for config in chain_configs(recipe, (4, 3), {"output": "out", "init": "float.pth"}):
        assert (config.init, config.teacher) == ("float.pth", "float.pth")
    (config,) = chain_configs(recipe, (4,), {"init": "float.pth", "teacher": "other.pth"})
    assert (config.init, config.teacher) == ("float.pth", "other.pth")
    (config,) = chain_configs(recipe, (4,), {"output": "before"})
    assert config.weights_path(config.init) == f"before/resnet20_32bit/{BEST}"


def test_the_sweep_of_the_speed_run_is_its_recipe_five_times() -> None:
    sweep = read_sweep("sweeps/speedrun")
    recipe = read_recipe("speedrun/resnet20_apot")
    assert len(sweep.cells) == 20
    for cell in sweep.cells:
        config = sweep.config(cell, {"output": "out"})
        folder = f"out/speedrun/apot-cifar/seed{cell.seed}"
        assert config == recipe.config(cell.bits, {"output": folder, "seed": cell.seed})
    # each starts from the float network, whether the chain trains one or not
    own = sweep.config(Cell("speedrun", "apot-cifar", 3, 0), {"output": "out", "init": "float.pth"})
    assert (own.init, own.teacher) == ("fp32", "fp32")
    without = replace(sweep, methods={"speedrun": {"apot-cifar": [4, 3]}})
    given = without.config(Cell("speedrun", "apot-cifar", 3, 0), {"output": "out", "init": "float.pth"})
    assert (given.init, given.teacher) == ("float.pth", "float.pth")


@pytest.mark.slow
def test_the_speed_run_at_a_small_size(tmp_path: Path) -> None:
    small = {"data": "digits", "batch_size": 64, "crop_padding": 1, "flip": False, "compile": "off", "epochs": 12}
    recipe = read_recipe("speedrun/resnet20_apot")
    recipe.by_bits[32]["lr"] = 0.1  # of batches this small
    summaries = train_chain(recipe, recipe.chain, {**small, "output": str(tmp_path)})
    assert [summary.bits for summary in summaries] == [32, 4, 3, 2]
    assert all(summary.last > 95 for summary in summaries), summaries
    config = read_checkpoint(tmp_path / "resnet20_2bit" / LAST)["config"]
    assert (config["init"], config["teacher"], config["optimizer"]) == ("fp32", "fp32", "adam")


def test_each_stage_has_the_images_it_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'arch = "vgg_tiny"\ndata = "digits"\nepochs = 1\ncompile = "off"\nchain = [4, 3]\n'
        "[bits.3]\nval_split = 0.2\nimage_size = 16\n"
    )
    recipe = read_recipe(path)
    four, three = train_chain(recipe, recipe.chain, {"output": str(tmp_path)})
    assert (four.best_on, three.best_on) == ("test", "val")
    assert evaluate(three.folder / LAST).top1 == three.last
    with pytest.raises(ValueError, match=r"chain \(\): expected bit-widths in order"):
        train_chain(recipe, ())
