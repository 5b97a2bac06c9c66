from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from apot_fat import QuantConv2d, QuantLinear, preset
from apot_fat.models import create_model, list_models
from apot_fat.models.registry import find_architecture
from apot_fat.quant import EIGHT_BIT, level_set, quantize_activation, quantize_weight
from apot_fat.quant.fast.kept import kept_weights
from apot_fat.quant.fast.kernels import inductor_options
from apot_fat.quant.seam import set_kernels
from apot_fat.quant.spec import PRESETS


@pytest.fixture
def compiled() -> None:
    """Kernels compiled inside the test."""
    set_kernels("compiled")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("family", "bits"), [("uniform", 4), ("pot", 3), ("pot", 5), ("apot", 3), ("apot", 5)])
def test_compiled_and_eager_kernels_agree(family: str, bits: int) -> None:
    levels = level_set(family, bits)
    thresholds = torch.tensor(levels.thresholds)
    x = torch.cat([torch.randn(3000), thresholds, thresholds.nextafter(torch.tensor(0.0)), torch.tensor([torch.nan])])
    grad = torch.randn_like(x)
    results = []
    for kernels in ("eager", "compiled"):
        set_kernels(kernels)
        leaf, alpha = x.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
        y = quantize_activation(leaf, alpha, levels)
        y[:-1].backward(grad[:-1])
        results.append((y.detach(), leaf.grad, alpha.grad))
    for eager, fused in zip(*results, strict=True):
        if eager.dim():
            torch.testing.assert_close(fused, eager, atol=0, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("compiled")
def test_shapes_and_memory_formats_share_a_kernel() -> None:
    torch.compiler.reset()
    levels, alpha = level_set("apot", 4), torch.tensor(1.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 3, 4, 5), (5, 7), (40,)):
            quantize_weight(torch.randn(shape), alpha, levels, clip_gradient=False)
        x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        y = quantize_weight(x, alpha, levels, clip_gradient=False)
        part = quantize_weight(x[:, 1:], alpha, levels, clip_gradient=False)
        every_second = quantize_activation(torch.stack([x, x], -1)[..., 0], alpha, levels)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y[:, 1:], part, atol=0, rtol=0)
    set_kernels("eager")
    torch.testing.assert_close(every_second, quantize_activation(x, alpha, levels), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("first", "last"),
    [("apot-cifar", "fat-cifar-log"), pytest.param("fat-cifar-log", "apot-cifar", marks=pytest.mark.slow)],
)
def test_a_network_compiles_without_graph_breaks(first: str, last: str) -> None:
    layer = QuantConv2d(4, 6, 3, padding=1, spec=preset(first, bits=4))
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), QuantLinear(96, 3, spec=preset(last, bits=3)))
    x = torch.randn(2, 4, 4, 4)
    expected = model(x)
    expected.square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
        got = torch.compile(model, fullgraph=True)(x)
        got.square().sum().backward()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
