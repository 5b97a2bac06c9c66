from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import apot_fat

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {"README.md", "LICENSE", "pyproject.toml", "Makefile"}
TOP_LEVEL |= {"apot_fat", "models", "scripts", "configs", "tests", "checkpoints"}


def modules() -> list[str]:
    found = pkgutil.walk_packages(apot_fat.__path__, "apot_fat.")
    return ["apot_fat", *(module.name for module in found)]


def test_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == apot_fat.__version__


def test_top_level_holds_what_the_design_says() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL


def test_lower_rooms_do_not_import_higher_ones() -> None:
    rooms = ["quant", "integer", "models", "data", "checkpoint", "training", "reporting", "export"]
    allowed = {
        "quant": set(),
        "models": {"quant"},
        "data": {"quant"},
        "checkpoint": {"quant", "models"},
        "training": {"quant", "models", "data", "checkpoint"},
        "reporting": {"quant", "models", "data", "checkpoint", "training"},
        "integer": {"quant"},
        "export": {"quant", "models", "checkpoint", "integer"},
    }
    for room in rooms:
        for path in (ROOT / "apot_fat" / room).rglob("*.py"):
            for line in path.read_text().splitlines():
                if line.lstrip().startswith("from apot_fat."):
                    imported = line.split("apot_fat.")[1].split(".")[0].split()[0]
                    assert imported in {room, "text", "optional", "plain", "package_files", *allowed[room]}, (
                        f"{path}: {line}"
                    )


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_has_a_docstring() -> None:
    for name in modules():
        module = importlib.import_module(name)
        assert module.__doc__, name
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if callable(value):
                assert value.__doc__, f"{name}.{public}"
