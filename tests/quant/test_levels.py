from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from apot_fat import LevelSet, apot_levels, build_power_value, pot_levels, uniform_levels
from apot_fat.quant import level_set

BITS = range(1, 9)


def test_levels_equal_the_published_ones(reference: Path) -> None:
    published = json.loads((reference / "reference/levels.json").read_text())
    for name, levels in published.items():
        family, bits = name.split("/")
        ours = level_set(family, int(bits))
        assert len(ours) == len(levels), name
        assert max(abs(a - b) for a, b in zip(ours.levels, levels, strict=True)) < 1e-7, name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["uniform", "pot", "apot"])
def test_a_set_has_two_to_the_bits_levels_from_0_to_1(family: str, bits: int) -> None:
    levels = level_set(family, bits)
    assert len(levels) == 2**bits
    assert levels.bits == bits
    assert (levels.levels[0], levels.levels[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in pairwise(levels.levels))


@pytest.mark.parametrize(("bits", "denominator"), [(1, 1), (2, 4), (3, 10), (4, 48), (5, 100), (6, 448)])
def test_apot_sets_have_a_small_denominator(bits: int, denominator: int) -> None:
    assert apot_levels(bits).denominator == denominator


def test_apot_above_six_bits_follows_the_papers_definition() -> None:
    # 8 bits: four two-bit terms with exponents i, i + 4 and i + 8; the smallest sum is 2^-11, the largest 15 · 2^-3
    levels = apot_levels(8)
    assert levels.denominator == 3840
    assert levels.numerators[1] == 1
    # 7 bits: three two-bit terms and the one-bit term 2^-6
    assert apot_levels(7).denominator == 2**9 + 2**8 + 2**7 + 2**3


def test_table_cells_name_the_nearest_level() -> None:
    for levels in (apot_levels(3), apot_levels(5), uniform_levels(4), pot_levels(3)):
        for cell, code in enumerate(levels.cell_codes):
            u = min((cell + 0.5) / (2 * levels.denominator), 1.0)  # inside the cell; the last one is u = 1 alone
            nearest = min(range(len(levels)), key=lambda i: abs(levels.levels[i] - u))
            assert code == nearest


def test_build_power_value_is_sorted_and_float32() -> None:
    for additive in (True, False):
        for bits in BITS:
            levels = build_power_value(bits, additive)
            assert levels.dtype == torch.float32
            assert levels.isfinite().all()
            assert levels.shape == (2**bits,)


@pytest.mark.parametrize("bits", [0, 9, 2.5, "3", True])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(ValueError, match="an integer from 1 to 8"):
        level_set("apot", bits)


def test_unknown_family_and_bad_numerators() -> None:
    with pytest.raises(ValueError, match="choose one of uniform, pot, apot"):
        level_set("log", 3)
    with pytest.raises(ValueError, match="rise strictly"):
        LevelSet((0, 2, 2, 4), 4)
    with pytest.raises(ValueError, match="rise strictly"):
        LevelSet((0, 1, 3), 4)
