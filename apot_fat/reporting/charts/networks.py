"""Figures of whole networks: curves, accuracy, thresholds over time, and all layers side by side."""

from __future__ import annotations

from typing import Any

from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.reporting.charts.parts import (
    EPOCH_AXIS,
    GREY,
    HEIGHT,
    LAYER_AXIS,
    RUN_COLOR,
    RUN_TIP,
    ZOOM,
    Chart,
    Points,
    lines_and_points,
    parts_line,
    tip,
    vega_lite,
)
from apot_fat.reporting.contents import Report

PARTS = {"test": "test", "train": "training", "val": "held-out"}
_NAMES_HEIGHT = 140  # of layers, upright
_PART_DASHES = [[1, 0], [4, 3], [1, 3]]


def curves(what: str, parts: dict[str, str], points: Points) -> Chart:
    """Error or loss over the epochs, of these parts of the images."""
    column = "top1" if what == "error" else "loss"
    transform, dash = parts_line({f"{part}_{column}": text for part, text in parts.items()}, column, _PART_DASHES)
    y: dict[str, Any]
    if what == "error":
        transform.append({"calculate": "100 - datum.top1", "as": "error"})
        y = {"field": "error", "title": "top-1 error, %", "scale": {"type": "symlog", "constant": 1}}
        y["axis"] = {"values": [0, 1, 2, 5, 10, 20, 50, 100]}
    else:
        transform.append({"filter": "datum.loss > 0"})
        y = {"field": "loss", "title": "cross entropy, nats", "scale": {"type": "log"}}
    tips = [RUN_TIP, tip("part", "images", "nominal"), tip("epoch", "epoch of the stage")]
    tips.append(tip(what, y["title"], form=".4g"))
    encoding = {
        "x": EPOCH_AXIS,
        "y": {"type": "quantitative", **y},
        "color": RUN_COLOR,
        "strokeDash": dash,
        "tooltip": tips,
    }
    held_out = " and held-out images (dotted)" if len(parts) == len(PARTS) else ""
    return Chart(
        what,
        f"Training and test {what} over the epochs",
        f"Lines: {y['title']}, of test images (solid), training images (dashed){held_out}, over the epochs of all "
        "stages on one axis.",
        vega_lite(transform=transform, layer=lines_and_points(encoding, points)),
        ("epochs",),
        tuple(f"{part}_{column}" for part in parts),
        note="curves",
    )


def accuracy(against: str, alike: bool) -> Chart:
    """Accuracy against bits or size; ``alike`` where every layer of a network has the same bits."""
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
        RUN_TIP,
        tip("bits_text", "bits", "nominal"),
        tip("top1", "top-1, %", form=".2f"),
        tip("kilobytes", "packed, kB", form=",.1f"),
    ]
    y = {"field": "top1", "type": "quantitative", "title": "best top-1, %", "scale": {"zero": False, "padding": 12}}
    line = {
        "mark": {"type": "line", "color": GREY, "strokeWidth": 1.5},
        "transform": [{"filter": "datum.bits < 32"}],
        "encoding": {"x": x, "y": y, "detail": {"field": "hue"}},
    }
    points = {
        "mark": {"type": "point", "size": 130, "strokeWidth": 3},
        "encoding": {"x": x, "y": y, "color": RUN_COLOR, "shape": {"field": "hue", "legend": None}, "tooltip": tips},
    }
    params = {"params": [ZOOM]} if against == "size" else {}
    return Chart(
        f"accuracy-{against}",
        f"Accuracy against {words}",
        f"Points: best top-1 accuracy in % of each network against its {words}; lines join the bit-widths of a method.",
        vega_lite(transform=transform, layer=[line, points | params]),
        ("runs",),
        ("best", "measured"),
        note="accuracy",
    )


def thresholds_over_time(side: str, points: Points) -> Chart:
    """The mean threshold of weights or activations over the epochs."""
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
    tips = [RUN_TIP, tip("epoch", "epoch of the stage")]
    tips += [
        tip(name, f"{text} of layers", form=".4f")
        for name, text in (("low", "least"), ("median", "median"), ("high", "largest"))
    ]
    scale = {"zero": False, "nice": False, "padding": 8}
    title = f"α of {word}s, {unit}"
    band = {
        "mark": {"type": "area", "opacity": 0.2},
        "encoding": {
            "x": EPOCH_AXIS,
            "y": {"field": "low", "type": "quantitative", "title": title, "scale": scale},
            "y2": {"field": "high"},
            "color": RUN_COLOR,
        },
    }
    y = {"field": "median", "type": "quantitative", "title": title, "scale": scale}
    lines = lines_and_points({"x": EPOCH_AXIS, "y": y, "color": RUN_COLOR, "tooltip": tips}, points)
    return Chart(
        f"thresholds-{word}",
        f"Clipping thresholds of {word}s over time",
        f"Lines: median over the layers of the {word} clipping threshold α over the epochs; bands: least to largest.",
        vega_lite(transform=transform, layer=[band, *lines]),
        ("thresholds",),
        (field,),
        note="thresholds",
    )


