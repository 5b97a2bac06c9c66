from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from apot_fat.data.normalization import CIFAR_APOT
from apot_fat.export import WRITERS, Export
from apot_fat.integer.program import width
from apot_fat.integer.verilog import WeightCode, mac_module
from apot_fat.quant.levels import level_set
from tests.integer.networks import MEAN, STD, normalized, random_pixels, with_statistics
from tests.integer.test_c import network
from tests.integer.toolchains import needs

if TYPE_CHECKING:
    from tests.export.conftest import Released

FAMILIES = ("apot", "pot", "uniform", "twos-complement", "odd")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_a_code_is_its_sign_and_the_members_that_its_fields_select(family: str, bits: int) -> None:
    code = WeightCode(family, bits)
    codes = code.encode(np.array(code.numerators)).tolist()
    assert len(set(codes)) == len(code.numerators)
    for numerator, found in zip(code.numerators, codes, strict=True):
        assert 0 <= found < 1 << code.width
        magnitude, left = 0, found
        for members in code.fields:
            magnitude += members[left % len(members)]
            left //= len(members)
        if code.fields:
            assert (code.width, numerator) == (bits, -magnitude if left else magnitude)
        else:
            assert found == numerator % (1 << code.width)


def simulate(folder: Path, name: str) -> str:
    subprocess.run(["iverilog", "-Wall", "-o", "bench", f"{name}.v", f"{name}_tb.v"], cwd=folder, check=True)
    return subprocess.run(["./bench"], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["signed", "powers of two", "two's complement", "below zero", "sizes stay"])
def test_the_element_gives_the_sums_of_a_network(name: str, tmp_path: Path) -> None:
    needs("iverilog")
    model, size = network(name)
    images = normalized(random_pixels(4, size))
    model = with_statistics(model, images)
    export = Export(model, tmp_path / "mac.v", tuple(images.shape[1:]), images, MEAN, STD)
    said = WRITERS["verilog"].write(export)
    count = int(re.findall(r"(\d+) sums", said)[0])
    assert re.fullmatch(rf"{count} sums of \d+ terms, 0 wrong\n", simulate(tmp_path, "mac").splitlines(True)[-1])
    (tmp_path / "mac.v").write_text((tmp_path / "mac.v").read_text().replace("before + product", "before - product"))
    assert ", 0 wrong" not in simulate(tmp_path, "mac")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_the_element_of_the_released_networks(released: Released, bits: int, tmp_path: Path) -> None:
    needs("iverilog")
    model, images, _ = released(bits)
    export = Export(model, tmp_path / "mac.v", (3, 32, 32), images[:20], *CIFAR_APOT)
    assert f"apot weights of {bits} bits; 160 sums of 20 layers" in WRITERS["verilog"].write(export)
    assert re.search(r"160 sums of \d+ terms, 0 wrong", simulate(tmp_path, "mac"))


def synthesize(folder: Path, verilog: str) -> tuple[int, int, int]:
    """Transistors of generic gates, iCE40's four-input and Xilinx 7's six-input look-up tables, no DSP block."""
    (folder / "mac.v").write_text(verilog)
    found = []
    for steps, counted in (
        ("synth -flatten -top mac; abc -g AND,OR,XOR,MUX; opt_clean; stat -tech cmos", r"transistors:\s+(\d+)"),
        ("synth_ice40 -top mac; stat", r"SB_LUT4\s+(\d+)"),
        ("synth_xilinx -nodsp -noiopad -noclkbuf -top mac; stat", r"LUT\d\s+(\d+)"),
    ):
        line = ["yosys", "-p", f"read_verilog mac.v; {steps}"]
        said = subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True).stdout
        found.append(sum(map(int, re.findall(counted, said[said.rindex("Printing statistics") :]))))
    return found[0], found[1], found[2]


@pytest.mark.slow
def test_cells_of_each_family(tmp_path: Path) -> None:
    needs("yosys")
    rows: dict[tuple[str, int, bool], tuple[int, int, int]] = {}
    elements = [(family, bits) for bits in (2, 3, 4, 5) for family in ("apot", "pot", "uniform")]
    for family, bits in (*elements, ("uniform", 8), ("twos-complement", 8)):
        code = WeightCode(family, bits)
        for is_byte in (False, True) if bits < 8 else (True,):
            high = 255 if is_byte else level_set(family, bits).denominator
            verilog = mac_module(code, "mac", (0, high), 576 * code.largest * high)
            rows[family, bits, is_byte] = found = synthesize(tmp_path, verilog)
            print(f"\n{family} {bits} bits, inputs of {width(0, high)}: {found}", end="")
    for bits in (2, 3, 4, 5):
        for cells, of_eight in zip(rows["apot", bits, True], rows["uniform", 8, True], strict=True):
            assert cells < 0.7 * of_eight
