"""Text for terminals."""

from __future__ import annotations

from collections.abc import Sequence


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


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def bar(value: float, largest: float, width: int = 12) -> str:
    """A horizontal bar of block characters, ``width`` of them for the largest value, in eighths of one.

    >>> bar(3, 4, 4), bar(0.5, 4, 4)
    ('███', '▌')
    """
    eighths = round(8 * width * max(value, 0) / largest) if largest > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
