from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat import integer_program, quantize
from apot_fat.data.normalization import CIFAR_APOT
from apot_fat.integer.program import Add, Convolution, Lookup, Rescale, Thresholds
from apot_fat.models import create_model
from apot_fat.quant import EIGHT_BIT, QuantConv2d, QuantLinear, preset
from tests.integer.networks import MEAN, NORMALIZATION, STD, Residual, normalized, random_pixels, with_statistics

if TYPE_CHECKING:
    from tests.export.conftest import Released


def of_images(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """The network's logits in float64."""
    mean, std = (torch.tensor(part, dtype=torch.float64)[:, None, None] for part in (MEAN, STD))
    x = (torch.from_numpy(pixels).double() / 255 - mean) / std
    with torch.no_grad():
        return copy.deepcopy(model).double()(x).numpy()


def relative_errors(model: nn.Module, pixels: np.ndarray, **options: Any) -> np.ndarray:
    """How far the program's logits of each image are from the network's."""
    wanted = of_images(model, pixels)
    program = integer_program(model, normalized(pixels), **NORMALIZATION, **options)
    return np.linalg.norm(program.run(pixels) * program.logit_scale - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


VARIANTS = [
    ("apot-cifar", 2),
    ("apot-cifar", 3),
    ("apot-imagenet-pot", 3),
    ("apot-imagenet-uniform", 4),
    ("fat-cifar", 4),
    ("lsq", 3),
    ("pact", 2),
]


@pytest.mark.parametrize(("name", "bits"), VARIANTS)
def test_without_additions_and_float_inputs_logits_are_exact(name: str, bits: int) -> None:
    standardized = {} if name in ("lsq", "pact") else {"weight_alpha": 2.913}
    spec = preset(name, bits=bits, act_alpha=1.937, **standardized)  # no value lies on a threshold
    model = nn.Sequential(
        QuantConv2d(3, 8, 3, padding=1, spec=spec),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        QuantConv2d(8, 8, 3, stride=2, padding=1, groups=4, bias=True, spec=spec),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(3, 1, 1),
        QuantConv2d(8, 8, 1, spec=spec, relu=True),
        nn.ReLU6(),
        nn.Flatten(),
        QuantLinear(8 * 9, 5, bias=False, spec=spec),
    )
    pixels = random_pixels(20, 12)
    model = with_statistics(model, normalized(pixels))
    program = integer_program(model, normalized(pixels[:10]), **NORMALIZATION)
    wanted = of_images(model, pixels)
    assert len({row.tobytes() for row in wanted}) > 1
    np.testing.assert_allclose(program.run(pixels) * program.logit_scale, wanted, rtol=1e-12, atol=1e-12)
    assert not any(isinstance(operation, Rescale) for operation in program.operations)


@pytest.mark.parametrize(("name", "bits"), [("apot-cifar", 4), ("fat-imagenet", 3), ("uniform-mobilenet", 4)])
def test_additions_are_as_exact_as_their_grid(name: str, bits: int) -> None:
    pixels = random_pixels(24, 8)
    model = with_statistics(Residual(name, bits), normalized(pixels))
    wanted = of_images(model, pixels)
    program = integer_program(model, normalized(pixels), **NORMALIZATION, grid_bits=26)
    errors = np.abs(program.run(pixels) * program.logit_scale - wanted).max(1) / np.abs(wanted).max()
    # an image of which a code lies so near its threshold that the grid turns it is one of few
    assert np.mean(errors < 1e-4) > 0.8
    coarse = integer_program(model, normalized(pixels), **NORMALIZATION, grid_bits=15)
    assert np.median(np.abs(coarse.run(pixels) * coarse.logit_scale - wanted).max(1) / np.abs(wanted).max()) < 0.05
    assert all(operation.bits <= 16 for operation in coarse.operations if isinstance(operation, Add))


class _Rectified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def test_a_batch_norm_behind_a_rectified_addition_is_not_rectified_again() -> None:
    pixels = random_pixels(16, 8)
    images = normalized(pixels)
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    stem = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*stem, _Rectified(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), *head)
    model = with_statistics(model, images)
    quantize(model, bits=8, method="apot", calibration=images)
    assert relative_errors(model, pixels).max() < 1e-3


class _TwoStems(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1))
        self.third = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.first(x) + self.second(x) + self.third(x)).mean((2, 3)))


