"""Layers in evaluation as products of bytes: exact, the same for any batch, and given up where they must be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat import QuantConv2d, QuantLinear, preset
from apot_fat.integer import integer_reference
from apot_fat.models import create_model
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.fast.byte_product import largest_product
from apot_fat.quant.fast.kept import kept_weights
from apot_fat.quant.seam import set_kernels
from apot_fat.quant.spec import PRESETS

pytestmark = pytest.mark.skipif(not largest_product(), reason="this processor multiplies no bytes")

ROOT = Path(__file__).resolve().parents[3]
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": True},
    "1x1": {"kernel_size": 1},
    "1x1 stride": {"kernel_size": 1, "stride": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": (2, 1)},
    "uneven": {"kernel_size": (1, 5), "stride": (2, 1), "padding": (0, 2)},
}


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    set_kernels("auto")
    with torch.no_grad():
        yield


def in_float64(layer: QuantConv2d | QuantLinear, x: Tensor) -> Tensor:
    """The product of the layer's own operands without rounding to speak of."""
    bias = None if layer.bias is None else layer.bias.double()
    x_q, w_q = layer.quantized_input(x).double(), layer.quantized_weight().double()
    if isinstance(layer, QuantLinear):
        return F.linear(x_q, w_q, bias)
    return F.conv2d(x_q, w_q, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def uses_bytes(layer: nn.Module) -> bool:
    kept: Any = layer._kept
    return kept is not None and kept.byte_weight is not None and kept.byte_weight.value is not None


def assert_exact(layer: QuantConv2d | QuantLinear, x: Tensor) -> None:
    y, expected = layer(x), in_float64(layer, x)
    assert y.dtype == torch.float32
    assert (y - expected).abs().max() <= 2e-7 * expected.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("name", PRESETS)
def test_every_variant_gives_the_sums_of_its_levels(name: str, bits: int) -> None:
    spec = preset(name, bits=bits)
    layer = QuantConv2d(8, 12, 3, padding=1, spec=spec, relu=True).eval()
    assert_exact(layer, 3 * torch.randn(2, 8, 9, 9))
    weight, act = spec.weight_set.denominator, spec.act_set.denominator
    assert uses_bytes(layer) == (not spec.act_signed and act <= 255 >= 2 * weight and weight * act <= largest_product())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_every_convolution(options: dict[str, Any], channels_last: bool) -> None:
    layer = QuantConv2d(8, 16, spec=preset("apot-cifar", bits=4), **options).eval()
    x = torch.rand(3, 8, 12, 10) * 6
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert_exact(layer, x)
    assert uses_bytes(layer)
    y = layer(x)
    set_kernels("eager")
    assert y.stride() == layer(x).stride()


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (0, 64), (1, 64)])
def test_every_linear_layer(shape: tuple[int, ...]) -> None:
    layer = QuantLinear(64, 10, spec=preset("fat-cifar", bits=3), relu=True).eval()
    y = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 10)
    if y.numel():
        assert_exact(layer, torch.randn(shape))


def test_an_empty_batch() -> None:
    layer = QuantConv2d(8, 4, 3, spec=preset("apot-cifar", bits=4)).eval()
    assert layer(torch.rand(0, 8, 5, 5)).shape == (0, 4, 3, 3)


@pytest.mark.skipif(largest_product() < 1 << 14, reason="this processor multiplies no bytes as large as these")
def test_sums_beyond_what_float32_counts() -> None:
    layer = QuantLinear(20_000, 3, spec=preset("apot-imagenet-uniform", bits=8), bias=False).eval()
    layer.weight_alpha.fill_(1e-3)  # type: ignore[union-attr]
    layer.weight.fill_(1.0)[0, 0] = -1.0
    assert_exact(layer, torch.full((2, 20_000), 100.0))


@pytest.mark.parametrize(("count", "fits"), [(66_000, True), (66_500, False)])
def test_sums_beyond_32_bits_are_those_of_floats(count: int, fits: bool) -> None:
    layer = QuantLinear(count, 2, spec=preset("apot-imagenet-uniform", bits=8), bias=False).eval()
    layer.weight_alpha.fill_(1e-3)  # type: ignore[union-attr]
    layer.weight.fill_(1.0)[:, 0] = -1.0
    y, x_max = layer(torch.full((2, count), 100.0)), layer.act_alpha.item()  # type: ignore[union-attr]
    assert uses_bytes(layer) == (fits and largest_product() > 1 << 14)
    torch.testing.assert_close(y, torch.full((2, 2), (count - 2) * 1e-3 * x_max), rtol=1e-4, atol=0)


def test_one_threshold_a_channel() -> None:
    layer = QuantConv2d(8, 6, 3, spec=replace(preset("apot-cifar", bits=4), weight_per_channel=True)).eval()
    layer.weight_alpha.copy_(torch.linspace(0.5, 3, 6))  # type: ignore[union-attr]
    assert_exact(layer, torch.rand(2, 8, 6, 6))
    assert uses_bytes(layer)


