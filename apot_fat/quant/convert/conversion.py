"""What ``quantize`` did to a network, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from apot_fat.text import aligned, html_table


@dataclass(frozen=True)
class ConvertedLayer:
    """One row of a ``Conversion``: a layer, what its weight and input became (``float`` where left), and why.

    ``error`` is that of its output on the calibration inputs beside the float network's, ‖y_q − y‖ / ‖y‖, the errors of
    the layers before it included; None where it is not known.
    """

    name: str
    type: str
    weight: str
    input: str
    error: float | None
    note: str

    @property
    def is_quantized(self) -> bool:
        """Whether anything of it is quantized."""
        return self.weight != "float" or self.input != "float"


@dataclass(frozen=True)
class Conversion:
    """What ``quantize`` did: one row a layer. Printed, an aligned table.

    ``error`` is that of the network's output on the calibration inputs, ‖y_q − y‖ / ‖y‖; None without them, or where
    the outputs have other shapes, as a detector's boxes do.
    """

    rows: tuple[ConvertedLayer, ...]
    error: float | None = None

    @property
    def sqnr(self) -> float | None:
        """Signal-to-quantization-noise ratio of the network's output, dB: −20 log10 of ``error``."""
        return _decibel(self.error)

    @property
    def converted(self) -> list[str]:
        """Names of the layers that were quantized."""
        return [row.name for row in self.rows if row.is_quantized]

    @property
    def left(self) -> list[str]:
        """Names of the layers and parameters that stay float."""
        return [row.name for row in self.rows if not row.is_quantized]

    def table(self) -> str:
        """The rows as an aligned table."""
        return aligned(*self._columns())

    def _columns(self) -> tuple[list[str], list[list[str]], list[str]]:
        names = [field.name for field in fields(ConvertedLayer) if field.name not in ("error", "note")]
        measured = any(row.error is not None for row in self.rows)
        cells = [
            [
                *(getattr(row, name) for name in names),
                *((_shown(row.error), _shown(_decibel(row.error))) if measured else ()),
                row.note,
            ]
            for row in self.rows
        ]
        head = [*names, *(("error", "SQNR, dB") if measured else ()), "note"]
        return head, cells, [*names, "note"]

    def __str__(self) -> str:
        return "\n".join([self.table(), *self._summary()])

    def _repr_html_(self) -> str:
        return "".join([html_table(*self._columns()), *self._summary()])

    def _summary(self) -> list[str]:
        if self.error is None:
            return []
        return [f"the network's output: error {_shown(self.error)}, SQNR {_shown(self.sqnr)} dB"]


def _decibel(error: float | None) -> float | None:
    return -20 * math.log10(error) if error else None


def _shown(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"