def test_layers_that_read_the_image_in_different_forms_have_tables_of_their_own() -> None:
    pixels = random_pixels(16, 8)
    images = normalized(pixels)
    model = with_statistics(_TwoStems(), images)
    quantize(model, bits=8, method="apot", calibration=images)
    assert relative_errors(model, pixels).max() < 1e-3
    operations = integer_program(model, images, **NORMALIZATION).operations
    assert sum(isinstance(operation, Lookup) for operation in operations) == 2  # the first and third share one


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(QuantConv2d(3, 8, 3, padding=1, spec=EIGHT_BIT), nn.BatchNorm2d(8))
        self.conv = QuantConv2d(8, 8, 3, padding=1, bias=False, spec=preset("uniform-mobilenet", bits=8, act_alpha=1.0))
        self.fc = QuantLinear(8, 5, spec=EIGHT_BIT)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((self.conv(self.pool(x)) + self.conv(x)).mean((2, 3)))


def test_a_layer_called_twice_keeps_what_a_max_pooling_before_its_first_call_leaves_out() -> None:
    pixels = random_pixels(12, 8)
    model = with_statistics(_Twice(), normalized(pixels))
    assert np.median(relative_errors(model, pixels)) < 1e-4


def test_what_is_far_below_the_step_of_a_grid_keeps_to_its_width() -> None:
    model = with_statistics(Residual("apot-cifar", 3), normalized(random_pixels(4, 8)))
    with torch.no_grad():
        for norm in (module for module in model.body.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.fill_(1e-9)  # of a product with it little is left but the half that rounds
            norm.bias.zero_()
    program = integer_program(model, normalized(random_pixels(4, 8)), **NORMALIZATION)
    rescales = [operation for operation in program.operations if isinstance(operation, Rescale)]
    (first, *_) = [operation for operation in rescales if operation.shift_C.max() > 32]
    np.testing.assert_allclose(first.addend_C / np.exp2(first.shift_C - 1), 1, atol=0.01)
    assert first.product_bits > first.shift_C.max()
    program.run(random_pixels(8, 8))


FAMILIES = [
    ("resnet20", "apot-cifar", 3, 8),
    ("resnet20", "fat-cifar", 4, 8),
    ("vgg_small", "fat-cifar", 3, 16),
    ("mobilenet_v2_x0_35", "apot-imagenet", 4, 32),
    ("mobilenet_v2_x0_35", "fat-imagenet", 4, 32),
    ("resnet18", "apot-imagenet", 3, 32),
]


@pytest.mark.parametrize(("architecture", "name", "bits", "size"), FAMILIES)
def test_every_family_computes_its_network(architecture: str, name: str, bits: int, size: int) -> None:
    pixels = random_pixels(8, size)
    model = with_statistics(create_model(architecture, name, bits, num_classes=5), normalized(pixels))
    # a last layer of thousands of inputs leaves them 14 bits
    assert np.median(relative_errors(model, pixels, grid_bits=26)) < 5e-3


@pytest.mark.parametrize("accumulator_bits", [24, 31])
def test_logits_hold_a_bias_that_is_large_beside_their_sums(accumulator_bits: int) -> None:
    pixels = random_pixels(16, 8)
    images = normalized(pixels)
    last = nn.Linear(8, 5)
    with torch.no_grad():
        last.weight.mul_(1e-3)
        last.bias.mul_(100)
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *pooling, last).eval()
    quantize(model, bits=8, method="apot", calibration=images)
    program = integer_program(model, images, **NORMALIZATION, accumulator_bits=accumulator_bits)
    logits = program.run(pixels)
    assert np.abs(logits).max() < 2 ** (accumulator_bits - 2)
    wanted = of_images(model, pixels)
    np.testing.assert_allclose(logits * program.logit_scale, wanted, atol=4 * program.logit_scale)


def test_the_bias_of_a_last_layer_of_few_bits_is_not_rounded_to_the_unit_of_its_sums() -> None:
    pixels = random_pixels(16, 8)
    spec = preset("lsq", bits=2)
    last = QuantLinear(8 * 36, 5, spec=spec)
    nn.init.uniform_(last.bias, -0.3, 0.3)
    model = nn.Sequential(QuantConv2d(3, 8, 3, spec=spec), nn.ReLU(), nn.Flatten(), last)
    model = with_statistics(model, normalized(pixels))
    assert np.median(relative_errors(model, pixels)) < 1e-6


def test_thresholds_of_one_a_channel_are_factors_of_their_channels() -> None:
    spec = preset("lsq", bits=4, weight_per_channel=True)
    model = nn.Sequential(
        QuantConv2d(3, 8, 3, padding=1, spec=spec),
        nn.BatchNorm2d(8),
        QuantConv2d(8, 8, 3, stride=2, spec=spec, relu=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),  # of sums in units of their own: read from the grid
        nn.Flatten(),
        QuantLinear(8, 5, spec=spec),
    )
    pixels = random_pixels(20, 9)
    model = with_statistics(model, normalized(pixels))
    program = integer_program(model, normalized(pixels), **NORMALIZATION)
    errors = np.abs(program.run(pixels) * program.logit_scale - of_images(model, pixels)).max(1)
    assert np.median(errors) < 1e-5


