"""TOML files that no parser likes, and values of other types: one line that names the file, at once."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from apot_fat.training import TrainConfig
from apot_fat.training.recipe import find_recipe, read_recipe, read_toml
from apot_fat.training.sweep import read_sweep

BRACKETS = "[" * 100_000
DEEP = {
    "open brackets": "lr = " + BRACKETS,
    "lists": "lr = " + "[" * 150 + "]" * 150,
    "tables": "lr = " + "{a = " * 110 + "1" + "}" * 110,
    "dots": "lr" + ".a" * 200_000 + " = 1",
    "dots with spaces": "lr" + ' . "a"' * 200_000 + " = 1",
    "a head": "[lr" + ".a" * 20_000 + "]",
    "a head and dots": "[lr" + ".a" * 60 + "]\na" + ".a" * 60 + " = 1",
}
NO_TOML = [BRACKETS, "lr = " + "9" * 5000, "\0", "a = 1\na = 2", "lr = '''", "[a]\n[a]"]
LARGE = "9" * 400


@pytest.mark.parametrize("kind", DEEP)
def test_deep_nesting_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text(DEEP[kind])
    for read in (read_toml, read_recipe, read_sweep):
        begun = time.process_time()
        with pytest.raises(ValueError, match=rf"^config {path}: nested more than 100 levels deep"):
            read(path)
        assert time.process_time() - begun < 5


@pytest.mark.parametrize("text", NO_TOML, ids=range(len(NO_TOML)))
def test_what_is_no_toml_names_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^config {path}: not TOML \("):
        read_toml(path)


def test_long_lists_names_and_sentences_are_not_nested(tmp_path: Path) -> None:
    path = tmp_path / "long.toml"
    path.write_text(f"std = [{','.join(['0.25'] * 300)}]\ndata = '{'a.b/' * 80}'\n# {'x. ' * 90}\n")
    assert len(read_toml(path)["std"]) == 300


@pytest.mark.parametrize(
    "text",
    ["lr = " + LARGE, "chain = [4]\nbit = [4]", "chain = [4]\nbit = {}", "chain = [[4]]", "arch = 5", "arch = {}"],
)
def test_values_of_other_types_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^config {path}: "):
        read_recipe(path)


@pytest.mark.parametrize(
    ("grid", "base", "message"),
    [
        ("baseline = [1]", "", "baseline [1]: choose one of published"),
        ("baseline = {}", "", "baseline {}: choose one of published"),
        ("", "arch = [1]", "architecture [1]: expected its name"),
        ("", "arch = {}", "architecture {}: expected its name"),
        ("", "data = 5", "data 5: expected a string"),
        ("", "lr = " + LARGE, f"lr {LARGE}: expected a number"),
    ],
)
def test_values_of_other_types_are_refused_in_a_sweep(grid: str, base: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    head = '[sweep]\nmethods = {"apot-cifar" = [4]}\n'
    path.write_text(f'{head}{grid}\n[base]\n{base}\n[recipes.published]\nconfig = "published"\n')

    def read() -> None:
        sweep = read_sweep(path)
        sweep.config(sweep.cells[0], {"output": "out"})

    with pytest.raises(ValueError, match=re.escape(message)):
        read()


def test_names_that_are_too_long_for_a_file() -> None:
    assert find_recipe("digits", "resnet20", "apot-cifar", "a" * 300) is None
    with pytest.raises(ValueError, match="no such file"):
        read_toml("a" * 300)
    with pytest.raises(ValueError, match=f"lr {LARGE}: expected a number"):
        TrainConfig(lr=int(LARGE))
