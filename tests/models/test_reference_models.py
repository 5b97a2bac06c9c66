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

ENTRIES = [
    "apot-cifar/res20/bit3",
    "apot-cifar/res20/bit32",
    "apot-cifar/res56/bit4",
    "fat-cifar/resnet_20/bit4",
    "fat-cifar/resnet_20/bit32",
    "fat-cifar/vgg_7_bn/bit3",
    "apot-imagenet/resnet18/bit2",
    "apot-imagenet/resnet18/bit5",
    "apot-imagenet/resnet50/bit4",
    "fat-imagenet/resnet_18/bit4",
    "fat-imagenet/mobilenet_v2/bit5",
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_published_names_load_strictly_and_logits_agree(reference: Path, entry: str) -> None:
    filler = load_module(reference / "reference/fill_state_dict.py")
    shapes = json.loads((reference / "reference/models_keys.json").read_text())[entry]
    preset, arch, bits = entry.split("/")
    model = create_model(arch, preset, int(bits.removeprefix("bit"))).eval()
    load_weights(model, filler.fill_state_dict(shapes, 0))
    torch.set_num_threads(2)  # how a convolution's sums are divided decides which values fall on an edge
    with torch.no_grad():
        logits = model(filler.model_input(32 if "cifar" in preset else 64, 0))
    expected = torch.from_numpy(np.load(reference / "reference/models.npz")[entry])
    errors = (logits - expected).abs().amax(1) / expected.abs().amax(1)
    torch.set_num_threads(1)
    # one value on the edge between two levels can move one image's logits by a tenth
    assert (errors < 1e-3).sum() >= 3, errors


def test_no_entry_is_left_out(reference: Path) -> None:
    assert set(np.load(reference / "reference/models.npz").files) == set(ENTRIES)


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
