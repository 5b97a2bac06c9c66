"""What the figures share: how one is described, colours, and pieces of Vega-Lite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


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

    @property
    def zooms(self) -> bool:
        """Whether it can be zoomed."""
        return any(ZOOM in part.get("params", ()) for part in self.spec.get("layer", (self.spec,)))


HEIGHT = 260  # pixels
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
ZOOM = {
    "name": "zoom",
    "select": {
        "type": "interval",
        "translate": "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!",
        "zoom": "wheel![event.shiftKey]",  # a plain wheel scrolls the page
    },
    "bind": "scales",
}


def vega_lite(**parts: Any) -> dict[str, Any]:
    """A description with what all figures have in common."""
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


GREY = "#848a94"  # told from either background
LINE_SYMBOL = {"symbols": {"update": {"stroke": {"value": GREY}}}}
RUN_COLOR: dict[str, Any] = {"field": "run", "type": "nominal", "scale": {}, "legend": None}
MARGIN = {"nice": False, "padding": 10}
EPOCH_AXIS = {
    "field": "since",
    "type": "quantitative",
    "title": "epoch, counted from the first stage",
    "axis": {"tickMinStep": 1},
    "scale": {"zero": False, "nice": False, "padding": 6},
}
LAYER_AXIS = {
    "field": "layer",
    "type": "quantitative",
    "title": "layer, in the order of definition",
    "axis": {"tickMinStep": 1},
    "scale": {"zero": False, "nice": False, "padding": 8},
}


def tip(field: str, title: str, kind: str = "quantitative", form: str | None = None) -> dict[str, Any]:
    """A line of a tooltip."""
    return {"field": field, "title": title, "type": kind} | ({"format": form} if form else {})


RUN_TIP = tip("label", "network", "nominal")


def parts_line(
    parts: dict[str, str], field: str, dashes: list[list[int]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Columns of a row as lines of one run, told apart by their dashes."""
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
        "legend": {"title": None, "symbolSize": 500, "encoding": LINE_SYMBOL},
    }
    return transform, dash


class Points(NamedTuple):
    """Points of lines, which carry the tooltips.

    Args:
        seen: whether they are drawn; where they would hide the line they are there, but not seen.
        every: how many epochs have one together: a page draws thousands of points slowly.
    """

    seen: bool
    every: int = 1


def lines_and_points(encoding: dict[str, Any], points: Points) -> list[dict[str, Any]]:
    """Lines, and their points."""
    line = {name: channel for name, channel in encoding.items() if name != "tooltip"}
    point = {name: channel for name, channel in encoding.items() if name != "strokeDash"}
    mark = {"type": "point", "filled": True, "size": 30 if points.seen else 90, "opacity": int(points.seen)}
    few = {"transform": [{"filter": f"(datum.epoch - 1) % {points.every} == 0"}]} if points.every > 1 else {}
    return [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": line},
        {"mark": mark, "params": [ZOOM], "encoding": point, **few},
    ]
