"""What a wheel, an sdist and an editable install hold, and the wheel at work outside of any checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import apot_fat

ROOT = Path(__file__).resolve().parents[1]
# top-level folder of the checkout: folder of the package, kinds of its files
TRAVELS = {
    "apot_fat": ("apot_fat", (".py", ".c", ".v", ".css", ".html", ".js", ".md")),
    "models": ("apot_fat/models", (".py",)),
    "configs": ("apot_fat/configs", (".toml",)),
    "checkpoints": ("apot_fat/checkpoints", (".toml", ".safetensors")),
}


class Built(NamedTuple):
    sdist: Path
    wheel: Path
    unpacked: Path


def python(*argv: object, cwd: Path, path: Path | None = None) -> str:
    """Standard output of a Python process that finds packages in a folder first."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    line = [sys.executable, *map(str, argv)]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    python("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        archive.extractall(folder)
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return Built(sdist, wheel, unpacked)


@pytest.fixture(scope="session")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-compile")
    python(*pip, "--target", folder, built.wheel, cwd=folder)
    return folder


def test_wheel_holds_the_package_with_its_networks_recipes_and_checkpoints(built: Built) -> None:
    names = zipfile.ZipFile(built.wheel).namelist()
    assert len(set(names)) == len(names)
    expected = {
        f"{folder}/{path.relative_to(ROOT / top).as_posix()}"
        for top, (folder, kinds) in TRAVELS.items()
        for path in (ROOT / top).rglob("*")
        if path.suffix in kinds
    }
    about = f"apot_fat-{apot_fat.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == expected
    assert {"apot_fat/models/__init__.py", "apot_fat/checkpoints/manifest.toml"} <= expected


def test_an_sdist_holds_no_file_twice_and_runs_as_it_is(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert "models/__init__.py" in names
    assert not any(name.startswith("apot_fat/models") for name in names)
    found = python("-c", "import apot_fat.models as found; print(found.__file__)", cwd=built.unpacked)
    assert Path(found.strip()) == built.unpacked / "models/__init__.py"


@pytest.mark.slow
def test_without_links_the_networks_are_found_beside_the_package(built: Built, tmp_path: Path) -> None:
    (tmp_path / "apot_fat").mkdir()
    for part in ("__init__.py", "package_files.py", "quant", "text.py", "plain.py", "optional.py"):
        (tmp_path / "apot_fat" / part).symlink_to(ROOT / "apot_fat" / part)
    (tmp_path / "apot_fat/models").write_text("../models")  # what git leaves on Windows
    (tmp_path / "models").symlink_to(ROOT / "models")
    found = python("-c", "import apot_fat; print(apot_fat.models.__file__)", cwd=tmp_path, path=tmp_path)
    assert Path(found.strip()) == tmp_path / "models/__init__.py"


def test_an_editable_install_is_one_line_that_names_the_checkout(tmp_path: Path) -> None:
    code = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    python("-c", code, tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (link,) = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert archive.read(link).decode().strip() == str(ROOT)


def test_the_installed_wheel_finds_its_recipes_and_checkpoints(installed: Path, tmp_path: Path) -> None:
    code = (
        "from apot_fat.checkpoint import fetch_released, load_packed\n"
        "from apot_fat.training import read_recipe\n"
        "path = fetch_released('digits_resnet20_apot_3bit')[1]\n"
        "load_packed(path)\n"
        "print(read_recipe('digits/vggtiny_apot').path, path, sep='\\n')"
    )
    found = python("-c", code, cwd=tmp_path, path=installed).splitlines()
    package = installed / "apot_fat"
    assert found[0] == str(package / "configs/digits/vggtiny_apot.toml")
    assert found[1] == str(package / "checkpoints/digits_resnet20_apot_3bit.safetensors")
    assert python(installed / "bin/apot-fat", cwd=tmp_path, path=installed).startswith("usage: apot-fat COMMAND")


@pytest.mark.slow
def test_the_installed_wheel_trains_evaluates_exports_and_reports(installed: Path, tmp_path: Path) -> None:
    lines = (
        "train --data digits --arch res20 --bit 4 --epochs 1",
        "report result --output r.html",
        "evaluate --released digits_resnet20_apot_3bit",
        "export result/res20_4bit/model_best.pth.tar --to c --data digits --output net.c",
    )
    said = [python("-m", "apot_fat", *line.split(), cwd=tmp_path, path=installed) for line in lines]
    assert "recipe: digits/resnet20_apot" in said[0]
    assert (tmp_path / "r.html").stat().st_size > 100_000
    assert "358 of 360 images correct (digits, test)" in said[2]
    assert (tmp_path / "net.c").is_file()


EIGHT_LINES = """
from apot_fat import evaluate, read_recipe, report, train

recipe = read_recipe("digits/resnet20_apot")
run = train(recipe.config(4, {"epochs": 2, "output": "python"}))
print(run.best)
report("python", "python.html")
print(evaluate("digits_resnet20_apot_3bit").top1)
"""


@pytest.mark.slow
def test_the_installed_wheel_does_the_same_from_python(installed: Path, tmp_path: Path) -> None:
    said = python("-c", EIGHT_LINES, cwd=tmp_path, path=installed).split()
    assert float(said[0]) > 50
    assert said[1].startswith("99.4")
    assert (tmp_path / "python.html").is_file()