def _by_layer(name: str, title: str, alt: str, parts: dict[str, str], axis: str) -> Chart:
    transform, dash = parts_line(parts, "value", [[1, 0], [4, 3]])
    tips = [RUN_TIP, tip("name", "layer", "nominal"), tip("part", "of", "nominal"), tip("value", axis, form=".4g")]
    y = {"field": "value", "type": "quantitative", "title": axis, "scale": {"nice": False, "padding": 8}}
    encoding = {"x": LAYER_AXIS, "y": y, "color": RUN_COLOR, "strokeDash": dash, "tooltip": tips}
    spec = vega_lite(transform=transform, layer=lines_and_points(encoding, Points(seen=True)))
    return Chart(name, title, alt, spec, ("layers",), tuple(parts), note="levels")


def bits_by_layer(report: Report) -> list[Chart]:
    """One a network: bars of several would hide each other."""
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
        vega_lite(
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
    tips = [RUN_TIP, tip("name", "layer", "nominal"), tip("weight_text", "weight, bits", "nominal")]
    tips += [tip("act_text", "input, bits", "nominal"), tip("counted", "its bits", "nominal")]
    tips += [tip("weight_count", "weights", form=","), tip("packed_bytes", "packed, bytes", form=",")]
    tips.append(tip("share", "packed, share", form=".2%"))
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
        "legend": {"title": None, "labelLimit": 300, "symbolFillColor": GREY},
    }
    y = {
        "type": "quantitative",
        "title": "bits (weight bar, input line)" if has_inputs else "bits of the weight",
        "axis": {"tickMinStep": 1},
        "scale": {"domain": [0, top], "nice": False},
    }
    height = {**y, "field": "height"}
    bars = {"mark": "bar", "encoding": _by_name(rows, y=height, color=RUN_COLOR, opacity=opacity)}
    words = {
        "mark": {"type": "text", "angle": -90, "align": "right", "dx": -4, "fontSize": 10},
        "transform": [{"filter": f"datum.weight_bits == {FLOAT_BITS}"}],
        "encoding": _by_name(rows, y=height, text={"field": "weight_text"}),
    }
    lines = {
        "mark": {"type": "tick", "thickness": 3, "opacity": 1},
        "transform": [{"filter": f"datum.act_bits < {FLOAT_BITS}"}],
        "encoding": _by_name(rows, y={**y, "field": "act_bits"}, color=RUN_COLOR),
    }
    return [bars, words, lines] if has_inputs else [bars, words]


def _bytes_points(rows: list[dict[str, Any]]) -> dict[str, Any]:
    mark = {"type": "point", "filled": True, "size": 50, "opacity": 1, "color": GREY}
    y = {
        "field": "share",
        "type": "quantitative",
        "title": "share of packed bytes (points)",
        "axis": {"format": "~%", "grid": False, "titleColor": GREY, "labelColor": GREY},
    }
    return {"mark": {**mark, "stroke": "white", "strokeWidth": 1}, "encoding": _by_name(rows, y=y)}


def thresholds_by_layer() -> Chart:
    """The thresholds of each layer."""
    return _by_layer(
        "thresholds-layers",
        "Clipping thresholds by layer",
        "Lines: clipping threshold α of weights (solid) and of activations (dashed) of each layer, first to last.",
        {"weight_alpha": "weights", "act_alpha": "activations"},
        "α, weights normalised",
    )


def sqnr_by_layer() -> Chart:
    """The quantization error of each layer, as SQNR."""
    return _by_layer(
        "sqnr-layers",
        "Quantization error by layer",
        "Lines: signal-to-quantization-noise ratio in dB of weights (solid) and of inputs (dashed) of each layer, "
        "first to last; higher is better.",
        {"weight_sqnr": "weights", "input_sqnr": "activations"},
        "SQNR, dB",
    )
