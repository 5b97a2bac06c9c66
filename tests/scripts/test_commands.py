from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import apot_fat
from apot_fat.commands import COMMANDS, main
from apot_fat.models import create_model
from apot_fat.training import read_recipe
from apot_fat.training.recipe import CONFIG_ROOT, list_recipes
from tests.scripts.conftest import ROOT

Run = Callable[..., tuple[int, str, str]]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``apot-fat`` in a fresh folder: (exit code, standard output, standard error)."""

    def call(*argv: object, called_as: str = "/usr/bin/apot-fat") -> tuple[int, str, str]:
        logging.getLogger("apot_fat").handlers = []
        monkeypatch.setattr(sys, "argv", [called_as, *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return call


def test_without_arguments_every_command_is_listed_in_one_line(command: Command) -> None:
    code, out, err = command()
    assert (code, err) == (0, "")
    assert command("--help") == (code, out, err)
    listed = [line for line in out.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(len(line) <= 80 for line in listed)
    assert command("--version")[1] == f"apot-fat {apot_fat.__version__}\n"


@pytest.mark.parametrize("called_as", ["apot-fat", "python -m apot_fat"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_its_name_as_it_was_called(command: Command, name: str, called_as: str) -> None:
    file = "/env/bin/apot-fat" if called_as == "apot-fat" else "/env/lib/apot_fat/__main__.py"
    code, out, err = command(name, "--help", called_as=file)
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: {called_as} {name} ")
    code, out, err = command(name, "--no-such-option", called_as=file)
    assert (code, out) == (2, "")
    assert err.startswith(f"{called_as} {name}: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "meant"), [("trian", " (did you mean 'train'?)"), ("show_params", ""), ("\x1b[2J", "")]
)
def test_an_unknown_command_is_one_line_with_the_nearest(command: Command, name: str, meant: str) -> None:
    if name == "show_params":
        meant = " (did you mean 'show-params'?)"
    said = f"apot-fat: error: no command {name!r}{meant}: --help lists them\n"
    assert command(name) == (2, "", said)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"recipes"}))
def test_a_command_is_a_script_too(name: str) -> None:
    stem = name.replace("-", "_")
    script = (ROOT / "scripts" / f"{stem}.py").read_text(encoding="utf-8")
    assert f"from apot_fat.commands.{stem} import main" in script
    assert len(script.splitlines()) <= 8


def test_the_list_of_commands_needs_no_pytorch() -> None:
    code = "import sys; from apot_fat import commands; commands.COMMANDS; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for name in COMMANDS:
        assert callable(import_module(f"apot_fat.commands.{name.replace('-', '_')}").main)


def test_packaged_recipes_are_listed_and_taken_by_name(command: Command) -> None:
    code, out, err = command("recipes")
    assert (code, err) == (0, "")
    files = {f"{path.parent.name}/{path.stem}" for path in CONFIG_ROOT.glob("*/*.toml")}
    assert {line.split()[0] for line in out.splitlines()} == files
    assert all(len(line.split()) > 3 for line in out.splitlines())
    assert list(list_recipes()) == sorted(files)
    assert read_recipe("digits/vggtiny_apot").path == CONFIG_ROOT / "digits/vggtiny_apot.toml"
    code, out, _ = command("train", "--config", "digits/vggtiny_apot", "--bit", 4, "--epochs", 1)
    assert code == 0, out
    assert Path("result/vgg_tiny_4bit/config.toml").is_file()


@pytest.mark.parametrize("name", ["digits/vgg_tiny_apot", "configs/digits/vggtiny_apot.toml", "vggtiny_apot"])
@pytest.mark.parametrize("what", ["train", "progressive", "sweep"])
def test_an_unknown_recipe_is_one_line_with_the_nearest(command: Command, what: str, name: str) -> None:
    code, out, err = command(what, "--config", name)
    assert (code, out) == (2, "")
    assert err == (
        f"apot-fat {what}: error: config {name}: no such file, and no packaged recipe (did you mean "
        "'digits/vggtiny_apot'?): apot-fat recipes lists them\n"
    )


def test_a_sweep_is_taken_by_name_and_as_an_argument(command: Command) -> None:
    for argv in (("sweeps/cifar10_full",), ("--config", "sweeps/cifar10_full")):
        code, _, err = command("sweep", *argv, "--bits", 7)
        assert (code, err) == (2, "apot-fat sweep: error: --bits '7': choose of 32, 4, 3, 2, 5\n")


def test_a_checkpoint_is_exported_and_evaluated(command: Command) -> None:
    apot_fat.save_packed(create_model("res20", bits=3), "net.safetensors")
    code, out, err = command("show-params", "net.safetensors")
    assert (code, err) == (0, "")
    assert out.count("clipping threshold weight alpha") == 20
    code, out, err = command("evaluate", "--released", "digits_resnet20_apot_3bit")
    assert (code, err) == (0, "")
    assert "358 of 360 images correct (digits, test)" in out
    assert "recipe: " not in out  # none has a part in it
