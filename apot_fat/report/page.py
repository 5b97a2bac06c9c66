"""A report as one self-contained HTML file: text and tables are plain HTML, figures are drawn by what is inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from html import escape
from importlib.resources import files
from typing import Any

from apot_fat.optional import needed_for
from apot_fat.report.charts import DARK, LIGHT, Chart, make_charts
from apot_fat.report.contents import Report

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
_TEXT = ("name", "kind")
_PERCENT = ("float_share", "weight_clipped", "input_clipped", "input_zeros")


def page(report: Report) -> str:
    """The HTML of a report: nothing in it is fetched from anywhere."""
    charts = make_charts(report)
    runs = report.data["runs"]
    title = f"{runs[0]['network']}: {runs[0]['label']}" if len(runs) == 1 else f"{len(runs)} networks compared"
    sections = [
        ("summary", "Summary", _summary(runs) + _differences(runs)),
        ("curves", "Training and validation", _legend(runs) + _figures(charts, runs, ("curves",))),
        ("accuracy", "Accuracy, bits and size", _accuracy_section(charts, runs)),
        ("thresholds", "Clipping thresholds", _figures(charts, runs, ("thresholds", "levels"))),
        ("layers", "Layer by layer", _layer_section(report, charts)),
        ("costs", "Costs", _cost_section(report)),
        ("recipe", "Recipe and environment", _recipes(report)),
    ]
    body = "".join(f'<section id="{name}"><h2>{head}</h2>{content}</section>' for name, head, content in sections)
    links = "".join(f'<li><a href="#{name}">{head}</a></li>' for name, head, _ in sections)
    described = [{k: v for k, v in asdict(chart).items() if k != "title"} for chart in charts]
    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{_resource('page.css')}{_color_variables(runs)}</style></head><body>",
            f"<header><h1>{escape(title)}</h1>",
            f'<p class="soft">apot-fat {escape(report.data["environment"]["apot-fat"])}, ',
            f"{escape(report.data['environment']['made'])}</p>",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
            "<noscript><p>The figures need JavaScript; text and tables do not.</p></noscript></header>",
            f"<main>{body}</main>",
            f'<script type="application/json" id="report-data">{_embedded(report.data)}</script>',
            f'<script type="application/json" id="report-charts">{_embedded(described)}</script>',
            f"<script>{_plotting_library()}</script><script>{_resource('page.js')}</script>",
            "</body></html>\n",
        )
    )


@lru_cache(maxsize=1)
def _plotting_library() -> str:
    with needed_for("a report"):
        import vl_convert

    # its newest Vega-Lite, with Vega and vega-embed
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in script  # it would end the element
    return script


def _resource(name: str) -> str:
    return files("apot_fat.report").joinpath(name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _color_variables(runs: Sequence[dict[str, Any]]) -> str:
    def block(palettes: Mapping[str, tuple[str, ...]]) -> str:
        colors = "".join(f"--run-{run['id']}:{palettes[run['hue']][run['shade']]};" for run in runs)
        return f":root{{{colors}}}"

    return f"{block(LIGHT)}@media screen and (prefers-color-scheme: dark){{{block(DARK)}}}"


def _summary(runs: Sequence[dict[str, Any]]) -> str:
    cards = []
    for run in runs:
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
        lines.append(("for one image of", " × ".join(map(str, run["input_shape"]))))
        items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in lines)
        path = f'<p class="soft path">{escape(run["path"]).replace("/", "/<wbr>")}</p>'
        style = f"--run:var(--run-{run['id']})"
        cards.append(
            f'<article class="card" style="{style}"><h3>{escape(run["label"])}</h3>{path}<dl>{items}</dl></article>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _differences(runs: Sequence[dict[str, Any]]) -> str:
    if len(runs) < 2:
        return ""
    quantities = (
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
    columns = [column for column in quantities if any(run[column[0]] is not None for run in runs)]
    head = "".join(_sortable(title, text=False) for _, title, _, _ in columns)
    lines = []
    for run in runs:
        cells = []
        for name, _, kind, digits in columns:
            value, base = run[name], runs[0][name]
            text = "–" if value is None else f"{value:,.{digits}f}"
            if value is not None and base is not None and run is not runs[0]:
                if kind == "points":
                    text += f"<small>{value - base:+,.{digits}f}</small>"
                elif base:
                    text += f"<small>× {value / base:.3g}</small>"
            cells.append(f'<td data-value="{"" if value is None else value}">{text}</td>')
        swatch = f'<span class="swatch" style="--run:var(--run-{run["id"]})"></span> '
        label = f'<th scope="row" class="text" data-value="{escape(run["label"])}">{swatch}{escape(run["label"])}</th>'
        lines.append(f"<tr>{label}{''.join(cells)}</tr>")
    caption = f"Differences from {escape(runs[0]['label'])}: + and − in the column's unit, × as a ratio. Heads sort."
    table = _table(caption, _sortable("network", text=True) + head, "".join(lines))
    return _scroll("Differences", table)


def _legend(runs: Sequence[dict[str, Any]]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" checked data-show="{run["id"]}">'
        f'<span class="swatch" style="--run:var(--run-{run["id"]})"></span>{escape(run["label"])}</label>'
        for run in runs
    )
    usage = "Shift and wheel zoom a figure, dragging moves it, a double click brings it back."
    hint = f'<p class="soft no-print hint">{usage}</p>'
    if len(runs) == 1:
        return hint
    return f'<fieldset class="controls" id="legend"><legend>In the figures:</legend>{boxes}</fieldset>{hint}'


def _accuracy_section(charts: Sequence[Chart], runs: Sequence[dict[str, Any]]) -> str:
    alone = "Accuracy is drawn for two or more networks in which it is known; that of a single one stands above."
    known = sum("accuracy" not in run["notes"] for run in runs)
    said = f'<p class="note">{alone}</p>' if known == 1 else ""
    return _figures(charts, runs, ("accuracy", "bits")) + said


def _figures(charts: Sequence[Chart], runs: Sequence[dict[str, Any]], notes: tuple[str, ...]) -> str:
    drawn = "".join(_figure(chart) for chart in charts if chart.note in notes and chart.scope == "all")
    said = "".join(_said(runs, key) for key in notes)
    return f'<div class="figures">{drawn}</div>{said}' if drawn else said


def _figure(chart: Chart) -> str:
    box = f'<div class="chart" role="img" aria-label="{escape(chart.alt)}" data-chart="{chart.name}"></div>'
    caption = f'<p class="note" hidden></p><figcaption>{_caption(chart)}</figcaption>'
    return f"<figure><h3>{escape(chart.title)}</h3>{box}{caption}</figure>"


def _caption(chart: Chart) -> str:
    return escape(chart.alt.replace(" of {layer} in {run}", "").replace(" of {layer}", ""))


def _said(runs: Sequence[dict[str, Any]], key: str) -> str:
    # each reason once, with the networks it holds for
    by_reason: dict[str, list[str]] = {}
    for run in runs:
        if key in run["notes"]:
            by_reason.setdefault(run["notes"][key], []).append(run["label"])
    lines = []
    for reason, labels in by_reason.items():
        whose = "" if len(labels) == len(runs) else f"{', '.join(labels)}: "
        lines.append(f'<p class="note">{escape(whose + reason)}</p>')
    return "".join(lines)


def _layer_section(report: Report, charts: Sequence[Chart]) -> str:
    runs = report.data["runs"]
    drawn = "".join(_figure(chart) for chart in charts if chart.scope != "all")
    layers = "".join(
        f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(report.data["layers_named"])
    )
    choose = (
        f'<div class="controls no-print">{_run_select(runs)}'
        f'<label>Layer <select data-select="layer">{layers}</select></label></div>'
        '<p>Shown: <strong data-chosen aria-live="polite"></strong></p>'
    )
    batches = {f"{run['images_from']}, the first {run['batch']} test images" for run in runs if run["batch"]}
    source = f'<p class="soft">Inputs measured on {escape("; ".join(sorted(batches)))}.</p>' if batches else ""
    drawn_notes = {chart.note for chart in charts if chart.scope == "one"}  # said there, for the network chosen
    said = "".join(_said(runs, key) for key in ("inputs", "spectrum") if key not in drawn_notes)
    tables = []
    for run in runs:
        rows = report.rows("layers", run=run["id"])
        columns = [c for c in _LAYER_COLUMNS if c[0] in _TEXT or any(row.get(c[0]) is not None for row in rows)]
        head = "".join(_sortable(text, text=name in _TEXT) for name, text in columns)
        lines = "".join(f"<tr>{''.join(_cell(row, name) for name, _ in columns)}</tr>" for row in rows)
        caption = f"Layers of {escape(run['label'])}. Heads sort."
        tables.append(_scroll(f"Layers of {run['label']}", _table(caption, head, lines), run["id"]))
    return f'{choose}{source}<div class="figures">{drawn}</div>{said}{"".join(tables)}'


def _cost_section(report: Report) -> str:
    runs = report.data["runs"]
    tables = []
    for run in runs:
        *rows, total = report.rows("costs", run=run["id"])
        head = "".join(_sortable(text, text=name in _TEXT) for name, text in _COST_COLUMNS)
        lines = "".join(f"<tr>{''.join(_cell(row, name) for name, _ in _COST_COLUMNS)}</tr>" for row in rows)
        foot = f"<tr>{''.join(_cell(total, name) for name, _ in _COST_COLUMNS)}</tr>"
        shape = " × ".join(map(str, run["input_shape"]))
        caption = f"Costs of {escape(run['label'])} for one image of {shape}. Heads sort."
        tables.append(_scroll(f"Costs of {run['label']}", _table(caption, head, lines, foot), run["id"]))
    choose = f'<div class="controls no-print">{_run_select(runs)}</div>' if len(runs) > 1 else ""
    return f"{choose}{''.join(tables)}"


def _run_select(runs: Sequence[dict[str, Any]]) -> str:
    options = "".join(f'<option value="{run["id"]}">{escape(run["label"])}</option>' for run in runs)
    return f'<label>Network <select data-select="run">{options}</select></label>'


def _recipes(report: Report) -> str:
    runs = report.data["runs"]
    recipes = {run["label"]: run["recipe"] for run in runs if run["recipe"]}
    environments = {run["label"]: run["environment"] for run in runs if run["environment"]}
    environments["this report"] = report.data["environment"]
    parts = [_said(runs, "recipe"), _said(runs, "environment")]
    parts += [_columns("Recipe", "Settings of the runs (config.toml).", recipes)] if recipes else []
    parts.append(_columns("Environment", "What runs and this report were computed with.", environments))
    return "".join(parts)


def _columns(label: str, caption: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    head = "".join(f'<th scope="col" class="text">{escape(title)}</th>' for title in ("setting", *columns))
    lines = []
    for name in names:
        values = [_plain(column.get(name)) for column in columns.values()]
        cells = "".join(f'<td class="text wrap">{escape(value)}</td>' for value in values)
        lines.append(f'<tr><th scope="row" class="text">{escape(name)}</th>{cells}</tr>')
    return _scroll(label, _table(escape(caption), head, "".join(lines)))


def _table(caption: str, head: str, body: str, foot: str = "") -> str:
    end = f"<tfoot>{foot}</tfoot>" if foot else ""
    head = f"<caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead>"
    return f"<table>{head}<tbody>{body}</tbody>{end}</table>"


def _scroll(label: str, table: str, run: int | None = None) -> str:
    of_run = "" if run is None else f' data-of-run="{run}"{"" if run == 0 else " hidden"}'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"{of_run}>{table}</div>'


def _sortable(title: str, *, text: bool) -> str:
    kind = ' class="text"' if text else ""
    return f'<th scope="col"{kind}><button type="button">{escape(title)}</button></th>'


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    kind = ' class="text"' if name in _TEXT else ""
    return f'<td{kind} data-value="{"" if value is None else escape(str(value))}">{escape(_shown(name, value))}</td>'


def _shown(name: str, value: Any) -> str:
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
