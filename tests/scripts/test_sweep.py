from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from apot_fat.checkpoint import read_checkpoint
from apot_fat.training.folder import LAST
from apot_fat.training.recipe import CONFIG_ROOT
from apot_fat.training.sweep import read_sweep

Run = Callable[..., tuple[int, str, str]]
SWEEP = """
[sweep]
methods = { apot-cifar = [32, 4], fat-cifar = [32] }
seeds = [0, 1]
chain = true
[base]
arch = "vgg_tiny"
epochs = 1
batch_size = 16
crop_padding = 1
[bits.4]
lr = 0.02
[methods.fat-cifar]
lr = 0.03
[recipes.published]
[recipes.ours]
schedule = "cosine"
[recipes.ours.bits.4]
teacher = "fp32"
distill_weight = 0.5
ema_decay = 0.5
"""


@pytest.fixture
def data(tiny_npz: tuple[Path, Path]) -> tuple[object, ...]:
    return "--data", tiny_npz[0], "--test-data", tiny_npz[1], "--output", "out"


def results() -> list[dict[str, str]]:
    return list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))


def test_a_sweep_runs_what_is_not_finished_and_its_tables_come_from_its_csv(run: Run, data: tuple[object, ...]) -> None:
    Path("sweep.toml").write_text(SWEEP)
    line = ("sweep.py", "--config", "sweep.toml", *data)
    code, out, err = run(*line, "--seeds", 0, "--recipes", "ours")
    assert (code, err) == (0, "")
    assert [row["recipe"] for row in results()] == ["ours"] * 3
    assert "results.png" not in out  # no gain over what has not been run
    four = Path("out/ours/apot-cifar/seed0/vgg_tiny_4bit") / LAST
    config = read_checkpoint(four)["config"]
    assert config["init"] == "out/ours/apot-cifar/seed0/vgg_tiny_32bit/model_best.pth.tar"
    assert (config["lr"], config["schedule"], config["preset"]) == (0.02, "cosine", "apot-cifar")
    stamp = four.stat().st_mtime_ns
    code, out, err = run(*line, "--seeds", 0)
    assert (code, err) == (0, "")
    assert four.stat().st_mtime_ns == stamp
    rows = results()
    assert [(row["recipe"], row["method"], row["bits"]) for row in rows] == [
        (recipe, method, bits)
        for recipe in ("published", "ours")
        for method, bits in (("apot-cifar", "32"), ("apot-cifar", "4"), ("fat-cifar", "32"))
    ]
    assert all(row["seed"] == "0" and row["epochs"] == "1" and float(row["seconds"]) > 0 for row in rows)
    assert Path("out/results.png").is_file()
    assert Path("out/seconds.png").is_file()
    code, stored, err = run("sweep.py", "--table", "out/results.csv")
    assert (code, err) == (0, "")
    assert stored in out


def test_what_builds_on_a_diverged_run_is_skipped_and_named(run: Run, data: tuple[object, ...]) -> None:
    Path("sweep.toml").write_text(
        SWEEP.replace("lr = 0.03", "lr = 0.03\n[recipes.wild]\n[recipes.wild.bits.32]\nlr = 1e30")
    )
    line = ("sweep.py", "--config", "sweep.toml", *data, "--seeds", 0, "--methods", "apot-cifar", "--epochs", 2)
    line = (*line, "--checkpoint-every", 1, "--baseline", "ours")
    for _ in range(2):  # a second time too, when the half-trained checkpoint is there
        code, out, err = run(*line, "--recipes", "wild,ours")
        assert code == 3
        assert err.count("\n") == 1
        assert "wild apot-cifar 32 bits seed 0 did not stay finite" in err
        assert "wild apot-cifar 4 bits seed 0 skipped, as it builds on wild apot-cifar 32 bits seed 0" in err
        assert [row["recipe"] for row in results()] == ["ours"] * 2
        assert "| ours |" in out
    assert Path("out/wild/apot-cifar/seed0/vgg_tiny_32bit").is_dir()
    assert not Path("out/wild/apot-cifar/seed0/vgg_tiny_4bit").exists()
    code, _, err = run(*line, "--recipes", "wild", "--bits", 4)
    assert code == 2
    assert "starts from wild apot-cifar 32 bits seed 0, which is not finished; run that too" in err


