"""The figures of a report as Vega-Lite descriptions: drawn live by the page, and written as files."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from apot_fat.checkpoint import atomic_write
from apot_fat.optional import needed_for
from apot_fat.reporting.charts.layers import histogram, layer_thresholds, mask, shares, spectrum
from apot_fat.reporting.charts.networks import (
    PARTS,
    accuracy,
    bits_by_layer,
    curves,
    sqnr_by_layer,
    thresholds_by_layer,
    thresholds_over_time,
)
from apot_fat.reporting.charts.parts import LIGHT, Chart, Points
from apot_fat.reporting.contents import Report

MOST_POINTS = 40  # epochs of a run whose points are drawn on its line
MOST_TOOLTIPS = 2000  # points of a figure of all runs and epochs


def make_charts(report: Report) -> list[Chart]:
    """The figures that the report's numbers allow, in the order of the page."""
    epochs = [run["epochs"] or 0 for run in report.data["runs"]]
    points = Points(max(epochs) <= MOST_POINTS, math.ceil(sum(epochs) / MOST_TOOLTIPS))
    parts = PARTS if any(report.data["epochs"].get("val_top1", ())) else {k: PARTS[k] for k in ("test", "train")}
    alike = not any(run["bits_differ"] or run["input_bits_text"] for run in report.data["runs"])
    charts = [curves("error", parts, points), curves("loss", parts, points)]
    charts += [accuracy("bits", alike), accuracy("size", alike), *bits_by_layer(report)]
    charts += [thresholds_over_time("weight", points), thresholds_over_time("act", points)]
    charts += [thresholds_by_layer(), sqnr_by_layer()]
    charts += [histogram("weight"), shares("weight"), histogram("input"), shares("input"), spectrum(), mask()]
    charts.append(layer_thresholds(points))
    return [chart for chart in charts if len(rows_of(report, chart)) > (chart.tables == ("runs",))]  # one point is none


def write_figures(
    drawn: Iterable[tuple[str, dict[str, Any]]], folder: Path, progress: Callable[[str], None] = lambda name: None
) -> list[Path]:
    """Write figures as PNG and SVG.

    Args:
        drawn: of ``figures``.
        folder: where to; made if it is not there.
        progress: told of each figure as it is done.

    Returns:
        The files.
    """
    with needed_for("drawing figures"):
        import vl_convert

    written = []
    for name, spec in drawn:
        svg = vl_convert.vegalite_to_svg(spec)
        files = {".svg": svg.encode(), ".png": vl_convert.svg_to_png(svg, scale=2)}
        for suffix, content in files.items():
            path = folder / f"{name}{suffix}"
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
            written.append(path)
        progress(name)
    return written


def figures(report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and complete Vega-Lite description, with data, colours and a legend, of each figure that is not empty."""
    for chart in make_charts(report):
        places: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for row in rows_of(report, chart):
            place = {"all": (), "layer": (row.get("layer", 0),), "one": (row["run"], row.get("layer", 0))}[chart.scope]
            places.setdefault(place, []).append(row)
        for rows in places.values():
            layer = rows[0]["name"] if chart.scope != "all" else ""
            run = rows[0]["label"] if chart.scope == "one" else ""
            where = f" of {layer}{f', {run}' if run else ''}" if layer else ""
            spec = copy.deepcopy(chart.spec)
            spec |= {"data": {"values": rows}, "width": 560, "title": f"{chart.title}{where}"}
            spec["description"] = chart.alt.format(layer=layer, run=run)
            spec["config"] |= {"background": "white", "padding": 12}
            _set_colors(spec, report.data["runs"], sorted({row["run"] for row in rows}))
            yield re.sub(r"[^\w.-]+", "_", "-".join(part for part in (chart.name, layer, run) if part)), spec


def rows_of(report: Report, chart: Chart) -> list[dict[str, Any]]:
    """The rows that a chart draws, of every run and layer."""
    if chart.tables == ("runs",):
        left_out = ("notes", "recipe", "environment", "input_shape")
        runs = report.data["runs"]
        rows = [{"run": run["id"], **{k: v for k, v in run.items() if k not in left_out}} for run in runs]
    else:
        rows = [row for table in chart.tables for row in report.rows(table)]
    rows = [row for row in rows if chart.run is None or row["run"] == chart.run]
    rows = [row for row in rows if chart.side is None or row["side"] == chart.side]
    return [row for row in rows if any(row.get(name) is not None for name in chart.needs)]


def _set_colors(spec: Any, runs: list[dict[str, Any]], shown: list[int]) -> None:
    # every encoding by run gets the runs' colours, and a legend with the labels of those shown
    if isinstance(spec, list):
        for part in spec:
            _set_colors(part, runs, shown)
    elif isinstance(spec, dict):
        if spec.get("field") == "run" and "scale" in spec:
            colors = [LIGHT[run["hue"]][run["shade"]] for run in runs]
            spec["scale"] = {"domain": [run["id"] for run in runs], "range": colors}
            labels = " : ".join(f"datum.value == {run['id']} ? {json.dumps(run['label'])}" for run in runs)
            spec["legend"] = {"title": None, "labelExpr": f"{labels} : ''", "labelLimit": 300, "values": shown}
        for key, part in spec.items():
            if key != "data":
                _set_colors(part, runs, shown)
