"""The compilers, emulators and other tools that slow tests call: `make toolchains` installs them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

BARE = Path(__file__).parent / "bare"
PACKAGES = {
    "gcc": "gcc",
    "clang": "clang",
    "objdump": "binutils",
    "riscv64-unknown-elf-gcc": "gcc-riscv64-unknown-elf",
    "arm-none-eabi-gcc": "gcc-arm-none-eabi",
    "iverilog": "iverilog",
    "yosys": "yosys",
    "qemu-riscv32": "qemu-user",
    "qemu-system-arm": "qemu-system-arm",
}


def needs(*tools: str) -> None:
    """Skips the test without them."""
    missing = [PACKAGES[tool] for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: apt-get install {' '.join(missing)}, or make toolchains for all that tests use")


@dataclass(frozen=True)
class Processor:
    """A processor without an operating system's libraries, and the emulator that runs its programs.

    Args:
        prefix: of its tools.
        flags: of its compiler.
        start: files of ``bare/`` that are its alone.
        emulator: command, to which the program is added.
    """

    prefix: str
    flags: str
    start: tuple[str, ...]
    emulator: str

    @property
    def tools(self) -> tuple[str, str]:
        """What must be installed."""
        return f"{self.prefix}gcc", self.emulator.split()[0]

    def build(self, folder: Path, pixels: np.ndarray) -> str:
        """net.elf of net.c in a folder and of images; the linker's report of memory."""
        (folder / "images.bin").write_bytes(pixels.tobytes())
        files = [folder / "net.c", *(BARE / name for name in ("main.c", "images.S", *self.start))]
        options = f"{self.flags} -Os -Wall -Wextra -Werror -ffreestanding -nostdlib -I{folder} -Wa,-I{folder}"
        line = [f"{self.prefix}gcc", *options.split(), "-Wl,--print-memory-usage", *map(str, files)]
        done = subprocess.run(
            [*line, "-lgcc", "-o", str(folder / "net.elf")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, folder: Path) -> np.ndarray:
        """The logits that net.elf prints."""
        line = [*self.emulator.split(), str(folder / "net.elf")]
        done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=600)
        printed = [[int(word, 16) for word in row.split()] for row in (done.stdout + done.stderr).splitlines()]
        return np.array(printed, np.uint32).view(np.int32)

    def symbols(self, folder: Path) -> list[str]:
        """Names of net.elf."""
        return [line.split()[-1] for line in self._said("nm", folder).splitlines()]

    def code(self, folder: Path) -> str:
        """Instructions of net.elf."""
        return self._said("objdump", folder, "-d", "--no-show-raw-insn")

    def _said(self, tool: str, folder: Path, *options: str) -> str:
        line = [self.prefix + tool, *options, str(folder / "net.elf")]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout


PROCESSORS = {
    "rv32i": Processor("riscv64-unknown-elf-", "-march=rv32i -mabi=ilp32", ("start_riscv32.c",), "qemu-riscv32"),
    "cortex-m0": Processor(
        "arm-none-eabi-",
        f"-mcpu=cortex-m0.small-multiply -mthumb -T {BARE}/cortex_m0.ld",
        ("start_cortex_m0.c",),
        "qemu-system-arm -M microbit -display none -semihosting -kernel",
    ),
}


def used(report: str, region: str) -> int:
    """Bytes that the linker reports of a region."""
    found = re.search(rf"{region}:\s+(\d+) (K?)B", report)
    assert found, report
    return int(found[1]) << (10 if found[2] else 0)
