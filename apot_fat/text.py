"""Text for terminals."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from typing import Any


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Rows under a head, columns padded; those named in ``left`` to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(head, cells, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """The table of ``aligned`` as HTML, for notebooks.

    >>> html_table(["%"], [["< 1"]])
    '<table><tr><th style="text-align: right">%</th></tr><tr><td style="text-align: right">&lt; 1</td></tr></table>'
    """

    def cell(tag: str, name: str, text: str) -> str:
        side = "left" if name in left else "right"
        return f'<{tag} style="text-align: {side}">{html.escape(printable(text))}</{tag}>'

    lines = [[cell("th", name, name) for name in head]]
    lines += [[cell("td", name, text) for name, text in zip(head, row, strict=True)] for row in rows]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f"<table>{body}</table>"


def one_line(error: BaseException | str) -> str:
    """An error's message on one line, as ``printable``."""
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """Text with what would steer a terminal written out: names of files, classes and layers come from outside.

    Control and formatting characters but line feed and tab, and bytes of file names that are no text.

    >>> printable("layer\\x1b[2J")
    'layer\\\\x1b[2J'
    """
    steering = ("Cc", "Cf", "Cs")
    return "".join(ascii(c)[1:-1] if c not in "\n\t" and unicodedata.category(c) in steering else c for c in text)


def csv_cell(value: Any) -> Any:
    """A value as a cell: text as ``printable``, with an apostrophe before what begins as a formula does."""
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else "") + printable(value)


def bar(value: float, largest: float, width: int = 12) -> str:
    """A horizontal bar of block characters, ``width`` of them for the largest value, in eighths of one.

    >>> bar(3, 4, 4), bar(0.5, 4, 4)
    ('███', '▌')
    """
    eighths = round(8 * width * max(value, 0) / largest) if largest > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
