from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from torch import nn

from apot_fat import integer_program
from apot_fat.integer import IntegerProgram
from apot_fat.integer.c import CSource, Products, c_source
from apot_fat.models import create_model
from apot_fat.quant import QuantConv2d, QuantLinear, preset
from tests.integer.networks import NORMALIZATION, Residual, normalized, random_pixels, with_statistics
from tests.integer.toolchains import needs

STRICT = "-std=c99 -Wall -Wextra -Wshadow -Wconversion -Werror -pedantic".split()
SANITIZED = "-O1 -g -fsanitize=undefined,address -fno-sanitize-recover=all".split()


def plain(name: str, bits: int, **options: Any) -> nn.Module:
    spec = preset(name, bits=bits, act_alpha=2.0, **options)
    return nn.Sequential(
        QuantConv2d(3, 8, 3, padding=1, spec=spec),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(3, 2, 1),
        QuantConv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=4, bias=True, spec=spec, relu=True),
        nn.BatchNorm2d(8),
        nn.AvgPool2d(2),
        QuantConv2d(8, 6, (1, 2), padding=(0, 2), stride=(1, 2), spec=spec),
        nn.Flatten(),
        QuantLinear(6 * 2 * 3, 5, spec=spec),
    )


def all_sizes_stay() -> nn.Module:
    spec = preset("apot-imagenet", bits=3, act_alpha=2.0)
    windows: list[dict[str, Any]] = [
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 8},
        {"kernel_size": (3, 1), "padding": (1, 0)},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": 1},
        {"kernel_size": 7, "padding": 9, "dilation": 3},  # wider than the image
    ]
    layers: list[nn.Module] = [QuantConv2d(3, 8, 3, padding=1, spec=spec), nn.BatchNorm2d(8)]
    for window in windows:
        layers += [QuantConv2d(8, 8, spec=spec, relu=True, **window), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), QuantLinear(8, 5, spec=spec))


def network(name: str) -> tuple[nn.Module, int]:
    """A network, and the height and width of its images."""
    made: dict[str, Any] = {
        "signed": lambda: (plain("apot-imagenet", 4, act_signed=True), 16),
        "powers of two": lambda: (plain("apot-imagenet-pot", 4), 16),
        "two's complement": lambda: (plain("lsq", 3), 16),
        "below zero": lambda: (plain("uniform-mobilenet", 4), 16),
        "sizes stay": lambda: (all_sizes_stay(), 7),
        "residual": lambda: (Residual("apot-cifar", 4), 8),
        "mobilenet": lambda: (create_model("mobilenet_v2_x0_35", "fat-imagenet", 4, num_classes=3), 32),
        "resnet": lambda: (create_model("resnet20", "apot-cifar", 3), 8),
    }
    return made[name]()


def program_of(name: str, grid_bits: int = 24) -> tuple[IntegerProgram, np.ndarray]:
    model, size = network(name)
    pixels = random_pixels(6, size)
    model = with_statistics(model, normalized(pixels))
    return integer_program(model, normalized(pixels[:4]), **NORMALIZATION, grid_bits=grid_bits), pixels


def write(source: CSource, folder: Path) -> Path:
    (folder / "net.h").write_text(source.header)
    (folder / "net.c").write_text(source.source)
    return folder / "net.c"


def run_c(path: Path, pixels: np.ndarray, *flags: str, compiler: str = "gcc") -> np.ndarray:
    """What the compiled program prints for images."""
    program = path.with_suffix("")
    subprocess.run([compiler, *STRICT, *flags, "-DNET_MAIN", str(path), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], input=pixels.tobytes(), capture_output=True, check=True)
    return np.array([line.split() for line in done.stdout.decode().splitlines()], np.int64)


@pytest.mark.parametrize("products", get_args(Products))
@pytest.mark.parametrize(
    "name", ["signed", "powers of two", "two's complement", "below zero", "sizes stay", "residual"]
)
def test_c_gives_the_program_s_logits(name: str, products: Products, tmp_path: Path) -> None:
    needs("gcc")
    program, pixels = program_of(name)
    path = write(c_source(program, "net", products), tmp_path)
    assert np.array_equal(run_c(path, pixels, *SANITIZED), program.run(pixels))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("products", get_args(Products))
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_c_of_every_family(name: str, products: Products, compiler: str, tmp_path: Path) -> None:
    needs(compiler)
    program, pixels = program_of(name, grid_bits=15)
    path = write(c_source(program, "net", products), tmp_path)
    for flags in (SANITIZED, ["-O3"]):
        assert np.array_equal(run_c(path, pixels, *flags, compiler=compiler), program.run(pixels))


def test_shifts_and_adds_compile_to_no_multiplication(tmp_path: Path) -> None:
    needs("gcc")
    needs("objdump")
    for products, expected in (("shift", False), ("multiply", True)):
        program, _ = program_of("residual")
        path = write(c_source(program, "net", products), tmp_path)  # type: ignore[arg-type]
        subprocess.run(["gcc", *STRICT, "-O1", "-c", str(path), "-o", str(tmp_path / "net.o")], check=True)
        shown = subprocess.run(["objdump", "-d", str(tmp_path / "net.o")], capture_output=True, text=True, check=True)
        assert bool(re.search(r"\b[a-z]*mul[a-z]*\b", shown.stdout)) == expected


def test_the_source_has_no_floats_and_states_its_memory(tmp_path: Path) -> None:
    needs("gcc")
    program, _ = program_of("residual")
    made = c_source(program, "net")
    code = re.sub(r"/\*.*?\*/", "", made.source, flags=re.DOTALL)
    assert not re.search(r"\b(float|double|malloc|calloc)\b|\d\.\d", code)
    assert code.count("#include") == 2  # its header, and stdio.h for its main
    assert f"#define NET_RAM_BYTES {made.ram}L" in made.header
    path = write(made, tmp_path)
    subprocess.run(["gcc", "-Os", "-c", str(path), "-o", str(tmp_path / "net.o")], check=True)
    sizes = subprocess.run(["size", "-B", str(tmp_path / "net.o")], capture_output=True, text=True, check=True).stdout
    text, data, bss = map(int, sizes.splitlines()[1].split()[:3])
    assert made.ram <= bss < made.ram + 256  # padding between arrays
    assert made.constants < text + data < made.constants + 16384
