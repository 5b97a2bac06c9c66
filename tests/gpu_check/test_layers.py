from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from apot_fat import preset
from apot_fat.gpu_check.check import FAILED, OK
from apot_fat.gpu_check.layers import FIXTURE_LIMIT, RANDOM_LIMIT, SMALL, Case, compare, fixture_cases, random_case
from apot_fat.quant.spec import PRESETS

CPU = torch.device("cpu")


def test_every_fixture_is_met_on_a_cpu(reference: Path) -> None:
    arrays = dict(np.load(reference / "reference/layers.npz"))
    names = dict.fromkeys(key.split("/")[0] for key in arrays)
    assert len(names) == 13
    for name in names:
        found = compare(fixture_cases(arrays, name), "off", CPU, FIXTURE_LIMIT)
        assert found.verdict == OK, (name, found)


@pytest.mark.parametrize("name", PRESETS)
def test_random_operands_are_met_on_a_cpu_and_an_error_is_found(name: str) -> None:
    case = random_case(name, preset(name, bits=3), SMALL)
    assert compare([case], "off", CPU, RANDOM_LIMIT).verdict == OK
    for key in case.wanted:
        wrong = case._replace(wanted={**case.wanted, key: [1.01 * value for value in case.wanted[key]]})
        found = compare([case, wrong], "off", CPU, RANDOM_LIMIT)
        assert found.verdict == FAILED
        assert key in found.value


def test_what_is_not_finite_is_an_error() -> None:
    case = random_case("apot-cifar", preset("apot-cifar", bits=3), SMALL)
    broken = Case(*case)._replace(x=torch.full_like(case.x, torch.nan))
    assert compare([broken], "off", CPU, RANDOM_LIMIT).verdict == FAILED
