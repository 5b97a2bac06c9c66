"""Pieces of C source."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

Array = np.ndarray
_LINE = 110


def packed_bytes(codes: Array, bits: int) -> list[int]:
    """Codes as bytes: the lowest bit of the first code is the lowest of the first byte."""
    binary = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(binary.ravel().astype(np.uint8), bitorder="little").tolist()


def array_lines(values: Iterable[str]) -> str:
    """Values of an array, in lines."""
    lines, line = [], "   "
    for value in values:
        if len(line) + len(value) > _LINE:
            lines.append(line)
            line = "   "
        line += f" {value},"
    return "\n".join([*lines, line.rstrip(",")])


def statement(function: str, *arguments: Any) -> str:
    """A statement that calls a function."""
    return f"{function}({', '.join(map(str, arguments))});"


def comment(text: str) -> str:
    """A text without what ends a comment."""
    return re.sub(r"[^\w.:, -]", "_", text, flags=re.ASCII)
