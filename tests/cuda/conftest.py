"""A CUDA device for machines without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from apot_fat.quant.seam import set_kernels
from tests.fake_cuda import FakeCuda, fake_cuda


@pytest.fixture(autouse=True)
def _eager() -> None:
    set_kernels("eager")  # there is no code to compile for what is not there


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device
