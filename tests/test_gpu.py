"""The sections of scripts/gpu_check.py on a GPU: layers, runs and waits in full, the rest tiny; in a few minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apot_fat.gpu_check import FAILED, MISSED, SECTIONS, Check, run_section, table
from apot_fat.models.registry import _REGISTRY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    networks = dict(_REGISTRY)
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    _REGISTRY.clear()
    _REGISTRY.update(networks)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("section", SECTIONS)
def test_section(section: str, tmp_path: Path) -> None:
    in_full = section in ("a", "b", "c")
    rows = list(run_section(section, SECTIONS[section], Check(torch.device("cuda", 0), not in_full, tmp_path)))
    assert rows
    assert not [row for row in rows if row.verdict in (FAILED, MISSED)], "\n" + table(rows)


def test_the_quantizers_kernels_move_memory_as_fast_as_a_copy(tmp_path: Path) -> None:
    items = SECTIONS["g"](Check(torch.device("cuda", 0), False, tmp_path))
    what, measure = next(items)
    found = measure()
    assert found.numbers is not None
    assert found.numbers["share"] > 0.6, (what, found)  # the goal is 0.8; a GPU may be shared
