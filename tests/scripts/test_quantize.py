from __future__ import annotations

import re
from pathlib import Path

import pytest

from apot_fat import load_packed
from apot_fat.quant import threshold_layers
from apot_fat.training.folder import BEST
from tests.scripts.conftest import Run

QUICK = "--reconstruct --steps 4 --joint-steps 4".split()


@pytest.fixture
def data(tiny_npz: tuple[Path, Path]) -> tuple[object, ...]:
    return "--data", tiny_npz[0], "--test-data", tiny_npz[1]


@pytest.mark.parametrize("how", [("--bits", 3), ("--bits", 4, *QUICK), ("--average", 3.5, "--method", "uniform")])
def test_a_checkpoint_becomes_a_packed_file_that_gives_the_accuracy_said(
    run: Run, data: tuple[object, ...], how: tuple[object, ...]
) -> None:
    checkpoint = f"result/vgg_tiny_32bit/{BEST}"
    assert run("train.py", "--arch", "vgg_tiny", "--bit", 32, "--epochs", 2, "--batch-size", 16, *data)[0] == 0
    code, out, err = run("quantize.py", "--init", checkpoint, "--images", 40, "--output", "small.safetensors", *how)
    assert (code, err) == (0, "")
    before, after = re.findall(r"^(\d+) of 21 correct, ", out, re.MULTILINE)
    code, evaluated, err = run("evaluate.py", "--init", checkpoint)
    assert f"{before} of 21 images correct" in evaluated
    code, evaluated, err = run("evaluate.py", "--init", "small.safetensors", *data)
    assert (code, err) == (0, "")
    assert f"{after} of 21 images correct" in evaluated
    assert f"{Path('small.safetensors').stat().st_size:,} bytes" in out
    assert re.search(r"^features\.conv1 +Conv2d ", out, re.MULTILINE)
    assert ("reconstructed on 40 images" if QUICK[0] in how else "calibrated on 40 images") in out
    layers = dict(threshold_layers(load_packed("small.safetensors")))
    bits = {layer.spec.weight_bits for layer in layers.values()}
    if "--average" in how:
        assert len(bits) > 1
        assert "bits a weight" in out
    else:
        assert bits == {how[1]}
    code, _, err = run("quantize.py", "--init", "small.safetensors", "--output", "again.safetensors")
    assert code == 2


@pytest.mark.slow
def test_it_is_the_same_file_for_the_same_seed_and_another_for_another(run: Run, data: tuple[object, ...]) -> None:
    assert run("train.py", "--arch", "vgg_tiny", "--bit", 32, "--epochs", 1, "--batch-size", 16, *data)[0] == 0
    shown = []
    for seed in (0, 0, 1):
        init = ("--init", f"result/vgg_tiny_32bit/{BEST}", "--images", 20, "--seed", seed, "--output", "q.safetensors")
        assert run("quantize.py", *init, *QUICK)[0] == 0
        shown.append([layer.quantized_weight() for _, layer in threshold_layers(load_packed("q.safetensors"))])
    assert all((a == b).all() for a, b in zip(shown[0], shown[1], strict=True))
    assert not all((a == b).all() for a, b in zip(shown[0], shown[2], strict=True))
