from __future__ import annotations

import pytest
import torch
from torch import nn

from apot_fat import QuantConv2d, preset, weight_deactivate_freq
from apot_fat.quant import frequency_transform
from apot_fat.quant.spec import PRESETS


def full_spectrum(w: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    spectrum = torch.fft.fft(w.reshape(len(w), -1))
    mask = torch.sigmoid(matrix @ spectrum.abs())
    return torch.fft.ifft(spectrum * mask).real.reshape(w.shape), mask


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 3, 1, 1), (4, 1, 3, 3), (7, 10), (3, 1)])
def test_half_spectrum_equals_the_full_one_with_gradients(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(shape[0], shape[0], dtype=torch.float64, requires_grad=True)
    ours, mask = frequency_transform(w, matrix)
    expected, full_mask = full_spectrum(w, matrix)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(mask.max(), full_mask.max())
    torch.testing.assert_close(mask.min(), full_mask.min())
    g = torch.randn(shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, (w, matrix), g), torch.autograd.grad(expected, (w, matrix), g), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_weight_keeps_its_memory_format() -> None:
    # a convolution of maps of one pixel, where its input has either, takes its own from the weight
    w, matrix, results = torch.randn(6, 4, 3, 3), torch.randn(6, 6), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = w.clone(memory_format=memory_format).requires_grad_()
        restored, _ = frequency_transform(leaf, matrix)
        assert restored.stride() == leaf.stride()
        results.append((restored, *torch.autograd.grad((restored * w).sum(), leaf)))
    for plain, last in zip(*results, strict=True):
        assert torch.equal(plain, last)


def test_published_form_takes_a_linear_layer_or_its_matrix() -> None:
    layer = nn.Linear(6, 6, bias=False)
    w = torch.randn(6, 4, 3, 3)
    restored, (largest, smallest) = weight_deactivate_freq(w, layer)
    expected, mask = full_spectrum(w, layer.weight.detach())
    torch.testing.assert_close(restored, expected)
    assert (largest, smallest) == pytest.approx((mask.max().item(), mask.min().item()))
    again, _ = weight_deactivate_freq(w.reshape(6, 36), layer.weight, fc=True)
    torch.testing.assert_close(again.reshape(w.shape), restored)


def test_a_zero_weight_has_a_finite_gradient() -> None:
    w = torch.zeros(4, 2, 3, 3, requires_grad=True)
    frequency_transform(w, torch.ones(4, 4))[0].sum().backward()
    assert w.grad is not None
    assert w.grad.isfinite().all()


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="4-d without fc"):
        weight_deactivate_freq(torch.randn(6, 4), torch.ones(6, 6))
    with pytest.raises(ValueError, match=r"expected a \(6, 6\)"):
        weight_deactivate_freq(torch.randn(6, 4, 3, 3), nn.Linear(5, 5, bias=False))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_under_autocast_weights_land_on_the_same_levels(name: str) -> None:
    layer = QuantConv2d(64, 64, 3, padding=1, spec=preset(name, bits=4))
    if layer.transform is not None:
        layer.transform.data.normal_(0, 0.01)  # a mask that is neither 0 nor 1
    x = torch.rand(1, 64, 4, 4)
    expected = layer.quantized_weight().detach()
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.quantized_weight()
        layer.eval()
        with torch.no_grad():
            kept = layer.quantized_weight()
            quantized_input = layer.quantized_input(x)
        (inside * torch.ones_like(inside)).sum().backward()  # within autocast, where a user may call it
    torch.testing.assert_close(inside, expected, atol=0, rtol=0)
    torch.testing.assert_close(kept, expected, atol=0, rtol=0)
    torch.testing.assert_close(quantized_input, layer.quantized_input(x).detach(), atol=0, rtol=0)
    if layer.transform is not None:
        within, layer.transform.grad = layer.transform.grad, None
        layer.train().quantized_weight().sum().backward()
        torch.testing.assert_close(within, layer.transform.grad, atol=0, rtol=0)
