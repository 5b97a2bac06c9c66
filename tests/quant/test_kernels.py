from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from apot_fat import QuantConv2d, QuantLinear, preset
from apot_fat.models import create_model
from apot_fat.quant import EightBitConv2d, level_set, quantize_activation, quantize_weight
from apot_fat.quant.kernels import get_kernels, set_kernels


@pytest.fixture
def compiled() -> Iterator[None]:
    """Kernels compiled inside the test."""
    before = get_kernels()
    set_kernels("compiled")
    yield
    set_kernels(before)


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
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y[:, 1:], part, atol=0, rtol=0)


@pytest.mark.parametrize(("name", "bits"), [("apot-cifar", 4), ("fat-cifar-log", 3)])
def test_a_network_compiles_without_graph_breaks(name: str, bits: int) -> None:
    layer = QuantConv2d(4, 6, 3, padding=1, spec=preset(name, bits=bits))
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), QuantLinear(96, 3, spec=preset(name, bits=bits)))
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


@pytest.mark.parametrize("from_elements", [0, 10**6])
def test_a_large_input_is_kept_for_backward_and_not_its_quantized_copy(
    from_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apot_fat.quant.layers.REMEMBER_ELEMENTS", from_elements)
    layer = QuantConv2d(4, 4, 3, padding=1, spec=preset("apot-cifar"))
    x = torch.rand(2, 4, 8, 8, requires_grad=True)
    large: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        large.extend([tensor] if tensor.numel() == x.numel() else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    addresses = {tensor.data_ptr() for tensor in large}
    assert x.data_ptr() in addresses
    assert len(addresses) == (1 if from_elements == 0 else 2)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_plain_composition(
    linear: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apot_fat.quant.layers.REMEMBER_ELEMENTS", 0)
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
        eight = EightBitConv2d(3, 4, 1).eval()
        assert eight.quantized_weight() is eight.quantized_weight()


def test_a_network_evaluates_alike_before_and_after_training() -> None:
    model = create_model("resnet20", "apot-cifar", 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        before = model.eval()(x)
    model.train()(x).square().sum().backward()
    optimizer.step()
    with torch.inference_mode():
        after = model.eval()(x)
        fresh = copy.deepcopy(model)(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, fresh, atol=0, rtol=0)


def test_bad_choice() -> None:
    with pytest.raises(ValueError, match="choose one of auto, compiled, eager"):
        set_kernels("fast")
