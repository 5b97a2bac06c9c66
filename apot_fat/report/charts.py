"""The figures of a report as Vega-Lite descriptions: drawn live by the page, and written as files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apot_fat.checkpoint import atomic_write
from apot_fat.optional import needed_for
from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.report.contents import Report

HEIGHT = 260  # pixels
_NAMES_HEIGHT = 140  # of layers, upright
MOST_POINTS = 40  # epochs of a run whose points are drawn on its line
MOST_RULES = 64  # levels that can be told apart under a histogram
LIGHT = {
    "fp32": ("#4d4d4d", "#767676", "#8f8f8f"),
    "apot": ("#0a3f70", "#0072b2", "#3a93d4"),
    "fat": ("#8a3300", "#cc5500", "#e5762b"),
    "uniform": ("#00513b", "#008a64", "#1fa37c"),
    "lsq": ("#5b2a57", "#a04a94", "#c277b8"),
    "pact": ("#4f4300", "#857000", "#a38b14"),
}
DARK = {
    "fp32": ("#d0d4da", "#a4a9b2", "#848a94"),
    "apot": ("#b9dcfa", "#63b1ec", "#3a93d4"),
    "fat": ("#ffcda6", "#ff9a57", "#e5762b"),
    "uniform": ("#a5ecd3", "#43c79f", "#1fa37c"),
    "lsq": ("#f0c9ea", "#d98fcf", "#c277b8"),
    "pact": ("#f0dd84", "#cdb02c", "#a38b14"),
}

_ZOOM = {
    "name": "zoom",
    "select": {
        "type": "interval",
        "translate": "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!",
        "zoom": "wheel![event.shiftKey]",  # a plain wheel scrolls the page
    },
    "bind": "scales",
}
_PARTS = {"test": "test", "train": "training", "val": "held-out"}
_PART_DASHES = [[1, 0], [4, 3], [1, 3]]


@dataclass(frozen=True)
class Chart:
    """A figure.

    Args:
        name: of files and of its place on the page.
        title: what it shows.
        alt: what one sees in it, in words; may hold ``{layer}`` and ``{run}``.
        spec: Vega-Lite, without its data and without the runs' colours.
        tables: the tables of ``Report.data`` whose rows it draws.
        needs: columns of which a row must fill one to be drawn.
        side: ``weight`` or ``input`` to draw only the rows of that side.
        run: to draw only the rows of this network.
        scope: ``all`` for every run and layer, ``layer`` for one layer of every run, ``one`` for one layer of one run.
        note: which of a run's notes says why it may be empty.
    """

    name: str
    title: str
    alt: str
    spec: dict[str, Any]
    tables: tuple[str, ...]
    needs: tuple[str, ...]
    side: str | None = None
    run: int | None = None
    scope: str = "all"
    note: str | None = None


def make_charts(report: Report) -> list[Chart]:
    """The figures that the report's numbers allow, in the order of the page."""
    longest = max(run["epochs"] or 0 for run in report.data["runs"])
    points = longest <= MOST_POINTS
    parts = _PARTS if any(report.data["epochs"].get("val_top1", ())) else {k: _PARTS[k] for k in ("test", "train")}
    alike = not any(run["bits_differ"] or run["input_bits_text"] for run in report.data["runs"])
    charts = [_curves("error", parts, points), _curves("loss", parts, points)]
    charts += [_accuracy("bits", alike), _accuracy("size", alike), *_bits_by_layer(report)]
    charts += [_thresholds_over_time("weight", points), _thresholds_over_time("act", points)]
    charts += [_thresholds_by_layer(), _sqnr_by_layer()]
    charts += [_histogram("weight"), _shares("weight"), _histogram("input"), _shares("input"), _spectrum(), _mask()]
    charts.append(_layer_thresholds(points))
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


def _base(**parts: Any) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": HEIGHT,
        "autosize": {"type": "fit", "contains": "padding"},
        "config": {
            "font": "system-ui, sans-serif",
            "background": None,
            "view": {"stroke": None},
            "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "grid": True},
            "legend": {"labelFontSize": 12, "orient": "bottom", "columns": 3},
            "title": {"fontSize": 14, "anchor": "start"},
        },
        **parts,
    }


