from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apot_fat.integer import IntegerProgram
from apot_fat.integer.program import PIXELS, Add, Convolution, Lookup, Pool, Rescale, Thresholds, width
from apot_fat.quant import preset

CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": (2, 2)},
    {"padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)},
    {"padding": (1, 1), "groups": 2},
    {"padding": (1, 1), "groups": 4},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_are_those_of_pytorch(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    options = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, **options}
    weight = rng.integers(-10, 11, (8, 4 // options["groups"], 3, 3))
    x = rng.integers(0, 49, (3, 4, 7, 9))
    wanted = F.conv2d(torch.tensor(x).double(), torch.tensor(weight).double(), **options).long().numpy()
    operation = Convolution("", (0,), wanted.shape[1:], 0, 0, weight, **options, largest_sum=0)
    assert np.array_equal(operation.compute(x), wanted)
    assert operation.products == np.count_nonzero(weight) * wanted.shape[2] * wanted.shape[3]
    assert operation.weight_bits == 5


def test_poolings_are_those_of_pytorch() -> None:
    x = np.random.default_rng(0).integers(-9, 9, (2, 3, 7, 8))
    images = torch.tensor(x).double()
    largest = Pool("", (0,), (3, 4, 4), -9, 9, "max", (3, 3), (2, 2), (1, 1))
    assert np.array_equal(largest.compute(x), F.max_pool2d(images, 3, 2, 1).long())
    sums = Pool("", (0,), (3, 3, 4), -99, 99, "sum", (2, 2), (2, 2))
    assert np.array_equal(sums.compute(x), (F.avg_pool2d(images, 2) * 4).long())


def test_operations_by_hand() -> None:
    x = np.arange(-3, 4).reshape(1, 1, 1, 7)
    one = np.array([1])
    rescale = Rescale("", (0,), (1, 1, 7), -3, 3, 3 * one, 2 * one, 2 * one, 6)  # 3 x / 4, rounded
    assert rescale.compute(x).ravel().tolist() == [-2, -1, -1, 0, 1, 2, 2]
    assert Add("", (0, 0), (1, 1, 7), 0, 4).compute(x, x).ravel().tolist() == [0, 0, 0, 0, 2, 4, 4]
    thresholds = Thresholds("", (0,), (1, 1, 7), 0, 5, np.array([[-1, 2]]), np.array([True]), (0, 3, 5))
    assert thresholds.compute(x).ravel().tolist() == [5, 5, 3, 3, 3, 0, 0]
    assert thresholds.repeated_CT.tolist() == [[-1, -1, -1, 2, 2]]
    lookup = Lookup("", (PIXELS,), (2, 1, 1), -255, 255, np.array([np.arange(256), -np.arange(256)]))
    assert lookup.compute(np.array([[[[7]], [[9]]]])).ravel().tolist() == [7, -9]
    assert [width(*bounds) for bounds in ((0, 0), (0, 255), (-1, 0), (-128, 127), (-129, 0))] == [1, 8, 1, 8, 9]


def test_a_result_outside_of_its_bounds_is_never_silent() -> None:
    lookup = Lookup("table", (PIXELS,), (1, 1, 1), 0, 255, np.arange(256)[None])
    program = IntegerProgram((lookup,), (1, 1, 1), 1.0)
    pixels = np.full((1, 1, 1, 1), 200, np.uint8)
    assert program.run(pixels).tolist() == [[200]]
    assert program.run(pixels[:0]).shape == (0, 1)
    with pytest.raises(AssertionError, match=r"table: \(200, 200\) not in \(0, 100\)"):
        IntegerProgram((replace(lookup, high=100),), (1, 1, 1), 1.0).run(pixels)


def test_other_pixels_are_refused() -> None:
    program = IntegerProgram((), (1, 2, 2), 1.0)
    with pytest.raises(ValueError, match=r"pixels float64 \(1, 1, 2, 2\): expected a NumPy array, uint8"):
        program.run(np.zeros((1, 1, 2, 2)))
    with pytest.raises(ValueError, match=r"pixels uint8 \(1, 2, 2\): expected"):
        program.run(np.zeros((1, 2, 2), np.uint8))


def test_four_bit_weights_are_the_fifteen_values_of_potacc() -> None:
    levels = preset("apot-cifar", bits=4).weight_set
    assert set(levels.signed_numerators) == {0, *(sign * n for n in (1, 2, 3, 4, 6, 8, 10) for sign in (1, -1))}
    # its int8 values: 127 for the largest
    assert [round(127 * n / levels.denominator) for n in levels.numerators] == [0, 13, 25, 38, 51, 76, 102, 127]
