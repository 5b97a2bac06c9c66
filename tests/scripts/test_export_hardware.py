"""Vectors and Verilog by ``scripts/export.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apot_fat.checkpoint import write_checkpoint
from apot_fat.models import create_model
from tests.scripts.conftest import Run

Images = tuple[Path, Path]
LINE = ("network.pth", "--arch", "vgg_tiny", "--bit", 3, "--to")


@pytest.fixture(autouse=True)
def _network(run: Run) -> None:
    write_checkpoint({"state_dict": create_model("vgg_tiny", bits=3, num_classes=3).state_dict()}, "network.pth")


def test_a_checkpoint_becomes_vectors(run: Run, tiny_npz: Images) -> None:
    line = (*LINE, "vectors", "--output", "net.npz")
    Path("net_hex").touch()
    code, _, err = run("export.py", *line, "--data", tiny_npz[1])
    assert (code, err.count("\n")) == (2, 1)
    assert "net_hex: is there, and no folder to write vectors to" in err
    Path("net_hex").unlink()
    code, out, err = run("export.py", *line, "--data", tiny_npz[1])
    assert (code, err) == (0, "")
    with np.load("net.npz") as vectors:
        assert f"and net_hex/: {len(vectors.files)} vectors of 2 images; ranges measured on 21 images" in out
        assert vectors["logits"].shape == (2, 3)
        assert {f"{name}.hex" for name in vectors.files} == {path.name for path in Path("net_hex").iterdir()}


def test_a_checkpoint_becomes_verilog(run: Run, tiny_npz: Images) -> None:
    code, _, err = run("export.py", *LINE, "verilog", "--data", tiny_npz[1], "--output", "4bit.v")
    assert (code, err.count("\n")) == (2, 1)
    assert "4bit.v: names a module of Verilog; letters, digits and underscores and .v, such as mac.v" in err
    code, out, err = run("export.py", *LINE, "verilog", "--data", tiny_npz[1], "--output", "mac.v")
    assert (code, err) == (0, "")
    assert "mac.v: and mac_tb.v, mac_terms.hex, mac_sums.hex: uniform weights of 3 bits; " in out
    assert {path.name for path in Path.cwd().glob("mac*")} == {"mac.v", "mac_tb.v", "mac_terms.hex", "mac_sums.hex"}
