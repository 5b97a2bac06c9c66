from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from apot_fat.checkpoint import write_checkpoint
from apot_fat.models import create_model
from tests.scripts.conftest import Run

Images = tuple[Path, Path]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A 3-bit checkpoint of the smallest network."""
    path = tmp_path / "network.pth"
    state = create_model("vgg_tiny", bits=3, num_classes=3).state_dict()
    write_checkpoint({"state_dict": state}, path)
    return path


@pytest.mark.parametrize("options", [(), ("--multiply", "--grid-bits", 15)])
def test_a_checkpoint_becomes_c_that_prints_logits(
    run: Run, network: Path, tiny_npz: Images, options: tuple[object, ...]
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: apt-get install gcc")
    line = ("--arch", "vgg_tiny", "--bit", 3, "--to", "c", "--data", tiny_npz[1], "--output", "tiny_3bit.c")
    code, out, err = run("export.py", network, *line, *options)
    assert (code, err) == (0, "")
    assert "tiny_3bit.c: and tiny_3bit.h: " in out
    assert "ranges measured on 21 images" in out
    subprocess.run(["gcc", "-std=c99", "-O2", "-DTINY_3BIT_MAIN", "tiny_3bit.c", "-o", "tiny"], check=True)
    pixels = np.load(tiny_npz[1])["images"]
    done = subprocess.run(["./tiny"], input=pixels.tobytes(), capture_output=True, check=True)
    logits = np.array([line.split() for line in done.stdout.splitlines()], int)
    assert logits.shape == (21, 3)
    assert (run("export.py", network, *line, *options)[0], len(set(map(tuple, logits)))) == (0, 21)  # written again


def test_what_cannot_be_c_is_one_line(run: Run, network: Path, tiny_npz: Images, tmp_path: Path) -> None:
    full = tmp_path / "full.pth"
    write_checkpoint({"state_dict": create_model("vgg_tiny", bits=32, num_classes=3).state_dict()}, full)
    network_line = ("--arch", "vgg_tiny", "--bit", 3, "--to", "c")
    data = ("--data", tiny_npz[1])
    cases: list[tuple[tuple[object, ...], str]] = [
        ((network, *network_line, "--output", "net.c"), "--to c: the ranges of what is added are measured on images"),
        ((network, *network_line, *data, "--output", "net-3.c"), "net-3.c: names functions of C; letters, digits and"),
        ((network, *network_line, *data, "--output", "net"), "net: names functions of C"),
        ((network, *network_line, *data, "--grid-bits", 40, "--output", "net.c"), "grid_bits 40: choose 8 to 26"),
        (
            (full, "--arch", "vgg_tiny", "--bit", 32, "--to", "c", *data, "--output", "net.c"),
            "layer features.conv0: Conv2d is float; quantize it",
        ),
    ]
    for argv, message in cases:
        code, _, err = run("export.py", *argv)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert not list((tmp_path / "work").iterdir())
