"""Tables and the figures of a sweep's results."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apot_fat.checkpoint import atomic_write
from apot_fat.optional import needed_for
from apot_fat.reporting.figures import METHOD_COLORS
from apot_fat.training.results import ResultRow

MEASURES = ("top1", "best", "val_top1")


@dataclass(frozen=True)
class Summary:
    """All seeds of one recipe, method and bit-width.

    Args:
        values: one a seed, %, in the order of the seeds.
        mean: of the values.
        deviation: their standard deviation, unbiased; None of one seed.
        epochs: of each run.
        seconds: mean of the runs'.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float | None
    epochs: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


Column = tuple[str, int]


def summaries(rows: Sequence[ResultRow], measure: str = "top1") -> dict[tuple[str, str, int], Summary]:
    """Results by (recipe, method, bits).

    Args:
        rows: of one sweep.
        measure: ``top1`` (test, last epoch), ``best`` (test, best epoch) or ``val_top1`` (held out, last epoch).

    Raises:
        ValueError: another measure, or ``val_top1`` of runs that held nothing out.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure {measure!r}: choose one of {', '.join(MEASURES)}")
    found: dict[tuple[str, str, int], list[ResultRow]] = {}
    for row in rows:
        if getattr(row, measure) is None:
            raise ValueError(f"{measure}: recipe {row.recipe} held no images out; choose top1 or best")
        found.setdefault((row.recipe, row.method, row.bits), []).append(row)
    result = {}
    for key, runs in found.items():
        runs = sorted(runs, key=lambda row: row.seed)
        values = tuple(float(getattr(row, measure)) for row in runs)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        seconds = statistics.fmean(row.seconds for row in runs)
        result[key] = Summary(values, statistics.fmean(values), deviation, max(row.epochs for row in runs), seconds)
    return result


def sweep_table(rows: Sequence[ResultRow], baseline: str | None = "published", measure: str = "top1") -> str:
    """Markdown: recipes down, methods and bit-widths across, mean ± standard deviation; then the gain over a baseline.

    The gain is the mean, and the lowest, over the cells that a recipe shares with the baseline; without one there is
    none.

    Raises:
        ValueError: no rows, a baseline that is not among them, or a bad measure.
    """
    cells = summaries(rows, measure)
    recipes, columns = _recipes(rows), _columns(rows)
    if baseline is not None and baseline not in recipes:
        raise ValueError(f"baseline {baseline!r}: choose one of {', '.join(recipes) or 'no recipe'}")
    head = ["recipe", *(f"{method} {bits}" for method, bits in columns), "mean gain", "lowest gain"]
    lines = []
    for recipe in recipes:
        found = [cells.get((recipe, *column)) for column in columns]
        gains = [
            cells[recipe, *column].mean - cells[baseline, *column].mean
            for column in columns
            if baseline is not None and (recipe, *column) in cells and (baseline, *column) in cells
        ]
        shown = ["–" if cell is None else str(cell) for cell in found]
        gain = ["–", "–"]
        if gains and recipe != baseline:
            gain = [f"{statistics.fmean(gains):+.2f}", f"{min(gains):+.2f}"]
        lines.append([recipe, *shown, *gain])
    return _markdown(head, lines)


def seeds_table(rows: Sequence[ResultRow], measure: str = "top1") -> str:
    """Markdown: one line a recipe, method and bit-width, with the value of each seed and the mean seconds of a run."""
    head = ["recipe", "method", "bits", "epochs", "mean", "std", "each seed", "seconds"]
    lines = []
    cells = summaries(rows, measure)
    for recipe in _recipes(rows):
        for method, bits in _columns(rows):
            cell = cells.get((recipe, method, bits))
            if cell is None:
                continue
            deviation = "–" if cell.deviation is None else f"{cell.deviation:.2f}"
            values = ", ".join(f"{value:.2f}" for value in cell.values)
            line = [recipe, method, str(bits), str(cell.epochs), f"{cell.mean:.2f}", deviation, values]
            lines.append([*line, f"{cell.seconds:.0f}"])
    return _markdown(head, lines)


def draw_sweep(rows: Sequence[ResultRow], path: Path, baseline: str = "published", measure: str = "top1") -> Path:
    """Draw each recipe's gain over the baseline, a point a method and bit-width with its standard deviation.

    Returns:
        The path of the PNG.
    """
    with needed_for("drawing a sweep"):
        from matplotlib.figure import Figure

    cells = summaries(rows, measure)
    columns = [column for column in _columns(rows) if (baseline, *column) in cells]
    recipes = [recipe for recipe in _recipes(rows) if any((recipe, *column) in cells for column in columns)]
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(recipes)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for index, column in enumerate(columns):
        points = [(y, cells[recipe, *column]) for y, recipe in enumerate(recipes) if (recipe, *column) in cells]
        offset = (index - (len(columns) - 1) / 2) * 0.6 / max(len(columns), 1)
        axes.errorbar(
            [cell.mean - cells[baseline, *column].mean for _, cell in points],
            [y + offset for y, _ in points],
            xerr=[cell.deviation or 0.0 for _, cell in points],
            label=f"{column[0]}, {column[1]} bits",
            **_style(column),
        )
    axes.axvline(0, color="#4d4d4d", linewidth=0.9)
    axes.set_yticks(range(len(recipes)), labels=recipes)
    axes.invert_yaxis()
    axes.set(xlabel=f"{measure} minus that of {baseline}, points; bars: standard deviation over the seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def draw_against_seconds(rows: Sequence[ResultRow], path: Path, measure: str = "top1") -> Path:
    """Draw accuracy over the seconds of a run: a panel a bit-width, a colour a method, a marker a recipe.

    Points are means over the seeds, bars their standard deviation.

    Returns:
        The path of the PNG.
    """
    with needed_for("drawing a sweep"):
        from matplotlib.figure import Figure

    cells = summaries(rows, measure)
    widths = sorted({bits for _, _, bits in cells}, reverse=True)
    markers = dict(zip(_recipes(rows), itertools.cycle("osD^vP*X"), strict=False))
    height = max(3.8, 0.4 + 0.2 * len({(recipe, method) for recipe, method, _ in cells}))
    figure = Figure(figsize=(2.5 + 2.8 * len(widths), height), dpi=110, layout="constrained")
    panels = dict(zip(widths, figure.subplots(1, len(widths), squeeze=False)[0], strict=True))
    entries: dict[str, Any] = {}
    for (recipe, method, bits), cell in cells.items():
        style = {"color": _color(method), "marker": markers[recipe], "linestyle": "none", "markersize": 6}
        drawn = panels[bits].errorbar(cell.seconds, cell.mean, yerr=cell.deviation or 0.0, elinewidth=0.9, **style)
        entries.setdefault(f"{recipe}, {method}", drawn)
    for bits, axes in panels.items():
        axes.set(title=f"{bits} bits", xlabel="seconds a run", ylabel=f"{measure}, %" if bits == widths[0] else None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, loc="outside right center")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _color(method: str) -> str:
    return METHOD_COLORS.get(method.split("-")[0], "#cc79a7")


def _style(column: Column) -> dict[str, Any]:
    method, bits = column
    marker = {32: "*", 5: "D", 4: "s", 3: "o", 2: "^"}.get(bits, "v")
    return {"color": _color(method), "marker": marker, "linestyle": "none", "markersize": 5, "elinewidth": 0.9}


def _recipes(rows: Sequence[ResultRow]) -> list[str]:
    return list(dict.fromkeys(row.recipe for row in rows))


def _columns(rows: Sequence[ResultRow]) -> list[Column]:
    # methods as they come, bits from many to few
    methods = list(dict.fromkeys(row.method for row in rows))
    return sorted({(row.method, row.bits) for row in rows}, key=lambda c: (methods.index(c[0]), -c[1]))


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
