"""With torch, torchvision, numpy, pillow and tqdm alone all imports, networks train, and the rest says one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apot_fat.optional import MissingPackageError, needed_for

ROOT = Path(__file__).resolve().parents[1]
ABSENT = (
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "qonnx",
    "safetensors",
    "sklearn",
    "tensorboard",
    "timm",
    "tomli_w",
    "vl_convert",
)


def run_without(code: str, folder: Path) -> str:
    """What code prints where these packages are not installed, warnings being errors."""
    block = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{block}\n{code}"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "APOT_FAT_KERNELS": "eager"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CALLS = """
import importlib, json, pkgutil
from pathlib import Path
import apot_fat, apot_fat.training, apot_fat.reporting
for module in pkgutil.walk_packages(apot_fat.__path__, "apot_fat."):
    importlib.import_module(module.name)
from apot_fat.data import load_dataset
from apot_fat.models import create_model
from apot_fat.reporting import charts, draw_runs, draw_sweep, page
from apot_fat.training.board import Board
model = create_model("resnet20", bits=4)
Path("some.safetensors").touch()
calls = (
    lambda: load_dataset("digits"),
    lambda: apot_fat.save_packed(model, "net.safetensors"),
    lambda: apot_fat.load_packed("some.safetensors"),
    lambda: Board(Path("run"), apot_fat.training.TrainConfig(), 0),
    lambda: apot_fat.export_onnx(model, "net.onnx", (3, 32, 32)),
    lambda: apot_fat.integer.qonnx.clean_qonnx(None),
    lambda: draw_runs([], Path("runs.png")),
    lambda: draw_sweep([], Path("sweep.png")),
    lambda: charts.write_figures([], Path("figures")),
    page._plotting_library,
)
said = []
for call in calls:
    try:
        call()
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_what_is_missing_is_said_in_one_line_where_it_is_needed(tmp_path: Path) -> None:
    assert json.loads(run_without(CALLS, tmp_path)) == [
        "the data set 'digits' needs sklearn: pip install scikit-learn",
        "a packed file needs safetensors: pip install safetensors",
        "a packed file needs safetensors: pip install safetensors",
        "the board of curves needs matplotlib: pip install matplotlib",
        "ONNX export needs onnx: pip install 'apot-fat[export]'",
        "the export to QONNX needs qonnx: pip install 'apot-fat[qonnx]'",
        "drawing runs needs matplotlib: pip install matplotlib",
        "drawing a sweep needs matplotlib: pip install matplotlib",
        "drawing figures needs vl_convert: pip install vl-convert-python",
        "a report needs vl_convert: pip install vl-convert-python",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]


TRAINING = """
import logging
from apot_fat.training import TrainConfig, summarize, train
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout, level=logging.WARNING)
given = {"data": "train.npz", "test_data": "test.npz", "epochs": 2, "batch_size": 16, "crop_padding": 1}
train(TrainConfig(bit=4, **given))
print(summarize(train(TrainConfig(bit=4, **given), resume="auto").folder).epochs)
"""


def test_a_run_goes_on_without_its_board(tiny_npz: tuple[Path, Path]) -> None:
    said = run_without(TRAINING, tiny_npz[0].parent).splitlines()
    assert said[-1] == "2"
    boards = [line for line in said if "needs matplotlib: pip install matplotlib" in line]
    assert len(boards) == 2, said  # one a run
    assert all(line.startswith("WARNING") for line in boards)
    assert (tiny_npz[0].parent / "result/resnet20_4bit/config.toml").is_file()


def test_a_package_that_does_not_load_is_not_called_missing() -> None:
    with pytest.raises(MissingPackageError) as raised, needed_for("the board"):
        raise ImportError("libfoo.so.1: cannot\nopen", name="matplotlib.ft2font")
    assert str(raised.value) == (
        "the board needs matplotlib, which does not load (libfoo.so.1: cannot open): pip install matplotlib"
    )
