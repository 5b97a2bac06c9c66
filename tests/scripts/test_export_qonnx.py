from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apot_fat.checkpoint import write_checkpoint
from apot_fat.integer.qonnx import run_qonnx
from apot_fat.models import create_model
from tests.scripts.conftest import Run

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install apot-fat[qonnx]")
pytest.importorskip("qonnx", reason="qonnx is not installed: pip install apot-fat[qonnx]")


def test_a_checkpoint_becomes_qonnx_of_either_layout(run: Run, tiny_npz: tuple[Path, Path]) -> None:
    write_checkpoint({"state_dict": create_model("vgg_tiny", bits=3, num_classes=3).state_dict()}, "network.pth")
    line = ("network.pth", "--arch", "vgg_tiny", "--bit", 3, "--to", "qonnx")
    code, _, err = run("export.py", *line, "--output", "net.onnx")
    assert (code, err.count("\n")) == (2, 1)
    assert "--to qonnx: the ranges of what is added are measured on images" in err
    pixels = np.load(tiny_npz[1])["images"]
    logits = []
    for name, options, images in (("net", (), pixels), ("last", ("--channels-last",), pixels.transpose(0, 2, 3, 1))):
        code, out, err = run("export.py", *line, "--data", tiny_npz[1], "--output", f"{name}.onnx", *options)
        assert (code, err) == (0, "")
        assert "executed by qonnx: all logits of 10 images" in out
        logits.append(run_qonnx(onnx.load(f"{name}.onnx"), images))
    assert np.array_equal(logits[0], logits[1])
    assert logits[0].shape == (21, 3)
