from __future__ import annotations

import base64
import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from apot_fat import load_packed, load_weights, quantize, save_packed, set_bits
from apot_fat.checkpoint import packed_normalization
from apot_fat.checkpoint.bit_packing import pack_bits, unpack_bits
from apot_fat.checkpoint.packed_file import FORMAT
from apot_fat.models import create_model
from apot_fat.quant import EIGHT_BIT, PRESETS, QuantConv2d, QuantLinear, QuantSpec, preset


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
    save_packed(loaded, tmp_path / "third.safetensors")
    assert (tmp_path / "third.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
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
    with pytest.raises(ValueError, match=r"none of list_models\(\): give one"):
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_type_computes_the_same_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        ends = nn.Conv2d(3, 64, 3), nn.Conv2d(16, 64, 3)
        return nn.Sequential(ends[0], nn.ReLU(), nn.Conv2d(64, 16, 1), nn.ReLU(), ends[1]).to(dtype)

    model, x, path = network(), torch.randn(4, 3, 8, 8, dtype=dtype), tmp_path / "a.safetensors"
    with torch.no_grad():
        next(model.parameters())[3] *= -40  # codes of more than 8 bits
    quantize(model, 4, calibration=x)
    save_packed(model, path)
    loaded = load_packed(path, network())
    torch.testing.assert_close(logits(loaded, x), logits(model, x), atol=0, rtol=0)
    save_packed(loaded, path)
    torch.testing.assert_close(logits(load_packed(path, network()), x), logits(model, x), atol=0, rtol=0)


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


@pytest.mark.parametrize("lowest", [-300.0, -900.0, -1e30])
def test_an_eight_bit_weight_far_below_its_scale(lowest: float, tmp_path: Path) -> None:
    model, x, path = create_model("resnet20", "apot-cifar", 3), torch.rand(2, 3, 8, 8), tmp_path / "a.safetensors"
    with torch.no_grad():
        model.fc.weight.clamp_(max=1.0)[0, :2] = torch.tensor([lowest, 1.0])  # type: ignore[operator,union-attr]
    save_packed(model, path)
    torch.testing.assert_close(logits(load_packed(path), x), logits(model, x), atol=0, rtol=0)


def test_a_loaded_encoder_layer_runs_quantized_without_gradients_too(tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
        return nn.Sequential(nn.Linear(8, 16), encoder, nn.Linear(16, 4))

    model, x = network(), torch.randn(8, 5, 8)
    quantize(model, 3, calibration=x)
    save_packed(model, tmp_path / "a.safetensors")
    loaded = load_packed(tmp_path / "a.safetensors", network())
    torch.testing.assert_close(logits(loaded, x), logits(model, x), atol=0, rtol=0)


ONE_A_CHANNEL = preset("fat-cifar", 3, weight_per_channel=True)


@pytest.mark.parametrize("spec", [preset("fat-cifar", 3), ONE_A_CHANNEL, EIGHT_BIT], ids=["fat", "channels", "8 bits"])
@pytest.mark.parametrize("kind", [QuantConv2d, QuantLinear])
def test_a_network_of_a_layer_alone(kind: type[nn.Module], spec: QuantSpec, tmp_path: Path) -> None:
    is_conv = issubclass(kind, nn.Conv2d)
    sizes, x = ((3, 4, 3), torch.randn(2, 3, 5, 5)) if is_conv else ((3, 4), torch.randn(2, 3))
    layer, path = kind(*sizes, bias=True, spec=spec), tmp_path / "layer.safetensors"
    expected = logits(layer, x)
    save_packed(layer, path)
    for model in (kind(*sizes, bias=True, spec=spec), (nn.Conv2d if is_conv else nn.Linear)(*sizes)):
        loaded = load_packed(path, model)
        assert loaded is model
        assert type(loaded) is kind
        torch.testing.assert_close(logits(loaded, x), expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"has the shape \(4, 3.*\), the network has Linear of shape \(2, 2\) there"):
        load_packed(path, nn.Linear(2, 2))


def test_a_file_is_as_it_was_before_the_8_bit_ends_had_a_spec(tmp_path: Path) -> None:
    spec = {
        "weight_bits": 3, "act_bits": 3, "weight_levels": "apot", "act_levels": "apot", "weight_norm": "none",
        "weight_norm_gradient": False, "transform": False, "weight_gradient": "calibrated", "act_signed": False,
        "act_clip": "above", "act_alpha_gradient": "full", "grad_scale": None, "weight_alpha": 3.0, "act_alpha": 8.0,
        "weight_per_channel": False, "weight_alpha_learned": True,
    }  # fmt: skip
    end = {"shape": [1, 2], "dtype": "float32", "offset": -254, "bits": 9, "scale": 0.5}
    other = {"shape": [1, 1], "dtype": "float32", "spec": spec, "relu": True, "fixed_bits": False}
    floats = {"0.bias": [1], "1.bias": [1], "1.weight_alpha": [], "1.act_alpha": []}
    index = {"layers": {"0": end, "1": other}, "floats": floats, "network": None}
    packed = base64.b85encode(zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)).decode()
    codes = {"0.weight": pack_bits(torch.tensor([0, 381]), 9), "1.weight": pack_bits(torch.tensor([0]), 3)}
    metadata, before = {"format": FORMAT, "version": "1", "index": packed}, tmp_path / "before.safetensors"
    save_file(codes | {"float32": torch.tensor([0.25, 0.5, 3.0, 2.0])}, before, metadata)
    network = load_packed(before, nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)))
    assert network[0].spec == EIGHT_BIT  # type: ignore[index]
    x = torch.tensor([[0.5, 0.0], [-2.0, 1.0], [1.0, 0.0]])  # −0.25, 2.75, −0.75 behind the first
    assert logits(network, x).flatten().tolist() == pytest.approx([0.5, -5.5, 0.5])
    save_packed(network, tmp_path / "after.safetensors")
    with safe_open(tmp_path / "after.safetensors", framework="pt") as file:
        assert json.loads(zlib.decompress(base64.b85decode(file.metadata()["index"]))) == index


