"""The C of a program on processors without a multiplier, in emulators."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from apot_fat import integer_program
from apot_fat.data.normalization import CIFAR_APOT
from apot_fat.integer.c import c_source
from tests.integer.test_c import program_of, write
from tests.integer.toolchains import PROCESSORS, needs

if TYPE_CHECKING:
    from tests.export.conftest import Released

pytestmark = pytest.mark.slow


def multiplications(names: list[str]) -> list[str]:
    """Routines of the compilers' libraries: products, quotients, floats."""
    return [name for name in names if re.fullmatch(r"__\w*(mul|div|mod|float|fix|[sd]f)\w*|__aeabi_[fd]\w+", name)]


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", ["signed", "powers of two", "two's complement", "below zero", "residual"])
def test_processors_without_a_multiplier_give_the_program_s_logits(name: str, processor: str, tmp_path: Path) -> None:
    machine = PROCESSORS[processor]
    needs(*machine.tools)
    program, pixels = program_of(name, grid_bits=15)
    write(c_source(program, "net"), tmp_path)
    machine.build(tmp_path, pixels[:3])
    assert np.array_equal(machine.run(tmp_path), program.run(pixels[:3]))
    assert "net_run" in machine.symbols(tmp_path)
    assert not multiplications(machine.symbols(tmp_path))
    assert not re.search(r"\t[a-z]*mul", machine.code(tmp_path))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_multiplies_is_found(processor: str, tmp_path: Path) -> None:
    machine = PROCESSORS[processor]
    needs(*machine.tools)
    program, pixels = program_of("residual", grid_bits=15)
    write(c_source(program, "net", "multiply"), tmp_path)
    machine.build(tmp_path, pixels[:1])
    assert multiplications(machine.symbols(tmp_path))


def test_the_released_network_on_rv32i(released: Released, tmp_path: Path) -> None:
    machine = PROCESSORS["rv32i"]
    needs(*machine.tools)
    model, images, _ = released(3)
    mean, std = (torch.tensor(part)[:, None, None] for part in CIFAR_APOT)
    program = integer_program(model, images[:100], mean=CIFAR_APOT[0], std=CIFAR_APOT[1])
    pixels = ((images[:3] * std + mean) * 255).round().byte().numpy()
    write(c_source(program, "net"), tmp_path)
    machine.build(tmp_path, pixels)
    assert np.array_equal(machine.run(tmp_path), program.run(pixels))
    assert not multiplications(machine.symbols(tmp_path))
