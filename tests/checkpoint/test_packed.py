from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from apot_fat import load_packed, load_weights, quantize, save_packed, set_bits
from apot_fat.checkpoint.packed import pack_bits, unpack_bits
from apot_fat.models import create_model
from apot_fat.quant import PRESETS


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("bits", [1, 3, 8, 9])
def test_bits_have_no_gaps(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 5))
    packed = pack_bits(codes, bits)
    assert packed.shape == (-(-35 * bits // 8),)
    assert torch.equal(unpack_bits(packed, bits, 35), codes.flatten())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_a_packed_network_computes_the_same_to_the_bit(name: str, bits: int, tmp_path: Path) -> None:
    model = create_model("resnet20", name, bits, num_classes=3)
    x = torch.randn(3, 3, 8, 8)
    model.train()(x)  # running statistics that are not the initial ones
    expected = logits(model, x)
    path = tmp_path / "model.safetensors"
    size = save_packed(model, path)
    assert size == path.stat().st_size < 271_000 * bits / 8 + 20_000
    loaded = load_packed(path)
    torch.testing.assert_close(logits(loaded, x), expected, atol=0, rtol=0)
    save_packed(loaded, tmp_path / "again.safetensors")
    torch.testing.assert_close(logits(load_packed(tmp_path / "again.safetensors"), x), expected, atol=0, rtol=0)
    loaded.train()(x).sum().backward()


def own_network() -> nn.Sequential:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU(), shared, nn.ReLU(), shared, nn.Conv2d(4, 6, 1, groups=2),
        nn.Flatten(), nn.Linear(96, 8), nn.Linear(8, 2),
    )  # fmt: skip


def test_a_network_of_one_s_own(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 4, 4), tmp_path / "own.safetensors"
    model = own_network()
    quantize(model, 4, "fat", calibration=x, exclude=["6"], overrides={"8": {"weight_bits": 32, "act_bits": 5}})
    set_bits(model, 3)
    expected = logits(model, x)
    save_packed(model, path)
    with pytest.raises(ValueError, match=r"not one of list_models\(\): give one"):
        load_packed(path)
    float_network = own_network()
    loaded = load_packed(path, float_network)
    assert loaded is float_network
    assert float_network[3] is float_network[5]
    torch.testing.assert_close(logits(loaded, x), expected, atol=0, rtol=0)
    torch.testing.assert_close(logits(load_packed(path, copy.deepcopy(model)), x), expected, atol=0, rtol=0)
    other = nn.Sequential(*own_network(), nn.Linear(2, 2))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="missing"):
        load_packed(path, other)
    torch.testing.assert_close(dict(other.state_dict()), dict(before), atol=0, rtol=0)
    assert type(other[0]) is nn.Conv2d


def test_a_weight_without_a_positive_maximum_and_a_negative_threshold(tmp_path: Path) -> None:
    model = create_model("resnet20", "apot-cifar", 3)
    with torch.no_grad():
        model.conv1.weight.abs_().neg_()  # type: ignore[union-attr,operator]
        model.fc.weight[0, 0] = -50.0  # type: ignore[union-attr,operator]
        for layer in model.modules():
            if getattr(layer, "act_alpha", None) is not None:
                layer.act_alpha.neg_()  # type: ignore[operator]
                break
    x = torch.rand(2, 3, 8, 8)
    save_packed(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(load_packed(tmp_path / "a.safetensors"), x), logits(model, x), atol=0, rtol=0)


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    tied = own_network()
    quantize(tied, 3)
    tied[8].weight = tied[9].weight = nn.Parameter(torch.rand(8, 8))
    for model, message in (
        (own_network(), "nothing to pack"),
        (create_model("resnet20", "apot-imagenet-pot", 8), "use fewer bits"),
        (tied, "share one weight"),
    ):
        with pytest.raises(ValueError, match=message):
            save_packed(model, tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())


def test_bad_files(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_packed(create_model("resnet20", "apot-cifar", 3), good)
    content = good.read_bytes()
    with safe_open(good, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    first = next(name for name in tensors if name.endswith("conv2.weight"))

    def foreign(changed: dict[str, torch.Tensor], said: dict[str, str] | None) -> bytes:
        save_file(changed, bad, said)
        return bad.read_bytes()

    for data, message in (
        (content[:-100], "not a safetensors file, or damaged"),
        (content[:5], "not a safetensors file, or damaged"),
        (b"", "not a safetensors file, or damaged"),
        (b"\xff" * 8 + content[8:], "not a safetensors file, or damaged"),
        (foreign(tensors, None), "not written by save_packed"),
        (foreign(tensors, {**metadata, "version": "9"}), "version 9"),
        (foreign(tensors, {**metadata, "index": "zzzz"}), "metadata are damaged"),
        (foreign({**tensors, first: tensors[first][:-1].clone()}, metadata), "bytes for a weight of shape"),
        (foreign({**tensors, first: torch.full_like(tensors[first], 255)}, metadata), "code 7 of 7 levels"),
        (foreign({k: v for k, v in tensors.items() if k != first}, metadata), "no packed weight"),
        (foreign({**tensors, "float32": tensors["float32"][1:].clone()}, metadata), "float values for"),
        (foreign({**tensors, "more": torch.zeros(1)}, metadata), "'more' is of shape"),
    ):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_packed(bad)
    with pytest.raises(ValueError, match="no such file"):
        load_packed(tmp_path / "none")


@pytest.mark.parametrize("bits", [3, 4])
def test_the_released_checkpoint(bits: int, reference: Path, tmp_path: Path) -> None:
    model = create_model("resnet20", "apot-cifar", bits)
    load_weights(model, reference / f"reference/released/res20_{bits}bit/model_best.pth.tar")
    path = tmp_path / "released.safetensors"
    size = save_packed(model, path)
    assert bits != 3 or size <= 125_000
    x = torch.randn(64, 3, 32, 32)
    torch.testing.assert_close(logits(load_packed(path), x), logits(model, x), atol=0, rtol=0)


def test_an_embedding_tied_to_a_layer_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(7, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["tokens"].weight
    quantize(model, 4, edge_bits=8)
    with pytest.raises(ValueError, match=r"tokens.weight and head.weight share one weight.*head.weight = nn.Parameter"):
        save_packed(model, tmp_path / "tied.safetensors")
    assert not list(tmp_path.iterdir())
    model["head"].weight = nn.Parameter(model["head"].weight.detach().clone())  # type: ignore[operator]
    save_packed(model, tmp_path / "own.safetensors")
