from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat import integer_program
from apot_fat.models import create_model
from apot_fat.quant import EIGHT_BIT, QuantConv2d, QuantLinear, preset
from tests.integer.networks import MEAN, NORMALIZATION, STD, normalized, random_pixels


class _Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_() + x


class _AddsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(x)
        return x


class _Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x)


def last(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(QuantConv2d(3, 4, 3, spec=EIGHT_BIT), *modules).eval()


REFUSED = [
    (nn.Sequential(nn.Conv2d(3, 4, 3)), "layer 0: Conv2d is float; quantize it"),
    (last(nn.Sigmoid()), "layer 1: Sigmoid has no integer form here; supported between"),
    (last(QuantConv2d(4, 4, 3, spec=preset("apot-cifar", bits=32))), "layer 1: its weight is float; give it 2 to 8"),
    (last(QuantConv2d(4, 4, 3, padding=1, padding_mode="circular")), "layer 1: padding_mode 'circular'; integer"),
    (last(nn.AdaptiveAvgPool2d(5)), r"layer 1: \(6, 6\) averaged into \[5, 5\]; sizes must divide evenly"),
    (last(nn.AvgPool2d(2, padding=1)), "layer 1: average pooling with padding"),
    (last(nn.MaxPool2d(2, ceil_mode=True)), "layer 1: max pooling with ceil_mode"),
    (last(QuantLinear(6, 2, spec=EIGHT_BIT)), r"layer 1: a linear layer on images \(4, 6, 6\); flatten them"),
    (last(nn.BatchNorm2d(4, track_running_stats=False)), "layer 1: batch norm without running statistics"),
    (last(nn.ReLU()), r"the network gives \(4, 6, 6\): integer programs give logits"),
    (last(nn.Flatten(2)), r"layer 1: gives \(2, 4, 36\); integer programs keep to"),
    (_InPlace(), "layer relu_: changes in place what others read"),
    (_AddsInPlace(), "layer add_: changes in place what others read"),
    (_Dropping(), "layer dropout: dropout has no integer form"),
    (_Two(), "the network gives more than one tensor"),
    (_Branching(), "_Branching: torch.fx cannot trace it"),
    (last(QuantConv2d(4, 4, 6, spec=preset("fat-cifar-log", bits=5)), nn.Flatten()), r"layer 1: accumulator up to \d+"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_has_no_integer_form_is_one_line_that_names_it(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        integer_program(model, normalized(random_pixels(2, 8)), **NORMALIZATION)
    assert "\n" not in str(raised.value)


def test_calibration_that_is_not_made_of_pixels_is_refused() -> None:
    model, images = create_model("resnet20", bits=3), normalized(random_pixels(2, 8))
    with pytest.raises(ValueError, match=r"calibration images are pixels from .* not 0 to 255"):
        integer_program(model, 3 * images, **NORMALIZATION)
    with pytest.raises(ValueError, match="give a number, std above 0, for each of the calibration's 3 channels"):
        integer_program(model, images, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"calibration \(3, 8, 8\): expected at least one image"):
        integer_program(model, images[0], **NORMALIZATION)
    with pytest.raises(ValueError, match=r"mean 0.5 and std 0.5: give a number, std above 0, for each"):
        integer_program(model, images, mean=0.5, std=0.5)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"integer_program\(CifarResNet, list\): expected a network, and images as one"
    ):
        integer_program(model, [images], **NORMALIZATION)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"calibration \(2, 3, 8, 0\): expected at least one image"):
        integer_program(model, images[..., :0], **NORMALIZATION)


def test_widths_that_are_not_whole_or_out_of_range_are_refused() -> None:
    model, images = create_model("resnet20", bits=3), normalized(random_pixels(2, 8))
    cases: list[tuple[str, Any]] = [("grid_bits", 40), ("grid_bits", 8.5), ("accumulator_bits", "24")]
    for name, wrong in cases:
        with pytest.raises(ValueError, match=f"{name} {wrong!r}: choose [0-9]+ to [0-9]+, a whole number"):
            integer_program(model, images, **NORMALIZATION, **{name: wrong})


def test_images_that_the_network_refuses_are_one_line() -> None:
    model = last(nn.Flatten(), QuantLinear(4 * 6 * 6, 2, spec=EIGHT_BIT))
    images = normalized(random_pixels(2, 9))
    refused = r"calibration \(2, 3, 9, 9\): the network refuses it \(.*\); give images of its size and channels$"
    with pytest.raises(ValueError, match=refused) as raised:
        integer_program(model, images, **NORMALIZATION)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"refuses it \(.* 3 channels, but got 1 channels instead\)"):
        integer_program(model, images[:, :1], mean=MEAN[:1], std=STD[:1])


def test_the_images_stay_as_they_are() -> None:
    images = normalized(random_pixels(4, 8))
    before = images.clone()
    with contextlib.suppress(ValueError):  # whatever comes of it
        integer_program(nn.Sequential(nn.ReLU(inplace=True), last()), images, **NORMALIZATION)
    assert images.equal(before)
