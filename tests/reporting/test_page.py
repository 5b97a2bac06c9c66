from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from apot_fat.models import create_model
from apot_fat.reporting.charts import figures, make_charts, write_figures
from apot_fat.reporting.charts.parts import DARK, LIGHT
from apot_fat.reporting.contents import Report, build_report
from apot_fat.reporting.page import page
from apot_fat.reporting.subject import Subject
from apot_fat.training import TrainConfig

if TYPE_CHECKING:
    from tests.reporting.conftest import Demo

CSS = Path(__file__).resolve().parents[2] / "apot_fat/reporting/page.css"
FETCHING = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "formaction", "background"}


class Outline(HTMLParser):
    """Tags with their attributes, and the text of scripts by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.styles: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attrs = self.tags[-1] if self.tags else ("", {})
        if not data.strip():
            return
        if tag == "script":
            self.scripts[attrs.get("id") or str(len(self.scripts))] = data
        elif tag == "style":
            self.styles.append(data)

    @property
    def numbers(self) -> str:
        return gzip.decompress(base64.b64decode(self.scripts["report-data"])).decode()


@pytest.fixture(scope="module")
def html(demo: Demo) -> str:
    return page(demo.report)


def test_the_numbers_are_embedded_once_and_are_the_reports(demo: Demo, html: str) -> None:
    outline = Outline(html)
    assert json.loads(outline.numbers) == json.loads(json.dumps(demo.report.data))
    assert outline.numbers.count('"test_top1":[') == 1
    assert '"test_top1":[' not in html
    assert page(demo.report) == html
    charts = json.loads(outline.scripts["report-charts"])
    assert [chart["name"] for chart in charts] == [chart.name for chart in make_charts(demo.report)]
    assert "values" not in charts[0]["spec"].get("data", {})


def test_nothing_is_fetched(html: str) -> None:
    outline = Outline(html)
    for tag, attrs in outline.tags:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        for name in FETCHING & attrs.keys():
            value = attrs[name] or ""
            assert value.startswith(("#", "data:")), (tag, name, value)
    styles = "".join(outline.styles) + "".join(attrs.get("style") or "" for _, attrs in outline.tags)
    assert "url(" not in styles
    assert "@import" not in styles
    for script in outline.scripts.values():
        assert not re.search(r"""\bimport\s*\(?\s*["'](https?:)?//""", script)
    own = outline.numbers + outline.scripts["report-charts"] + "".join(outline.styles)
    assert set(re.findall(r"https?://[^\s\"']+", own)) == {"https://vega.github.io/schema/vega-lite/v6.json"}  # a name
    assert len(html.encode()) < 5_000_000


def test_every_figure_has_a_text_and_every_control_a_name(demo: Demo, html: str) -> None:
    outline = Outline(html)
    images = [attrs for _, attrs in outline.tags if attrs.get("role") == "img"]
    assert len(images) == len(make_charts(demo.report)) == 15
    assert all(len(attrs["aria-label"] or "") > 40 for attrs in images)
    assert ("html", {"lang": "en"}) in outline.tags
    for _, attrs in outline.tags:
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0"
            assert attrs["aria-label"]
    for control in ("select", "input"):
        assert html.count(f"<{control} ") == len(re.findall(rf"<label>[^/]*?<{control} ", html)) > 0


def test_text_and_colours_stand_out() -> None:
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", CSS.read_text())
    )
    for theme, palettes in ((light, LIGHT), (dark, DARK)):
        for ground in ("page", "card"):
            for text in ("ink", "soft", "accent"):
                assert _contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        for shades in palettes.values():
            assert all(_contrast(shade, theme["page"]) >= 3 for shade in shades), shades


def test_each_missing_part_is_said_where_it_would_be(demo: Demo) -> None:
    packed = build_report(demo.report.subjects[-1:])
    html = page(packed)
    for sentence in packed.data["runs"][0]["notes"].values():
        assert sentence.replace("'", "&#39;") in html
    assert [chart.name for chart in make_charts(packed)] == ["thresholds-layers", "weight-histogram", "weight-levels"]


def test_differences_are_from_the_first_network(demo: Demo, html: str) -> None:
    runs = demo.report.data["runs"]
    ratio = runs[1]["packed_bytes"] / runs[0]["packed_bytes"]
    assert f"{runs[1]['packed_bytes']:,}<small>× {ratio:.3g}</small>" in html
    assert f"{runs[1]['best']:,.2f}<small>{runs[1]['best'] - runs[0]['best']:+,.2f}</small>" in html
    assert "Differences from fp32" in html


def test_names_are_text_and_no_markup(demo: Demo) -> None:
    data = json.loads(json.dumps(demo.report.data))
    name = "</script><script>alert('x')//\"&"
    data["runs"][0] |= {"label": name, "path": name}
    data["layers_named"][0] = name
    html = page(Report(data, demo.report.subjects))
    outline = Outline(html)
    assert html.count("<script") == html.count("</script>") == 4
    assert json.loads(outline.numbers)["runs"][0]["label"] == name


def test_figures_as_files(demo: Demo, tmp_path: Path) -> None:
    drawn = dict(figures(demo.report))
    names = ("error", "mask-layer1.0.conv1-FAT_4_bits_runs0_resnet_20_4bit_")
    for spec in drawn.values():
        assert spec["data"]["values"]
        assert "{" not in spec["description"]
    chosen = [(name, drawn[name]) for name in names]
    written = write_figures(chosen, tmp_path / "figures")
    assert [path.suffix for path in written] == [".svg", ".png"] * 2
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 300
                assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 5
        else:
            assert path.read_text().startswith("<svg")


@pytest.mark.slow
def test_resnet56_with_all_its_stages_stays_small() -> None:
    subjects = []
    for bits in (32, 4, 3, 2):
        model = create_model("resnet_56", "fat-cifar", bits)
        layers = {
            name: {"weight_alpha": 2.987654321, "act_alpha": 4.123456789}
            for name, module in model.named_modules()
            if getattr(module, "weight_alpha", None) is not None
        }
        scores: dict[str, Any] = dict.fromkeys(("train_loss", "test_loss", "train_top1", "test_top1"), 12.3456789)
        history = tuple({"epoch": e + 1, **scores, "layers": layers, "seconds": 1.0} for e in range(400))
        config = TrainConfig(arch="resnet_56", bit=bits)
        subjects.append(Subject(Path(config.run_name), "run", config, model.eval(), 10, history, None, True))
    assert len(page(build_report(subjects)).encode()) < 5_000_000


def _contrast(a: str, b: str) -> float:
    # WCAG 2: relative luminances of sRGB colours
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
