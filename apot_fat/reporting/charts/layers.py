"""Figures of one layer: histograms, shares, FAT's spectrum and mask, thresholds over time."""

from __future__ import annotations

from apot_fat.reporting.charts.parts import (
    EPOCH_AXIS,
    GREY,
    MARGIN,
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

MOST_RULES = 64  # levels that can be told apart under a histogram


def histogram(side: str) -> Chart:
    """How often a value comes in a weight or an input, before and after quantization, and the levels."""
    word = "Weights" if side == "weight" else "Inputs"
    unit = "weight before projection" if side == "weight" else "input of the layer"
    as_they_are = " (normalised, and with FAT transformed)" if side == "weight" else ""
    tips = [tip("low", "from", form=".4g"), tip("high", "to", form=".4g"), tip("count", "count", form=",")]
    bars = {
        "mark": {"type": "bar", "binSpacing": 0, "opacity": 0.8},
        "transform": [{"filter": "isValid(datum.count)"}],
        "params": [ZOOM],
        "encoding": {
            "x": {"field": "low", "type": "quantitative", "title": unit, "bin": {"binned": True}},
            "x2": {"field": "high"},
            "y": {"field": "count", "type": "quantitative", "title": "count, zeros left out"},
            "color": RUN_COLOR,
            "tooltip": tips,
        },
    }
    levels = {
        "mark": {"type": "rule", "color": GREY, "strokeWidth": 1},
        "transform": [
            {"filter": "isValid(datum.level)"},
            {"joinaggregate": [{"op": "count", "as": "levels"}]},
            {"filter": f"datum.levels <= {MOST_RULES}"},
        ],
        "encoding": {"x": {"field": "level", "type": "quantitative"}},
    }
    spec = vega_lite(layer=[levels, bars])
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


def shares(side: str) -> Chart:
    """Which share of the values lies on each level of the weight or the input."""
    word = "Weights" if side == "weight" else "Inputs"
    tips = [tip("level", "level", form=".4g"), tip("share", "share", form=".2%")]
    x = {"field": "level", "type": "quantitative", "title": "level times threshold, same unit", "scale": MARGIN}
    y = {"field": "share", "type": "quantitative", "title": f"share of {word.lower()}", "axis": {"format": "~%"}}
    rule = {
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {"x": x, "y": y, "y2": {"datum": 0}, "color": RUN_COLOR, "tooltip": tips},
    }
    point = {
        "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
        "params": [ZOOM],
        "encoding": {"x": x, "y": y, "color": RUN_COLOR, "tooltip": tips},
    }
    return Chart(
        f"{side}-levels",
        f"{word}, share on each level",
        f"Points: share of the {word.lower()} of {{layer}} in {{run}} that land on each level.",
        vega_lite(layer=[rule, point]),
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


def spectrum() -> Chart:
    """FAT's spectrum of a weight before and after its mask."""
    transform, dash = parts_line(
        {"before": "before the mask", "after": "after the mask"}, "magnitude", [[4, 3], [1, 0]]
    )
    tips = [
        tip("frequency", "frequency", form=".4f"),
        tip("part", "", "nominal"),
        tip("magnitude", "mean |F|", form=".4g"),
    ]
    y = {"field": "magnitude", "type": "quantitative", "title": "mean |F| over output channels"}
    encoding = {"x": _FREQUENCY, "y": y, "color": RUN_COLOR, "strokeDash": dash, "tooltip": tips}
    return Chart(
        "spectrum",
        "Spectrum before and after FAT's mask",
        "Lines: mean magnitude of the spectrum of the weight of {layer} in {run} before the mask (dashed) and after it "
        "(solid), over frequency.",
        vega_lite(transform=transform, layer=lines_and_points(encoding, Points(seen=False))),
        ("frequencies",),
        ("before",),
        scope="one",
        note="spectrum",
    )


def mask() -> Chart:
    """FAT's mask over frequency."""
    tips = [tip("frequency", "frequency", form=".4f")]
    tips += [
        tip(f"mask_{name}", text, form=".4f") for name, text in (("min", "least"), ("mean", "mean"), ("max", "largest"))
    ]
    y = {"type": "quantitative", "title": "mask, 0 drops and 1 keeps", "scale": {"domain": [0, 1], "padding": 8}}
    band = {
        "mark": {"type": "area", "opacity": 0.25},
        "encoding": {"x": _FREQUENCY, "y": {"field": "mask_min", **y}, "y2": {"field": "mask_max"}, "color": RUN_COLOR},
    }
    lines = lines_and_points(
        {"x": _FREQUENCY, "y": {"field": "mask_mean", **y}, "color": RUN_COLOR, "tooltip": tips}, Points(seen=False)
    )
    return Chart(
        "mask",
        "FAT's mask",
        "Line: mean over output channels of the mask of {layer} in {run} over frequency; band: least to largest.",
        vega_lite(layer=[band, *lines]),
        ("frequencies",),
        ("before",),
        scope="one",
        note="spectrum",
    )


def layer_thresholds(points: Points) -> Chart:
    """The thresholds of a layer over the epochs."""
    transform, dash = parts_line({"weight_alpha": "weights", "act_alpha": "activations"}, "alpha", [[1, 0], [4, 3]])
    tips = [
        RUN_TIP,
        tip("part", "of", "nominal"),
        tip("epoch", "epoch of the stage"),
        tip("alpha", "α", form=".4f"),
    ]
    y = {
        "field": "alpha",
        "type": "quantitative",
        "title": "α, weights normalised",
        "scale": {"nice": False, "padding": 8},
    }
    encoding = {"x": EPOCH_AXIS, "y": y, "color": RUN_COLOR, "strokeDash": dash, "tooltip": tips}
    return Chart(
        "layer-thresholds",
        "Its clipping thresholds over time, all networks",
        "Lines: clipping threshold α of weights (solid) and of activations (dashed) of {layer} over the epochs.",
        vega_lite(transform=transform, layer=lines_and_points(encoding, points)),
        ("thresholds",),
        ("weight_alpha", "act_alpha"),
        scope="layer",
        note="thresholds",
    )