def test_images_one_by_one_are_the_batch_to_the_bit() -> None:
    model = create_model("resnet20", preset="apot-cifar", bits=4).eval()
    layers = [layer for _, layer in threshold_layers(model)]
    x = torch.randn(6, 16, 32, 32)
    together = layers[0](x)
    assert torch.equal(together, torch.cat([layers[0](image[None]) for image in x]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(together, layers[0](x))
    finally:
        torch.set_num_threads(threads)


def test_a_network_is_its_integer_inference() -> None:
    model = create_model("resnet20", preset="fat-cifar", bits=3).eval()
    x = torch.randn(4, 3, 32, 32)
    y = model(x)
    assert all(uses_bytes(layer) for _, layer in threshold_layers(model))
    torch.testing.assert_close(integer_reference(model)(x).float(), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["weight", "weight_alpha", "act_alpha", "load", "spec", "train"])
def test_what_is_kept_follows_every_change(change: str) -> None:
    layer = QuantConv2d(8, 6, 3, spec=preset("apot-cifar", bits=4)).eval()
    x = torch.rand(2, 8, 6, 6)
    assert_exact(layer, x)
    if change == "load":
        layer.load_state_dict(QuantConv2d(8, 6, 3, spec=layer.spec).state_dict())
    elif change == "spec":
        layer.spec = layer.spec.with_bits(3)
    elif change == "train":
        layer.train().weight.data.neg_()
        layer.eval()
    else:
        getattr(layer, change).mul_(0.5)
    assert_exact(layer, x)
    assert uses_bytes(layer)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nan_spoils_its_image_alone(memory_format: torch.memory_format) -> None:
    layer = QuantConv2d(8, 6, 3, spec=preset("apot-cifar", bits=4)).eval()
    x = torch.rand(3, 8, 6, 6).to(memory_format=memory_format)
    clean = layer(x)
    x[1, 2, 3, 4] = float("nan")
    y = layer(x)
    assert uses_bytes(layer)
    assert y[1].isnan().any()
    assert torch.equal(y[::2], clean[::2])
    assert y.stride() == clean.stride()


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_nan_spoils_its_row_alone(shape: tuple[int, ...]) -> None:
    layer = QuantLinear(8, 5, spec=preset("apot-cifar", bits=4)).eval()
    x = torch.rand(shape)
    clean = layer(x)
    x.view(-1, 8)[-1, 3] = float("nan")
    y = layer(x).view(-1, 5)
    assert uses_bytes(layer)
    assert y[-1].isnan().all()
    assert torch.equal(y[:-1], clean.view(-1, 5)[:-1])


@pytest.mark.parametrize("processor", ["AVX2", "AVX512_CORE"])
def test_a_processor_that_adds_two_products_in_16_bits_multiplies_those_that_fit(processor: str) -> None:
    work = "from tests.quant.fast.test_byte_product import as_on_an_older_processor as work; work()"
    subprocess.run(
        [sys.executable, "-c", work], cwd=ROOT, env=os.environ | {"ONEDNN_MAX_CPU_ISA": processor}, check=True
    )


def as_on_an_older_processor() -> None:
    """In a process whose oneDNN leaves newer instructions alone."""
    set_kernels("auto")
    assert largest_product() == 129 * 127
    with torch.no_grad():
        for bits, fits in ((2, True), (4, True), (8, False)):
            layer = QuantConv2d(64, 4, 3, spec=preset("apot-imagenet-uniform", bits=bits)).eval()
            layer.weight_alpha.fill_(1e-3)  # type: ignore[union-attr]
            layer.weight.fill_(1.0)[:, 0] = -1.0  # all of them at a bound
            x = torch.full((2, 64, 5, 5), 100.0)
            torch.testing.assert_close(layer(x).double(), in_float64(layer, x), rtol=2e-7 if fits else 1e-5, atol=0)
            assert uses_bytes(layer) == fits


def test_nan_stays_nan() -> None:
    layer = QuantConv2d(8, 6, 3, spec=preset("apot-cifar", bits=4)).eval()
    x = torch.rand(2, 8, 6, 6)
    x[1, 2, 3, 4] = float("nan")
    assert layer(x)[1].isnan().any()
    x[1, 2, 3, 4] = float("inf")
    assert_exact(layer, x)
    layer.weight[0, 0, 0, 0] = float("nan")
    assert layer(x).isnan().any()
    assert not uses_bytes(layer)
    layer = QuantConv2d(8, 6, 3, spec=preset("apot-cifar", bits=4)).eval()
    layer.act_alpha.fill_(float("nan"))  # type: ignore[union-attr]
    assert layer(x).isnan().all()


@pytest.mark.parametrize("why", ["training", "gradient", "eager", "float64", "autocast", "negatives", "signed"])
def test_floats_are_multiplied_where_they_must_be(why: str) -> None:
    spec = preset("fat-cifar" if why == "negatives" else "apot-cifar", bits=4)
    layer = QuantConv2d(8, 6, 3, spec=replace(spec, act_signed=why == "signed")).train(why == "training")
    x = torch.randn(2, 8, 6, 6)
    if why == "eager":
        set_kernels("eager")
    if why == "float64":
        layer, x = layer.double(), x.double()
    with torch.set_grad_enabled(why == "gradient"), torch.autocast("cpu", enabled=why == "autocast"):
        y = layer(x)
    assert not uses_bytes(layer)
    assert y.dtype == {"float64": torch.float64, "autocast": torch.bfloat16}.get(why, torch.float32)


def test_a_compiled_network_multiplies_bytes_too() -> None:
    model = create_model("resnet20", preset="apot-cifar", bits=4).eval()
    layer = threshold_layers(model).__next__()[1]
    graph = torch.compile(layer, fullgraph=True)
    x = torch.rand(2, 16, 8, 8)
    for factor in (1.0, 0.5):
        layer.weight_alpha.mul_(factor)  # type: ignore[union-attr]
        with kept_weights(layer):
            y = graph(x)
        assert torch.equal(y, layer(x))
        assert layer._kept is not None
    x[1, 0, 0, 0] = float("nan")
    with kept_weights(layer):
        y = graph(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
