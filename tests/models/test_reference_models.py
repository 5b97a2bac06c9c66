from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from apot_fat import load_weights
from apot_fat.models import create_model

CIFAR = [
    "apot-cifar/res20/bit3",
    "apot-cifar/res20/bit32",
    "apot-cifar/res56/bit4",
    "fat-cifar/resnet_20/bit4",
    "fat-cifar/resnet_20/bit32",
    "fat-cifar/vgg_7_bn/bit3",
]


@pytest.mark.parametrize("entry", CIFAR)
def test_published_names_load_strictly_and_logits_agree(reference: Path, entry: str) -> None:
    filler = load_module(reference / "reference/fill_state_dict.py")
    shapes = json.loads((reference / "reference/models_keys.json").read_text())[entry]
    preset, arch, bits = entry.split("/")
    model = create_model(arch, preset, int(bits.removeprefix("bit"))).eval()
    load_weights(model, filler.fill_state_dict(shapes, 0))
    with torch.no_grad():
        logits = model(filler.model_input(32, 0))
    expected = torch.from_numpy(np.load(reference / "reference/models.npz")[entry])
    errors = (logits - expected).abs().amax(1) / expected.abs().amax(1)
    # one value on the edge between two levels can move one image's logits by a tenth
    assert (errors < 1e-3).sum() >= 3, errors


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
