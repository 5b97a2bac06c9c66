"""Nothing of the user's is overwritten, and text from outside steers no terminal and no spreadsheet."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apot_fat import cost_report, quantize
from apot_fat.checkpoint import atomic_write, write_checkpoint
from apot_fat.models import create_model
from apot_fat.text import csv_cell, printable

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]
CLEAR = "\x1b[2J"  # clears a terminal


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Files and links of folders are what they were: contents, targets, kinds."""

    def state() -> dict[Path, object]:
        found: dict[Path, object] = {}
        for folder in folders:
            for path in sorted(folder.rglob("*")):
                plain = path.is_file() and not path.is_symlink()
                found[path] = path.read_bytes() if plain else path.is_symlink() and os.readlink(path)
        return found

    before = state()
    yield
    assert state() == before


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A 4-bit checkpoint."""
    path = tmp_path / "network.pth"
    write_checkpoint({"state_dict": create_model("res20", bits=4).state_dict()}, path)
    return path


def test_outputs_onto_inputs_devices_and_other_files_are_refused(run: Run, network: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine\n")
    (tmp_path / "table.csv").write_text("recipe,method,bits,seed,epochs,top1,seconds\na,apot-cifar,4,0,1,50,1\n")
    os.mkfifo(tmp_path / "pipe")
    links = {"to_network": network, "to_device": Path("/dev/null"), "to_notes": tmp_path / "notes.txt"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    bit = ("--arch", "res20", "--bit", 4)
    outputs = [network, tmp_path / "to_network", tmp_path / "to_device", tmp_path / "to_notes", tmp_path / "notes.txt"]
    outputs += [tmp_path / "pipe", tmp_path, Path("/dev/null")]
    cases: list[tuple[str, tuple[object, ...]]] = []
    for output in outputs:
        cases.append(("export.py", (network, *bit, "--to", "packed", "--output", output)))
        cases.append(("report.py", (network, *bit, "--output", output)))
        cases.append(("benchmark.py", ("step", "--json", output)))
        cases.append(("gpu_check.py", ("--quick", "--json", output)))
    cases.append(("sweep.py", ("--table", tmp_path / "table.csv", "--figure", tmp_path / "table.csv")))
    with unchanged(tmp_path):
        for script, argv in cases:
            code, _, err = run(script, *argv)
            assert (code, err.count("\n")) == (2, 1), (script, argv, err)
            assert "name a" in err, err
    assert Path("/dev/null").is_char_device()


def test_a_file_is_written_through_a_link_that_stays(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "folder/target"
    target.parent.mkdir()
    target.write_text("before")
    link.symlink_to(target)
    with atomic_write(link) as temporary:
        temporary.write_text("after")
    assert (link.is_symlink(), target.read_text()) == (True, "after")
    with pytest.raises(ValueError, match="a folder, a device or a pipe"), atomic_write("/dev/null"):
        pass


def test_text_from_outside_does_not_steer_a_terminal(run: Run, tmp_path: Path) -> None:
    state = create_model("res20", bits=4).state_dict()
    hostile = tmp_path / "hostile.pth"
    write_checkpoint({"state_dict": state | {f"{CLEAR}layer.act_alpha": torch.tensor(1.0)}}, hostile)
    named = tmp_path / f"{CLEAR}.pth"
    write_checkpoint({"state_dict": state}, named)
    for part in ("train", "test"):
        (tmp_path / f"{CLEAR}images" / part / f"class{CLEAR}").mkdir(parents=True)
        image = tmp_path / f"{CLEAR}images" / part / f"class{CLEAR}" / f"{CLEAR}.png"
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image)
    (tmp_path / f"{CLEAR}images/test/other{CLEAR}").mkdir()
    for script, argv in (
        ("show_params.py", (hostile,)),
        ("show_params.py", (hostile, "--table")),
        ("show_params.py", (hostile, "--csv")),
        ("show_params.py", (hostile, "--json")),
        ("evaluate.py", ("--init", hostile, "--bit", 4)),
        ("evaluate.py", ("--init", tmp_path / f"absent{CLEAR}")),
        ("evaluate.py", ("--init", named, "--arch", "res20", "--bit", 4, "--data", f"absent{CLEAR}")),
        ("export.py", (named, "--arch", "res20", "--bit", 4, "--to", "packed", "--output", f"{CLEAR}.safetensors")),
        ("train.py", ("--data", tmp_path / f"{CLEAR}images", "--epochs", 1, "--batch-size", 1)),
        ("train.py", (f"--{CLEAR}", 1)),
        ("train.py", ("--preset", CLEAR)),
    ):
        _, out, err = run(script, *argv)
        assert "\x1b" not in out + err, (script, argv)
        assert out + err
    assert printable("a\u202eb\x9bc\udc80d") == "a\\u202eb\\x9bc\\udc80d"
    assert printable("× █ é 中\n\t") == "× █ é 中\n\t"


def test_no_cell_of_a_csv_is_a_formula(run: Run, tmp_path: Path) -> None:
    names = ("=1+1", "+1", "-1", "@sum(a1)")
    state = {f"{name}.act_alpha": torch.tensor(1.0) for name in names}
    write_checkpoint({"state_dict": state}, tmp_path / "net.pth")
    _, out, _ = run("show_params.py", tmp_path / "net.pth", "--csv")
    assert [row[0] for row in csv.reader(out.splitlines())] == ["layer", *(f"'{name}" for name in names)]
    net = torch.nn.Sequential()
    net.add_module("=cmd", torch.nn.Conv2d(3, 4, 1))
    net.add_module("last", torch.nn.Conv2d(4, 2, 1))
    quantize(net, bits=4)
    assert "\n'=cmd," in cost_report(net, (3, 8, 8)).to_csv()
    assert csv_cell(-1.5) == -1.5


def test_an_ascii_terminal_gets_question_marks(network: Path) -> None:
    line = [sys.executable, str(ROOT / "scripts/show_params.py"), str(network), "--table"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"weight ?" in done.stdout