_GREY = "#848a94"  # told from either background
_LINE_SYMBOL = {"symbols": {"update": {"stroke": {"value": _GREY}}}}
_COLOR: dict[str, Any] = {"field": "run", "type": "nominal", "scale": {}, "legend": None}
_MARGIN = {"nice": False, "padding": 10}
_SINCE = {
    "field": "since",
    "type": "quantitative",
    "title": "epoch, counted from the first stage",
    "axis": {"tickMinStep": 1},
    "scale": {"zero": False, "nice": False, "padding": 6},
}
_LAYER = {
    "field": "layer",
    "type": "quantitative",
    "title": "layer, in the order of definition",
    "axis": {"tickMinStep": 1},
    "scale": {"zero": False, "nice": False, "padding": 8},
}


def _tip(field: str, title: str, kind: str = "quantitative", form: str | None = None) -> dict[str, Any]:
    return {"field": field, "title": title, "type": kind} | ({"format": form} if form else {})


_RUN_TIP = _tip("label", "network", "nominal")


def _parts_line(
    parts: dict[str, str], field: str, dashes: list[list[int]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    # columns of a row as lines of one run, told apart by their dashes
    rename = " : ".join(f"datum.column == '{column}' ? '{text}'" for column, text in parts.items())
    transform: list[dict[str, Any]] = [
        {"fold": list(parts), "as": ["column", field]},
        {"filter": f"isValid(datum.{field})"},
        {"calculate": f"{rename} : ''", "as": "part"},
    ]
    dash = {
        "field": "part",
        "type": "nominal",
        "scale": {"domain": list(parts.values()), "range": dashes[: len(parts)]},
        "legend": {"title": None, "symbolSize": 500, "encoding": _LINE_SYMBOL},
    }
    return transform, dash


def _curves(what: str, parts: dict[str, str], points: bool) -> Chart:
    column = "top1" if what == "error" else "loss"
    transform, dash = _parts_line({f"{part}_{column}": text for part, text in parts.items()}, column, _PART_DASHES)
    y: dict[str, Any]
    if what == "error":
        transform.append({"calculate": "100 - datum.top1", "as": "error"})
        y = {"field": "error", "title": "top-1 error, %", "scale": {"type": "symlog", "constant": 1}}
        y["axis"] = {"values": [0, 1, 2, 5, 10, 20, 50, 100]}
    else:
        transform.append({"filter": "datum.loss > 0"})
        y = {"field": "loss", "title": "cross entropy, nats", "scale": {"type": "log"}}
    tips = [_RUN_TIP, _tip("part", "images", "nominal"), _tip("epoch", "epoch of the stage")]
    tips.append(_tip(what, y["title"], form=".4g"))
    encoding = {"x": _SINCE, "y": {"type": "quantitative", **y}, "color": _COLOR, "strokeDash": dash, "tooltip": tips}
    held_out = " and held-out images (dotted)" if len(parts) == len(_PARTS) else ""
    return Chart(
        what,
        f"Training and test {what} over the epochs",
        f"Lines: {y['title']}, of test images (solid), training images (dashed){held_out}, over the epochs of all "
        "stages on one axis.",
        _base(transform=transform, layer=_lines(encoding, points)),
        ("epochs",),
        tuple(f"{part}_{column}" for part in parts),
        note="curves",
    )


def _accuracy(against: str, alike: bool) -> Chart:
    # alike: each network has one number of bits, for weights and inputs
    x: dict[str, Any] = {
        "field": "bits",
        "type": "ordinal",
        "title": "bits of weights and activations" if alike else "bits of weights, the mean where layers differ",
        "axis": {"labelAngle": 0},
    }
    words = "bits"
    if against == "size":
        x = {
            "field": "kilobytes",
            "type": "quantitative",
            "title": "packed size, kB (1,000 bytes)",
            "scale": {"type": "log", "nice": False, "padding": 24},
        }
        words = "packed size"
    transform = [
        {"calculate": "isValid(datum.best) ? datum.best : datum.measured", "as": "top1"},
        {"calculate": "datum.packed_bytes / 1000", "as": "kilobytes"},
        {"filter": "isValid(datum.top1)"},
    ]
    tips = [
        _RUN_TIP,
        _tip("bits_text", "bits", "nominal"),
        _tip("top1", "top-1, %", form=".2f"),
        _tip("kilobytes", "packed, kB", form=",.1f"),
    ]
    y = {"field": "top1", "type": "quantitative", "title": "best top-1, %", "scale": {"zero": False, "padding": 12}}
    line = {
        "mark": {"type": "line", "color": _GREY, "strokeWidth": 1.5},
        "transform": [{"filter": "datum.bits < 32"}],
        "encoding": {"x": x, "y": y, "detail": {"field": "hue"}},
    }
    points = {
        "mark": {"type": "point", "size": 130, "strokeWidth": 3},
        "encoding": {"x": x, "y": y, "color": _COLOR, "shape": {"field": "hue", "legend": None}, "tooltip": tips},
    }
    params = {"params": [_ZOOM]} if against == "size" else {}
    return Chart(
        f"accuracy-{against}",
        f"Accuracy against {words}",
        f"Points: best top-1 accuracy in % of each network against its {words}; lines join the bit-widths of a method.",
        _base(transform=transform, layer=[line, points | params]),
        ("runs",),
        ("best", "measured"),
        note="accuracy",
    )


def _thresholds_over_time(side: str, points: bool) -> Chart:
    word = "weight" if side == "weight" else "activation"
    unit = "normalised weight" if side == "weight" else "unit of the input"
    field = f"{side}_alpha"
    transform = [
        {"filter": f"isValid(datum.{field})"},
        {
            "aggregate": [
                {"op": "median", "field": field, "as": "median"},
                {"op": "min", "field": field, "as": "low"},
                {"op": "max", "field": field, "as": "high"},
            ],
            "groupby": ["run", "label", "since", "epoch"],
        },
    ]
    tips = [_RUN_TIP, _tip("epoch", "epoch of the stage")]
    tips += [
        _tip(name, f"{text} of layers", form=".4f")
        for name, text in (("low", "least"), ("median", "median"), ("high", "largest"))
    ]
    scale = {"zero": False, "nice": False, "padding": 8}
    title = f"α of {word}s, {unit}"
    band = {
        "mark": {"type": "area", "opacity": 0.2},
        "encoding": {
            "x": _SINCE,
            "y": {"field": "low", "type": "quantitative", "title": title, "scale": scale},
            "y2": {"field": "high"},
            "color": _COLOR,
        },
    }
    y = {"field": "median", "type": "quantitative", "title": title, "scale": scale}
    lines = _lines({"x": _SINCE, "y": y, "color": _COLOR, "tooltip": tips}, points)
    return Chart(
        f"thresholds-{word}",
        f"Clipping thresholds of {word}s over time",
        f"Lines: median over the layers of the {word} clipping threshold α over the epochs; bands: least to largest.",
        _base(transform=transform, layer=[band, *lines]),
        ("thresholds",),
        (field,),
        note="thresholds",
    )


def _by_layer(name: str, title: str, alt: str, parts: dict[str, str], axis: str) -> Chart:
    transform, dash = _parts_line(parts, "value", [[1, 0], [4, 3]])
    tips = [_RUN_TIP, _tip("name", "layer", "nominal"), _tip("part", "of", "nominal"), _tip("value", axis, form=".4g")]
    y = {"field": "value", "type": "quantitative", "title": axis, "scale": {"nice": False, "padding": 8}}
    encoding = {"x": _LAYER, "y": y, "color": _COLOR, "strokeDash": dash, "tooltip": tips}
    spec = _base(transform=transform, layer=_lines(encoding, points=True))
    return Chart(name, title, alt, spec, ("layers",), tuple(parts), note="levels")


def _bits_by_layer(report: Report) -> list[Chart]:
    # one a network: bars of several would hide each other
    runs = report.data["runs"]
    mixed = [run for run in runs if run["bits_differ"]]
    charts = []
    for run in mixed:
        name = f"bits-layers-{run['id'] + 1}" if len(mixed) > 1 else "bits-layers"
        title = f"Bits of each layer of {run['label']}" if len(runs) > 1 else "Bits of each layer"
        charts.append(_bits_of(report, run, name, title))
    return charts


def _bits_of(report: Report, run: dict[str, Any], name: str, title: str) -> Chart:
    rows = report.rows("layers", run=run["id"])
    average = f"in the average of {run['mean_bits']:.2f} bits"
    top, has_inputs = _top(rows, run), run["input_bits_text"] is not None
    marks = {"layer": _bits_marks(rows, average, top, has_inputs)}
    return Chart(
        name,
        title,
        _bits_text(rows, run),
        _base(
            transform=_bits_columns(average, top, run["packed_bytes"]),
            layer=[marks, _bytes_points(rows)],
            resolve={"scale": {"y": "independent"}},
            height=HEIGHT + _NAMES_HEIGHT,
        ),
        ("layers",),
        ("weight_bits",),
        run=run["id"],
        note="bits",
    )


def _bits_text(rows: list[dict[str, Any]], run: dict[str, Any]) -> str:
    left_out = [row["weight_bits"] for row in rows if not row["quantized"]]
    kinds = ["8-bit ends"] if any(bits != FLOAT_BITS for bits in left_out) else []
    kinds += ["float layers (cut off at the top)"] if FLOAT_BITS in left_out else []
    parts = ["Bars: bits of the weight of each layer, first to last"]
    parts.append(f"{run['mean_bits']:.2f} bits a weight on average over the quantized layers")
    parts += [f"pale and not counted in it: {' and '.join(kinds)}"] if kinds else []
    parts += ["lines: bits of the input, none where it is float"] if run["input_bits_text"] is not None else []
    return "; ".join([*parts, "grey points: share of the packed bytes."])


def _top(rows: list[dict[str, Any]], run: dict[str, Any]) -> int:
    # where the axis ends and the bars of float layers, which would dwarf the others
    bits = [row["weight_bits"] for row in rows]
    bits += [row["act_bits"] for row in rows if run["input_bits_text"] is not None]
    return 1 + max(n for n in bits if n != FLOAT_BITS)


_NOT_COUNTED = "not counted"


def _bits_columns(average: str, top: int, packed_bytes: int) -> list[dict[str, Any]]:
    columns = {
        "height": f"min(datum.weight_bits, {top})",
        "share": f"datum.packed_bytes / {packed_bytes}",
        "counted": f"datum.quantized ? '{average}' : '{_NOT_COUNTED}'",
    }
    for side in ("weight", "act"):
        columns[f"{side}_text"] = f"datum.{side}_bits == {FLOAT_BITS} ? 'float' : datum.{side}_bits"
    return [{"calculate": formula, "as": name} for name, formula in columns.items()]


def _by_name(rows: list[dict[str, Any]], **channels: Any) -> dict[str, Any]:
    # encoding over the names of the layers
    tips = [_RUN_TIP, _tip("name", "layer", "nominal"), _tip("weight_text", "weight, bits", "nominal")]
    tips += [_tip("act_text", "input, bits", "nominal"), _tip("counted", "its bits", "nominal")]
    tips += [_tip("weight_count", "weights", form=","), _tip("packed_bytes", "packed, bytes", form=",")]
    tips.append(_tip("share", "packed, share", form=".2%"))
    x = {
        "field": "name",
        "type": "nominal",
        "title": "layer, in the order of definition",
        "axis": {"labelAngle": -90, "labelOverlap": True, "grid": False},
        "scale": {"domain": [row["name"] for row in rows]},
    }
    return {"x": x, "tooltip": tips, **channels}


def _bits_marks(rows: list[dict[str, Any]], average: str, top: int, has_inputs: bool) -> list[dict[str, Any]]:
    kinds = [average] if all(row["quantized"] for row in rows) else [average, _NOT_COUNTED]
    opacity = {
        "field": "counted",
        "type": "ordinal",
        "scale": {"domain": kinds, "range": [0.6, 0.25][: len(kinds)]},
        "legend": {"title": None, "labelLimit": 300, "symbolFillColor": _GREY},
    }
    y = {
        "type": "quantitative",
        "title": "bits (weight bar, input line)" if has_inputs else "bits of the weight",
        "axis": {"tickMinStep": 1},
        "scale": {"domain": [0, top], "nice": False},
    }
    height = {**y, "field": "height"}
    bars = {"mark": "bar", "encoding": _by_name(rows, y=height, color=_COLOR, opacity=opacity)}
    words = {
        "mark": {"type": "text", "angle": -90, "align": "right", "dx": -4, "fontSize": 10},
        "transform": [{"filter": f"datum.weight_bits == {FLOAT_BITS}"}],
        "encoding": _by_name(rows, y=height, text={"field": "weight_text"}),
    }
    lines = {
        "mark": {"type": "tick", "thickness": 3, "opacity": 1},
        "transform": [{"filter": f"datum.act_bits < {FLOAT_BITS}"}],
        "encoding": _by_name(rows, y={**y, "field": "act_bits"}, color=_COLOR),
    }
    return [bars, words, lines] if has_inputs else [bars, words]


def _bytes_points(rows: list[dict[str, Any]]) -> dict[str, Any]:
    mark = {"type": "point", "filled": True, "size": 50, "opacity": 1, "color": _GREY}
    y = {
        "field": "share",
        "type": "quantitative",
        "title": "share of packed bytes (points)",
        "axis": {"format": "~%", "grid": False, "titleColor": _GREY, "labelColor": _GREY},
    }
    return {"mark": {**mark, "stroke": "white", "strokeWidth": 1}, "encoding": _by_name(rows, y=y)}


def _thresholds_by_layer() -> Chart:
    return _by_layer(
        "thresholds-layers",
        "Clipping thresholds by layer",
        "Lines: clipping threshold α of weights (solid) and of activations (dashed) of each layer, first to last.",
        {"weight_alpha": "weights", "act_alpha": "activations"},
        "α, weights normalised",
    )


def _sqnr_by_layer() -> Chart:
    return _by_layer(
        "sqnr-layers",
        "Quantization error by layer",
        "Lines: signal-to-quantization-noise ratio in dB of weights (solid) and of inputs (dashed) of each layer, "
        "first to last; higher is better.",
        {"weight_sqnr": "weights", "input_sqnr": "activations"},
        "SQNR, dB",
    )


def _histogram(side: str) -> Chart:
    word = "Weights" if side == "weight" else "Inputs"
    unit = "weight before projection" if side == "weight" else "input of the layer"
    as_they_are = " (normalised, and with FAT transformed)" if side == "weight" else ""
    tips = [_tip("low", "from", form=".4g"), _tip("high", "to", form=".4g"), _tip("count", "count", form=",")]
    bars = {
        "mark": {"type": "bar", "binSpacing": 0, "opacity": 0.8},
        "transform": [{"filter": "isValid(datum.count)"}],
        "params": [_ZOOM],
        "encoding": {
            "x": {"field": "low", "type": "quantitative", "title": unit, "bin": {"binned": True}},
            "x2": {"field": "high"},
            "y": {"field": "count", "type": "quantitative", "title": "count, zeros left out"},
            "color": _COLOR,
            "tooltip": tips,
        },
    }
    levels = {
        "mark": {"type": "rule", "color": _GREY, "strokeWidth": 1},
        "transform": [
            {"filter": "isValid(datum.level)"},
            {"joinaggregate": [{"op": "count", "as": "levels"}]},
            {"filter": f"datum.levels <= {MOST_RULES}"},
        ],
        "encoding": {"x": {"field": "level", "type": "quantitative"}},
    }
    spec = _base(layer=[levels, bars])
    return Chart(
        f"{side}-histogram",
        f"{word}, histogram",
        f"Bars: histogram of the {word.lower()} of {{layer}} in {{run}}{as_they_are}, zeros left out; grey rules: "
        "levels, the outermost at the clipping threshold.",
        spec,
        ("bins", "levels"),
        ("count", "level"),
        side=side,
        scope="one",
        note="inputs" if side == "input" else None,
    )


def _shares(side: str) -> Chart:
    word = "Weights" if side == "weight" else "Inputs"
    tips = [_tip("level", "level", form=".4g"), _tip("share", "share", form=".2%")]
    x = {"field": "level", "type": "quantitative", "title": "level times threshold, same unit", "scale": _MARGIN}
    y = {"field": "share", "type": "quantitative", "title": f"share of {word.lower()}", "axis": {"format": "~%"}}
    rule = {
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {"x": x, "y": y, "y2": {"datum": 0}, "color": _COLOR, "tooltip": tips},
    }
    point = {
        "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
        "params": [_ZOOM],
        "encoding": {"x": x, "y": y, "color": _COLOR, "tooltip": tips},
    }
    return Chart(
        f"{side}-levels",
        f"{word}, share on each level",
        f"Points: share of the {word.lower()} of {{layer}} in {{run}} that land on each level.",
        _base(layer=[rule, point]),
        ("levels",),
        ("share",),
        side=side,
        scope="one",
        note="inputs" if side == "input" else "levels",
    )


_FREQUENCY = {
    "field": "frequency",
    "type": "quantitative",
    "title": "frequency, cycles a weight",
    "scale": {"nice": False},
}


def _spectrum() -> Chart:
    transform, dash = _parts_line(
        {"before": "before the mask", "after": "after the mask"}, "magnitude", [[4, 3], [1, 0]]
    )
    tips = [
        _tip("frequency", "frequency", form=".4f"),
        _tip("part", "", "nominal"),
        _tip("magnitude", "mean |F|", form=".4g"),
    ]
    y = {"field": "magnitude", "type": "quantitative", "title": "mean |F| over output channels"}
    encoding = {"x": _FREQUENCY, "y": y, "color": _COLOR, "strokeDash": dash, "tooltip": tips}
    return Chart(
        "spectrum",
        "Spectrum before and after FAT's mask",
        "Lines: mean magnitude of the spectrum of the weight of {layer} in {run} before the mask (dashed) and after it "
        "(solid), over frequency.",
        _base(transform=transform, layer=_lines(encoding, points=False)),
        ("frequencies",),
        ("before",),
        scope="one",
        note="spectrum",
    )


def _mask() -> Chart:
    tips = [_tip("frequency", "frequency", form=".4f")]
    tips += [
        _tip(f"mask_{name}", text, form=".4f")
        for name, text in (("min", "least"), ("mean", "mean"), ("max", "largest"))
    ]
    y = {"type": "quantitative", "title": "mask, 0 drops and 1 keeps", "scale": {"domain": [0, 1], "padding": 8}}
    band = {
        "mark": {"type": "area", "opacity": 0.25},
        "encoding": {"x": _FREQUENCY, "y": {"field": "mask_min", **y}, "y2": {"field": "mask_max"}, "color": _COLOR},
    }
    lines = _lines({"x": _FREQUENCY, "y": {"field": "mask_mean", **y}, "color": _COLOR, "tooltip": tips}, points=False)
    return Chart(
        "mask",
        "FAT's mask",
        "Line: mean over output channels of the mask of {layer} in {run} over frequency; band: least to largest.",
        _base(layer=[band, *lines]),
        ("frequencies",),
        ("before",),
        scope="one",
        note="spectrum",
    )


def _layer_thresholds(points: bool) -> Chart:
    transform, dash = _parts_line({"weight_alpha": "weights", "act_alpha": "activations"}, "alpha", [[1, 0], [4, 3]])
    tips = [
        _RUN_TIP,
        _tip("part", "of", "nominal"),
        _tip("epoch", "epoch of the stage"),
        _tip("alpha", "α", form=".4f"),
    ]
    y = {
        "field": "alpha",
        "type": "quantitative",
        "title": "α, weights normalised",
        "scale": {"nice": False, "padding": 8},
    }
    encoding = {"x": _SINCE, "y": y, "color": _COLOR, "strokeDash": dash, "tooltip": tips}
    return Chart(
        "layer-thresholds",
        "Its clipping thresholds over time, all networks",
        "Lines: clipping threshold α of weights (solid) and of activations (dashed) of {layer} over the epochs.",
        _base(transform=transform, layer=_lines(encoding, points)),
        ("thresholds",),
        ("weight_alpha", "act_alpha"),
        scope="layer",
        note="thresholds",
    )


def _lines(encoding: dict[str, Any], points: bool) -> list[dict[str, Any]]:
    # points carry the tooltips; where they would be many they are there but not seen
    line = {name: channel for name, channel in encoding.items() if name != "tooltip"}
    point = {name: channel for name, channel in encoding.items() if name != "strokeDash"}
    mark = {"type": "point", "filled": True, "size": 30 if points else 90, "opacity": 1 if points else 0}
    return [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": line},
        {"mark": mark, "params": [_ZOOM], "encoding": point},
    ]