@pytest.mark.parametrize("path", sorted((CONFIG_ROOT / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_every_cell_of_the_stored_sweeps_is_a_run(path: Path) -> None:
    sweep = read_sweep(path)
    for word in ("command:", "hardware:", "time:", "expected:", "source:"):
        assert f"\n# {word}" in path.read_text()
    named = (
        {"teacher": "teacher.pth", "init": "init.pth"} if path.stem in ("cifar10_ablation", "cifar10_budget") else {}
    )
    overrides = {"output": "out", **named}
    configs = [sweep.config(cell, overrides) for cell in sweep.cells]
    assert len({(config.output, config.run_name) for config in configs}) == len(configs)


def test_the_full_sweep_takes_the_recipe_files_and_runs_at_a_tiny_size(run: Run, data: tuple[object, ...]) -> None:
    sweep = read_sweep(CONFIG_ROOT / "sweeps/cifar10_full.toml")
    epochs = {(c.recipe, c.method): sweep.config(c, {"output": "out"}).epochs for c in sweep.cells}
    assert epochs == {
        ("published", "apot-cifar"): 300,
        ("published", "fat-cifar"): 400,
        ("ours", "apot-cifar"): 150,
        ("ours", "fat-cifar"): 200,
    }
    tiny = ("--epochs", 1, "--batch-size", 16, "--warmup", 0, "--crop-padding", 1, "--compile", "off", "--seeds", 0)
    code, out, err = run("sweep.py", "--config", sweep.path, *data, *tiny, "--methods", "fat-cifar")
    assert (code, err) == (0, "")
    assert "| ours |" in out
    assert len(Path("out/results.csv").read_text().splitlines()) == 1 + 4 + 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[recipes]\n", "no recipe"),
        (
            SWEEP.replace("[recipes.published]", '[recipes."../../out"]'),
            "recipe '../../out' names a folder: choose letters",
        ),
        (SWEEP.replace("[recipes.published]", '[recipes."/tmp/out"]'), "recipe '/tmp/out' names a folder"),
        (SWEEP.replace("[recipes.published]", '[recipes."=1+1"]'), "recipe '=1+1' names a folder"),
        ("[sweeps]\n", "unknown key 'sweeps' (did you mean 'sweep'?)"),
        (SWEEP.replace("seeds", "seed"), "unknown key 'seed' (did you mean 'seeds'?)"),
        (SWEEP.replace("[0, 1]", "[0.5]"), "expected a list of integers from 0 up"),
        (SWEEP.replace("apot-cifar", "apot-cifra"), "method 'apot-cifra' (did you mean 'apot-cifar'?)"),
        (SWEEP.replace("[32, 4]", "[]"), "apot-cifar []: expected bit-widths, such as [4, 3, 2]"),
        (SWEEP.replace("[32, 4]", "[31]"), "apot-cifar 31: choose an integer"),
        (SWEEP.replace("lr = 0.02", "lrr = 1"), "[bits.4]: unknown key 'lrr' (did you mean 'lr'?)"),
        (SWEEP.replace("lr = 0.02", "lr = -1"), "lr -1.0: expected a number above 0"),
        (SWEEP.replace("chain = true", "chain = 3"), "chain 3: expected true or false"),
        (SWEEP.replace("[recipes.published]", "[recipes.theirs]"), "baseline 'published': choose one of theirs, ours"),
        (SWEEP.replace("[recipes.ours]", '[recipes.ours]\nconfig = "their"'), "no recipe 'their' for vgg_tiny"),
        (SWEEP.replace('teacher = "fp32"', ""), "name the network to distil from with --teacher"),
    ],
)
def test_bad_sweeps_are_one_line(run: Run, text: str, message: str) -> None:
    path = Path.cwd().parent / "sweep.toml"
    path.write_text(text)
    code, out, err = run("sweep.py", "--config", path)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(Path.cwd().iterdir())


def test_bad_options_are_one_line(run: Run) -> None:
    path = Path.cwd().parent / "sweep.toml"
    path.write_text(SWEEP)
    for argv, message in (
        ((), "no sweep: name a file of configs/sweeps/ with --config"),
        (("--config", path, "--bit", 4), "--bit 4: the sweep has its own; run a part of it with --bits"),
        (("--config", path, "--recipe", "ours"), "run a part of it with --recipes"),
        (("--config", path, "--methods", "lsq"), "--methods 'lsq': choose of apot-cifar, fat-cifar"),
        (("--config", path, "--by", "top5"), "--by 'top5': choose one of top1, best, val_top1"),
        (("--config", path, "--baseline", "theirs"), "--baseline 'theirs': choose one of published, ours"),
        (("--config", path, "--by", "val_top1"), "--by val_top1: published apot-cifar 32 bits seed 0 holds no images"),
        (("--config", path, "--figure", "a.png"), "--figure and --seconds go with --table FILE.csv"),
        (("--table", "absent.csv"), "results absent.csv: not readable as CSV"),
    ):
        code, _, err = run("sweep.py", *argv)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    code, _, err = run("train.py", "--recipe", "theirs")
    assert code == 2
    assert "configs/ has none" in err


def test_a_chain_starts_from_the_network_that_its_recipe_file_names(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(
        "[sweep]\nmethods = { apot-cifar = [4, 3] }\nchain = true\nbaseline = 'tiny'\n"
        "[recipes.tiny]\nconfig = 'digits/vggtiny_apot'\n"
    )
    sweep = read_sweep(path)
    first, second = (sweep.config(cell, {"output": "out"}) for cell in sweep.cells)
    assert second.init == f"{first.output}/{first.run_name}/model_best.pth.tar"
