"""A network of one's own on the command lines: --model FILE.py:FUNCTION."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from apot_fat import clipping_table, quantize, save_packed
from apot_fat.quant.layers import threshold_line

Run = Callable[..., tuple[int, str, str]]
NETWORK = """
from torch import nn


def own_convnet():
    convs = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
"""


def test_files_of_a_network_of_ones_own(run: Run, tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(NETWORK)
    namespace: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(NETWORK, namespace)
    model = namespace["own_convnet"]()
    torch.save(model.state_dict(), tmp_path / "float.pth")
    named = ("--model", f"{own}:own_convnet")
    data = ("--data", tiny_npz[0], "--test-data", tiny_npz[1])
    code, out, err = run(
        "quantize.py", "--init", "../float.pth", *named, *data, "--bits", 4, "--output", "q.safetensors"
    )
    assert (code, err) == (0, "")
    correct = re.findall(r"^([\d,]+) of 21 correct", out, re.MULTILINE)
    code, out, err = run("evaluate.py", "--init", "q.safetensors", *named, *data)
    assert (code, err) == (0, "")
    assert f"{correct[1]} of 21 images correct" in out
    code, out, err = run("report.py", "q.safetensors", *named, "--data", tiny_npz[1], "--output", "q.html")
    assert (code, err) == (0, "")
    assert "own_convnet" in Path("q.html").read_text()
    code, out, err = run(
        "export.py", "q.safetensors", *named, "--image-size", 8, "--to", "packed", "--output", "r.safetensors"
    )
    assert (code, err) == (0, "")
    quantize(model, bits=4)
    save_packed(model, "own.safetensors")
    code, out, err = run("show_params.py", "own.safetensors")
    assert (code, err) == (0, "")
    lines = [threshold_line(layer.weight_alpha, layer.act_alpha) for layer in clipping_table(model)]
    assert out.splitlines() == lines
    for argv, message in (
        ((), "give one to fill as model (--model)"),
        (("--model", "absent.py:own_convnet"), "'absent.py' does not run (FileNotFoundError"),
        (("--model", f"{own}:large"), "no function large in"),
        (("--model", "own"), "--model own: expected FILE.py:FUNCTION"),
    ):
        code, _, err = run("evaluate.py", "--init", "own.safetensors", *argv, *data)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
