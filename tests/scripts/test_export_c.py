from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from apot_fat.checkpoint import write_checkpoint
from apot_fat.data import load_dataset
from apot_fat.models import create_model
from tests.integer.toolchains import PROCESSORS, needs, used
from tests.scripts.conftest import ROOT, Run

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
    needs("gcc")
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


@pytest.mark.slow
def test_digits_fit_into_a_small_processor(run: Run) -> None:
    machine = PROCESSORS["cortex-m0"]
    needs(*machine.tools)
    recipe = ROOT / "configs/digits/vggtiny_apot.toml"
    assert run("progressive.py", "--config", recipe, "--output", "digits")[0] == 0
    line = ("--to", "c", "--grid-bits", 15, "--data", "digits", "--output", "net.c")
    assert run("export.py", "digits/vgg_tiny_3bit/model_best.pth.tar", *line)[0] == 0
    test = load_dataset("digits", need_train=False).test
    pixels = test.images_NHWC.permute(0, 3, 1, 2).contiguous().numpy()  # type: ignore[union-attr]
    report = machine.build(Path.cwd(), pixels)
    correct = int((machine.run(Path.cwd()).argmax(1) == test.labels_N.numpy()).sum())
    said = run("evaluate.py", "--init", "digits/vgg_tiny_32bit/model_best.pth.tar")[1]
    of_float = int(re.findall(r"(\d+) of 360 images correct", said)[0])
    print(f"\n{report}{correct} of 360, float {of_float}")
    assert used(report, "FLASH") <= 32 << 10
    assert used(report, "RAM") <= 8 << 10
    assert correct >= of_float - 3.6