def test_a_network_of_its_own_is_quantized_and_lowered() -> None:
    pixels = random_pixels(32, 8)
    images = normalized(pixels)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(8),  # after a maximum: read from the grid
        nn.Conv2d(8, 16, 3, padding="same"),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.ReLU6(),
        nn.Linear(16, 5),
    )
    model = with_statistics(model, images)
    quantize(model, bits=4, method="apot", calibration=images)
    wanted = of_images(model, pixels)
    program = integer_program(model, images, **NORMALIZATION)
    errors = np.linalg.norm(program.run(pixels) * program.logit_scale - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(errors) < 1e-3
    table = program.table().splitlines()
    assert len(table) == 2 + len(program.operations)
    assert table[0].split()[:3] == ["layer", "operation", "result"]


def test_widths_are_those_that_are_reached_and_proven() -> None:
    pixels = random_pixels(8, 8)
    model = with_statistics(create_model("resnet20", "apot-cifar", 3), normalized(pixels))
    program = integer_program(model, normalized(pixels), **NORMALIZATION)
    for operation, reached in zip(program.operations, program.reached, strict=True):
        assert operation.low <= reached[0] <= reached[1] <= operation.high
        assert operation.bits <= 32
    results = list(program.results(pixels))
    assert program.reached == tuple((int(result.min()), int(result.max())) for result in results)
    sums = [operation for operation in program.operations if isinstance(operation, Convolution)]
    assert len(sums) == 22

    assert max(operation.weight_bits for operation in sums[1:-1]) == 3  # −3 … 3
    thresholds = [operation for operation in program.operations if isinstance(operation, Thresholds)]
    assert {operation.levels for operation in thresholds} == {(0, 1, 2, 3, 4, 6, 8, 10)}
    # behind an addition one row serves all channels
    assert {len(operation.thresholds_CT) for operation in thresholds} == {1, 16, 32, 64}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_networks_of_other_float_types_are_lowered_as_float32(dtype: torch.dtype) -> None:
    pixels = random_pixels(8, 8)
    model = with_statistics(Residual("lsq", 8), normalized(pixels)).to(dtype)
    program = integer_program(model, normalized(pixels).to(torch.float64), **NORMALIZATION)
    same = integer_program(model.float(), normalized(pixels), **NORMALIZATION)
    assert np.array_equal(program.run(pixels), same.run(pixels))


def test_a_program_that_is_not_its_network_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_pixels(12, 8)
    model = with_statistics(Residual("apot-cifar", 4), normalized(pixels))
    monkeypatch.setattr(Add, "compute", lambda self, first, second: first.clip(self.low, self.high))
    with pytest.raises(
        ValueError, match=r"on \d of 8 calibration images its logits are off by .* fault of apot-fat"
    ) as raised:
        integer_program(model, normalized(pixels), **NORMALIZATION)
    assert "\n" not in str(raised.value)


def test_comparing_draws_no_random_numbers_of_the_user() -> None:
    pixels = random_pixels(2, 8)
    model = with_statistics(Residual("lsq", 2), normalized(pixels))
    state = torch.random.get_rng_state()
    integer_program(model, normalized(pixels), **NORMALIZATION, grid_bits=8)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "least"), [(3, 945), (4, 939)])
def test_released_networks_keep_their_accuracy(released: Released, bits: int, least: int) -> None:
    model, images, labels = released(bits)
    mean, std = CIFAR_APOT
    program = integer_program(model, images[:100], mean=mean, std=std)
    pixels = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    logits = program.run((pixels * 255).round().byte().numpy())
    correct = int((logits.argmax(1) == labels.numpy()).sum())
    print(f"\n{bits} bits: {correct} of {len(labels)} right\n{program.table()}")
    assert correct >= least


@pytest.mark.parametrize("bits", [3, 4])
def test_released_networks_give_the_classes_of_pytorch(released: Released, bits: int) -> None:
    model, images, _ = released(bits)
    images = images[:12]
    mean, std = CIFAR_APOT
    program = integer_program(model, images, mean=mean, std=std)
    pixels = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    logits = program.run((pixels * 255).round().byte().numpy())
    wanted = model(images).numpy()
    # in all images but few a code lies so near its threshold that the first layer's table or the grid turns it
    assert np.abs(logits * program.logit_scale - wanted).max(1).min() < 1e-3
    assert (logits.argmax(1) == wanted.argmax(1)).sum() >= 11