@pytest.mark.parametrize(("name", "from_elements", "bytes_kept"), [
    ("apot-cifar", 0, 4 + 1),  # the input and a byte a level
    ("fat-cifar", 0, 4),  # negative levels have no byte: made again from the input
    ("apot-cifar", 10**6, 4 + 4),
])  # fmt: skip
def test_a_large_input_is_kept_for_backward_and_not_its_quantized_copy(
    name: str, from_elements: int, bytes_kept: int, kernels: str, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    set_kernels(kernels)
    monkeypatch.setattr("apot_fat.quant.fast.layer_output.REMEMBER_ELEMENTS", from_elements)
    layer = QuantConv2d(4, 4, 3, padding=1, spec=preset(name))
    x = torch.rand(2, 4, 8, 8, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == x.numel():
            kept[tensor.data_ptr()] = tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert x.data_ptr() in kept
    assert sum(kept.values()) == bytes_kept


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
@pytest.mark.parametrize(("name", "bits"), [("apot-cifar", 4), ("fat-cifar", 3), ("apot-imagenet-pot", 5)])
def test_relu_and_stride_in_the_quantizer_s_pass(name: str, bits: int, kernels: str, compiled: None) -> None:
    set_kernels(kernels)
    layer = QuantConv2d(4, 6, 1, stride=(2, 3), spec=preset(name, bits=bits), relu=True)
    x = torch.randn(2, 4, 7, 8).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = 0.0, 20.0, -0.01
    results = []
    for plain in (True, False):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        layer.relu = not plain
        if plain:
            x_q = layer.quantized_input(nn.functional.relu(leaf))
            y = nn.functional.conv2d(x_q, layer.quantized_weight(), stride=(2, 3))
        else:
            y = layer(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *[parameter.grad for parameter in layer.parameters()]])
    for plainly, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plainly, atol=1e-6, rtol=1e-5)
    float_layer = QuantConv2d(4, 6, 1, spec=preset(name, bits=32), relu=True)
    expected = nn.functional.conv2d(nn.functional.relu(x), float_layer.weight)
    torch.testing.assert_close(float_layer(x), expected)


@pytest.mark.usefixtures("compiled")
def test_scratch_memory_shows_in_no_result() -> None:
    spec = preset("apot-cifar", bits=3)
    small, large = (QuantConv2d(3, 3, 3, padding=1, spec=spec).eval() for _ in range(2))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        quantized, first = small.quantized_input(x), small(x)
        before = quantized.clone(), first.clone()
        large(torch.randn(4, 3, 9, 9))
        again = small(x)
    torch.testing.assert_close((quantized, first), before, atol=0, rtol=0)
    torch.testing.assert_close(again, first, atol=0, rtol=0)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_plain_composition(
    linear: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apot_fat.quant.fast.layer_output.REMEMBER_ELEMENTS", 0)
    spec = preset("apot-imagenet", bits=3)
    conv = QuantConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True, spec=spec)
    layer: QuantConv2d | QuantLinear = QuantLinear(4, 6, spec=spec) if linear else conv
    results = []
    for plain in (False, True):
        torch.manual_seed(1)
        x = torch.randn(2, 4, 6, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if not plain:
                y = layer(x)
            elif isinstance(layer, QuantLinear):
                y = nn.functional.linear(layer.quantized_input(x), layer.quantized_weight(), layer.bias)
            else:
                y = layer._conv_forward(layer.quantized_input(x), layer.quantized_weight(), layer.bias)
        layer.zero_grad()
        y.float().square().sum().backward()
        results.append([y, x.grad, *[parameter.grad for parameter in layer.parameters()]])
    atol, rtol = (0.1, 0.02) if autocast else (1e-5, 1e-5)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol)


def test_a_weight_is_quantized_once_in_evaluation() -> None:
    layer = QuantConv2d(2, 3, 3, spec=preset("fat-cifar", bits=3)).eval()
    assert layer.quantized_weight() is not layer.quantized_weight()  # gradients can flow
    with torch.inference_mode():
        kept = layer.quantized_weight()
        assert layer.quantized_weight() is kept
    assert not kept.is_inference()
    assert layer.weight_alpha is not None
    with torch.no_grad():
        for change in (
            lambda: layer.weight_alpha.fill_(1.0),
            lambda: layer.weight.mul_(-1),
            lambda: layer.load_state_dict({key: value * 2 for key, value in layer.state_dict().items()}),
            lambda: setattr(layer, "weight", nn.Parameter(torch.randn(3, 2, 3, 3))),
            lambda: setattr(layer, "spec", preset("fat-cifar", bits=5)),
            lambda: layer.double(),
        ):
            before = layer.quantized_weight()
            change()
            after = layer.quantized_weight()
            assert after is not before
            assert not (after.dtype == before.dtype and torch.equal(after, before))
        kept = layer.quantized_weight()
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert copied._kept is None
            assert torch.equal(copied.quantized_weight(), kept)
        layer.weight.data.neg_()  # through .data no version shows it: eval() gives the kept weight up
        assert not torch.equal(layer.eval().quantized_weight(), kept)
        layer.train()
        assert layer.quantized_weight() is not layer.quantized_weight()
        eight = QuantConv2d(3, 4, 1, spec=EIGHT_BIT).eval()
        assert eight.quantized_weight() is eight.quantized_weight()


