from __future__ import annotations

import numpy as np
import pytest
import torch

from apot_fat.integer.inversion import find_thresholds
from apot_fat.quant import QuantConv2d, preset
from apot_fat.quant.integers import integer_input

Array = np.ndarray


def levels_passed(x: Array, thresholds_CT: Array, falls_C: Array, used: tuple[int, ...]) -> Array:
    oriented = np.where(falls_C[:, None], -x, x)
    return np.array(used)[(thresholds_CT[:, None, :] <= oriented[:, :, None]).sum(-1)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["apot-cifar", "apot-imagenet-pot", "apot-imagenet-uniform", "fat-cifar"])
def test_thresholds_give_the_quantizer_s_level_of_every_integer(name: str, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = QuantConv2d(1, 1, 1, spec=preset(name, bits=bits, act_alpha=float(rng.uniform(0.5, 9))), relu=True)
    gain = rng.normal(size=(12, 1)) * 10.0 ** rng.uniform(-4, 0, (12, 1))
    gain[:2] = 0
    offset = rng.normal(size=(12, 1))

    def numerators(n: Array) -> Array:
        codes = integer_input(layer, torch.from_numpy(gain * n + offset))
        assert codes is not None
        return codes.numerators.numpy()

    found = find_thresholds(numerators, -600, 900, layer.spec.act_set.numerators)
    x = np.arange(-600, 901)[None] + np.zeros((12, 1), np.int64)
    assert np.array_equal(levels_passed(x, *found), numerators(x))
    thresholds_CT, falls_C, used = found
    assert thresholds_CT.shape == (12, len(used) - 1)
    assert (np.diff(thresholds_CT, axis=1) >= 0).all()
    assert thresholds_CT.min() >= -900
    assert thresholds_CT.max() <= 901
    assert not falls_C[:2].any()  # a gain of 0: all thresholds at an end
    assert set(thresholds_CT[:2].flat) <= {-600, 901}


def test_negative_gains_flip_their_rows() -> None:
    found = find_thresholds(lambda n: np.clip(np.array([[2], [-2]]) * n, 0, 4) // 2, -5, 5, (0, 1, 2))
    assert found[0].tolist() == [[1, 2], [1, 2]]
    assert found[1].tolist() == [False, True]


def test_a_function_of_one_level_has_no_thresholds() -> None:
    thresholds, _, used = find_thresholds(lambda n: np.zeros((3, n.shape[1]), int), 0, 9, (0, 1))
    assert thresholds.shape == (3, 0)
    assert used == (0,)
