"""A report as one self-contained HTML file: text and tables are plain HTML, figures are drawn by what is inside.

``page.html`` is its template; here is what that shows.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any

import jinja2

from apot_fat.optional import needed_for
from apot_fat.reporting.charts import make_charts
from apot_fat.reporting.charts.parts import DARK, LIGHT
from apot_fat.reporting.contents import Report

_COST_COLUMNS = (
    ("name", "layer"),
    ("weight_bits", "weight, bits"),
    ("act_bits", "input, bits"),
    ("parameters", "parameters"),
    ("float32_bytes", "float32, bytes"),
    ("packed_bytes", "packed, bytes"),
    ("macs", "MACs"),
    ("bit_operations", "bit-operations"),
    ("shift_adds", "shift-adds"),
    ("float_share", "float MACs, %"),
    ("kind", "kind"),
)
_LAYER_COLUMNS = (
    ("name", "layer"),
    ("weight_bits", "weight, bits"),
    ("act_bits", "input, bits"),
    ("weight_alpha", "α weight"),
    ("act_alpha", "α input"),
    ("weight_sqnr", "SQNR weight, dB"),
    ("input_sqnr", "SQNR input, dB"),
    ("weight_clipped", "weights clipped, %"),
    ("input_clipped", "inputs clipped, %"),
    ("input_zeros", "inputs 0, %"),
    ("mask_min", "mask, least"),
    ("mask_max", "mask, largest"),
    ("kind", "kind"),
)
_DIFFERENCES = (
    ("last", "last, %", "points", 2),
    ("best", "best, %", "points", 2),
    ("measured", "measured, %", "points", 2),
    ("packed_bytes", "packed, bytes", "ratio", 0),
    ("bit_operations", "bit-operations", "ratio", 0),
    ("shift_adds", "shift-adds", "ratio", 0),
    ("weight_sqnr", "SQNR weights, dB", "points", 2),
    ("input_sqnr", "SQNR inputs, dB", "points", 2),
    ("epochs", "epochs", "points", 0),
    ("seconds", "seconds", "ratio", 1),
)
_TEXT = ("name", "kind")
_PERCENT = ("float_share", "weight_clipped", "input_clipped", "input_zeros")

Run = dict[str, Any]


def page(report: Report) -> str:
    """The HTML of a report: nothing in it is fetched from anywhere."""
    charts = make_charts(report)
    runs = report.data["runs"]
    environments = {run["label"]: run["environment"] for run in runs if run["environment"]}
    batches = {f"{run['images_from']}, the first {run['batch']} test images" for run in runs if run["batch"]}
    html = _template().render(
        title=f"{runs[0]['network']}: {runs[0]['label']}" if len(runs) == 1 else f"{len(runs)} networks compared",
        runs=runs,
        charts=charts,
        layer_names=report.data["layers_named"],
        batches=sorted(batches),
        recipes={run["label"]: run["recipe"] for run in runs if run["recipe"]},
        environments=environments | {"this report": report.data["environment"]},
        differences=_differences(runs),
        facts=_facts,
        said=partial(_said, runs),
        rows_of=lambda table, run: report.rows(table, run=run),
        style=_resource("page.css") + _color_variables(runs),
        data=_packed(report.data),
        described=_embedded([{k: v for k, v in asdict(chart).items() if k != "title"} for chart in charts]),
        library=_plotting_library(),
        script=_resource("page.js"),
    )
    return html.lstrip()


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"TEXT": _TEXT, "LAYER_COLUMNS": _LAYER_COLUMNS, "COST_COLUMNS": _COST_COLUMNS}
    environment.globals["columns_of"] = _columns_of
    environment.filters |= {"shown": _shown, "plain": _plain, "value": lambda value: "" if value is None else value}
    return environment.from_string(_resource("page.html"))


@lru_cache(maxsize=1)
def _plotting_library() -> str:
    with needed_for("a report"):
        import vl_convert

    # its newest Vega-Lite, with Vega and vega-embed
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in script  # it would end the element
    return script


def _resource(name: str) -> str:
    return files("apot_fat.reporting").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _embedded(value: Any) -> str:
    return _json(value).replace("<", "\\u003c")


def _packed(value: Any) -> str:
    # the numbers of 50 networks are 10 MB
    return base64.b64encode(gzip.compress(_json(value).encode(), mtime=0)).decode()


def _color_variables(runs: Sequence[Run]) -> str:
    def block(palettes: Mapping[str, tuple[str, ...]]) -> str:
        colors = "".join(f"--run-{run['id']}:{palettes[run['hue']][run['shade']]};" for run in runs)
        return f":root{{{colors}}}"

    return f"{block(LIGHT)}@media screen and (prefers-color-scheme: dark){{{block(DARK)}}}"


def _facts(run: Run) -> list[tuple[str, str]]:
    # what a network's card says
    lines = [("network", run["network"]), ("method", run["method"]), ("bits", run["bits_text"])]
    if run["input_bits_text"] is not None:
        lines[-1:] = [("bits of weights", run["bits_text"]), ("bits of inputs", run["input_bits_text"])]
    if run["last"] is not None:
        lines.append(("top-1, last epoch", f"{run['last']:.2f} %"))
    if run["best"] is not None:
        lines.append(("top-1, best epoch" if run["best_epoch"] else "top-1, recorded", f"{run['best']:.2f} %"))
    if run["best_epoch"]:
        lines.append((f"chosen on {run['best_on']} images", f"epoch {run['best_epoch']}"))
    if run["measured"] is not None:
        lines.append(("top-1, measured here", f"{run['measured']:.2f} %"))
        lines.append(("images correct", f"{run['correct']:,} of {run['images']:,}"))
    if run["best"] is None and run["measured"] is None:
        lines.append(("top-1", "not recorded"))
    if run["epochs"]:
        lines.append(("training", f"{run['epochs']} epochs, {run['seconds']:,.0f} s"))
    lines.append(("size, packed", f"{run['packed_bytes'] / 1000:,.1f} kB"))
    lines.append(("float32 is larger by", f"{run['float32_bytes'] / run['packed_bytes']:.1f} ×"))
    lines.append(("bit-operations", f"{run['bit_operations'] / 1e6:,.4g} M"))
    lines.append(("float takes more by", f"{run['float_bit_operations'] / run['bit_operations']:.1f} ×"))
    if run["weight_sqnr"] is not None:
        lines.append(("SQNR of weights, mean", f"{run['weight_sqnr']:.2f} dB"))
    if run["input_sqnr"] is not None:
        lines.append(("SQNR of inputs, mean", f"{run['input_sqnr']:.2f} dB"))
    return [*lines, ("for one image of", " × ".join(map(str, run["input_shape"])))]


def _differences(runs: Sequence[Run]) -> dict[str, Any]:
    # of each run its numbers, how they are shown, and how they differ from the first run's
    shown = [column for column in _DIFFERENCES if any(run[column[0]] is not None for run in runs)]

    def cell(run: Run, name: str, kind: str, digits: int) -> tuple[Any, str, str]:
        value, base = run[name], runs[0][name]
        change = ""
        if value is not None and base is not None and run is not runs[0]:
            change = f"{value - base:+,.{digits}f}" if kind == "points" else f"× {value / base:.3g}" if base else ""
        return value, "–" if value is None else f"{value:,.{digits}f}", change

    cells = [[cell(run, name, kind, digits) for name, _, kind, digits in shown] for run in runs]
    return {"titles": [title for _, title, _, _ in shown], "cells": cells}


def _said(runs: Sequence[Run], key: str) -> list[str]:
    # each reason once, with the networks it holds for
    by_reason: dict[str, list[str]] = {}
    for run in runs:
        if key in run["notes"]:
            by_reason.setdefault(run["notes"][key], []).append(run["label"])
    return [
        reason if len(labels) == len(runs) else f"{', '.join(labels)}: {reason}" for reason, labels in by_reason.items()
    ]


def _columns_of(columns: Sequence[tuple[str, str]], rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [c for c in columns if c[0] in _TEXT or any(row.get(c[0]) is not None for row in rows)]


def _shown(value: Any, name: str) -> str:
    if value is None or value == "":
        return "–"
    if name in _PERCENT:
        return f"{100 * value:.2f}"
    if isinstance(value, float):
        return f"{value:.2f}" if name.endswith("sqnr") else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