def test_a_compiled_network_takes_kept_weights_only_while_they_are_current() -> None:
    torch.compiler.reset()
    layer = QuantConv2d(2, 3, 3, spec=preset("apot-cifar", bits=3)).eval()
    graph = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.rand(1, 2, 5, 5)
    with torch.no_grad():
        for _ in range(2):
            with kept_weights(layer):
                inside = graph(x)
                assert layer.quantized_weight() is layer._kept.weight.value
            torch.testing.assert_close(inside, layer(x))
            layer.weight.mul_(-1)  # neither train() nor eval() tells
            torch.testing.assert_close(graph(x), layer(x))
            assert not torch.allclose(graph(x), inside)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_fused_step_behind_a_pass_without_gradients_shows(
    make: Callable[..., torch.optim.Optimizer], bits: int
) -> None:
    spec = EIGHT_BIT if bits == 8 else preset("apot-cifar", bits)
    model = nn.Sequential(QuantConv2d(3, 8, 3, spec=spec), nn.ReLU(), QuantConv2d(8, 4, 3, spec=spec)).eval()
    optimizer, x = make(model.parameters(), 0.05, fused=True), torch.rand(2, 3, 8, 8)
    model(x).sum().backward()
    for _ in range(2):
        with torch.no_grad():
            model(x)
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("fused", [False, True])  # which no version counter shows
@pytest.mark.parametrize("mode", [True, False])
def test_a_network_evaluates_alike_before_and_after_training(mode: bool, fused: bool) -> None:
    model = create_model("resnet20", "apot-cifar", 4).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=fused)
    x = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        before = model(x)
    if mode:
        model.train()
    model(x).square().mean().backward()
    optimizer.step()
    if mode:
        model.eval()
    with torch.inference_mode():
        after = model(x)
        fresh = copy.deepcopy(model)(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, fresh, atol=0, rtol=0)


@pytest.mark.slow  # the suite compiles one network a family
@pytest.mark.parametrize(
    ("network", "name"), [*((network, None) for network in list_models()), *(("resnet20", name) for name in PRESETS)]
)
def test_every_network_and_preset_is_one_graph(network: str, name: str | None) -> None:
    torch.compiler.reset()
    model = create_model(network, name, 4, num_classes=3)
    graph = torch.compile(model, fullgraph=True, backend="eager")
    size = 32 if name or find_architecture(network).dataset == "cifar10" else 64
    assert graph(torch.randn(2, 3, size, size)).shape == (2, 3)


def test_bad_choice() -> None:
    with pytest.raises(ValueError, match="choose one of auto, compiled, eager"):
        set_kernels("fast")


@pytest.mark.slow
def test_code_compiled_on_an_older_processor_is_not_taken_on_a_newer_one(tmp_path: Path) -> None:
    work = (
        "import torch; from apot_fat import *; from apot_fat.quant import set_kernels; set_kernels('compiled');"
        "layer = QuantConv2d(64, 8, 3, spec=preset('apot-imagenet')).eval();"
        "[layer(torch.rand(8, 64, 33, 33)).sum().backward() for _ in range(20)]"
    )
    for older in ({"ATEN_CPU_CAPABILITY": "avx2"}, {}):  # a cache baked into an image, say
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | older
        subprocess.run([sys.executable, "-c", work], env=environment, check=True)


def test_a_kernel_s_vectors_are_the_processor_s() -> None:
    options = inductor_options("cpu")
    assert options.get("cpp.simdlen", 0) == torch._inductor.cpu_vec_isa.pick_vec_isa().bit_width()