def edges(first: str) -> nn.Sequential:
    """A small network whose first layer is as named; the layers behind it are the same."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    overrides = {"0": {"weight_bits": 4, "act_bits": 5}} if first == "quantized" else None
    quantize(model, 3, "fat", edge_bits=8 if first == "eight bits" else 32, overrides=overrides)
    return model


@pytest.mark.parametrize("given", ["quantized", "eight bits", "float"])
@pytest.mark.parametrize("saved", ["quantized", "eight bits", "float"])
def test_layers_become_those_of_the_file(saved: str, given: str, tmp_path: Path) -> None:
    source, model, x = edges(saved), edges(given), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.1)
    expected = logits(source, x)
    save_packed(source, tmp_path / "a.safetensors")
    kept = model[0].weight
    load_packed(tmp_path / "a.safetensors", model)
    assert model[0].weight is kept
    assert type(model[0]) is type(source[0])
    names = {name for name in source.state_dict() if not name.endswith("transform")}
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model, x), expected, atol=0, rtol=0)


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


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}


def test_a_state_that_is_no_tensor_with_values_is_refused(tmp_path: Path) -> None:
    model, path = nn.Sequential(*own_network(), WithExtraState(2, 2)), tmp_path / "a.safetensors"
    quantize(model, 4)
    with pytest.raises(ValueError, match=r"Sequential: 10\._extra_state is no parameter or buffer"):
        save_packed(model, path)
    model = own_network()
    quantize(model, 4)
    with pytest.raises(ValueError, match=r"Sequential: 0\.weight is a tensor without values \(meta\)"):
        save_packed(copy.deepcopy(model).to("meta"), path)
    assert not list(tmp_path.iterdir())
    save_packed(model, path)
    with pytest.raises(ValueError, match=r"Sequential: 0\.weight is a tensor without values \(meta\)"):
        load_packed(path, own_network().to("meta"))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_network_is_written_and_filled_as_itself(wrap: Callable[..., nn.Module], tmp_path: Path) -> None:
    model, x = own_network(), torch.randn(2, 3, 4, 4)
    wrapped = wrap(model)
    quantize(wrapped, 4)
    save_packed(wrapped, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(load_packed(tmp_path / "a.safetensors", own_network()), x), logits(model, x))
    filled = wrap(own_network())
    assert load_packed(tmp_path / "a.safetensors", filled) is filled
    torch.testing.assert_close(logits(filled, x), logits(model, x))


def test_a_file_says_what_its_images_are_normalised_with(tmp_path: Path) -> None:
    model, path = create_model("resnet20", "fat-cifar", 3), tmp_path / "net.safetensors"
    save_packed(model, path)
    assert packed_normalization(path) is None
    save_packed(model, path, mean=(0.5, 0.4, 0), std=[0.25, 0.125, 1])
    assert packed_normalization(path) == ((0.5, 0.4, 0.0), (0.25, 0.125, 1.0))
    written = path.read_bytes()
    for mean, std, message in (
        ((0.5,), None, r"mean \(0.5,\), std None: give both"),
        ((0.5,), (0.25, 0.25), "expected a finite number a channel each"),
        ((float("nan"),), (0.25,), "expected a finite number a channel each"),
        ((0.5,), (0.0,), "std above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            save_packed(model, path, mean=mean, std=std)
    assert path.read_bytes() == written


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer1.0.conv1.act_alpha", float("nan"), "holds nan, thresholds are finite"),
        ("layer1.0.conv2.weight_alpha", float("inf"), "holds inf, thresholds are finite"),
        ("bn1.running_var", -1.0, "holds -1.0, variances are finite and at least 0"),
        ("fc.bias", float("inf"), "holds inf"),
        ("layer1.0.conv1.weight", float("nan"), "holds nan, weights and means are finite"),
    ],
)
def test_values_that_no_network_has_are_refused(
    name: str, value: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = create_model("resnet20", "apot-cifar", 3), tmp_path / "a.safetensors"
    model.state_dict()[name].fill_(value)
    with pytest.raises(ValueError, match=rf"^CifarResNet: {name} {message}"):
        save_packed(model, path)
    assert not list(tmp_path.iterdir())
    if name.endswith("weight"):  # a code has no NaN
        return
    with monkeypatch.context() as patch:
        patch.setattr("apot_fat.checkpoint.packed.check_values", lambda *_: None)
        save_packed(model, path)
    with pytest.raises(ValueError, match=rf"packed file .*a\.safetensors: .*{name} {message}"):
        load_packed(path)


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
