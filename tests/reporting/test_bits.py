"""Networks whose layers differ in their bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
from torch import nn

from apot_fat import quantize
from apot_fat.checkpoint import save_packed
from apot_fat.models import create_model
from apot_fat.reporting.bits import network_bits, network_method
from apot_fat.reporting.charts import figures, make_charts, rows_of, write_figures
from apot_fat.reporting.charts.parts import Chart
from apot_fat.reporting.contents import Report, build_report
from apot_fat.reporting.page import page
from apot_fat.reporting.subject import load_subjects
from apot_fat.training import TrainConfig

OVERRIDES = {"layer1.*": {"bits": 5}, "layer3.*": {"bits": 2}, "layer3.0.conv1": {"weight_bits": 4, "act_bits": 6}}
DOWNSAMPLE = ("layer2.0.downsample.0", "layer3.0.downsample.0")
MIXED, MIXED_INPUTS, UNIFORM, INPUTS = range(4)


@dataclass(frozen=True)
class Converted:
    """Packed files of converted networks: weights of 2, 3 and 5 bits with a float shortcut, the same with inputs that
    differ, 3 bits throughout, and 4 bits with inputs of 8; and a report of all."""

    paths: tuple[Path, ...]
    report: Report

    def alone(self, run: int) -> Report:
        """A report of one of them."""
        return build_report(self.report.subjects[run : run + 1])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    own = {name: bits for name, bits in OVERRIDES.items() if "bits" in bits}
    ways = (
        {"bits": 3, "overrides": own, "exclude": DOWNSAMPLE[:1]},
        {"bits": 3, "overrides": OVERRIDES},
        {"bits": 3, "method": "uniform"},
        {"bits": 4, "act_bits": 8},
    )
    folder = tmp_path_factory.mktemp("converted")
    paths = tuple(folder / f"{i}.safetensors" for i in range(len(ways)))
    for path, way in zip(paths, ways, strict=True):
        model = create_model("resnet20", bits=32)
        quantize(model, **way)  # type: ignore[arg-type]
        save_packed(model.eval(), path)
    return Converted(paths, build_report([load_subjects(path)[0] for path in paths]))


def bits_charts(report: Report) -> list[Chart]:
    return [chart for chart in make_charts(report) if chart.name.startswith("bits-layers")]


def drawn(svg: str, mark: str) -> list[dict[str, str]]:
    """What the marks of a kind say of themselves in a drawn figure, in its order."""
    found = re.findall(r'aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="([^"]*)"', svg)
    texts = [unescape(text) for text, kind in found if kind == mark]
    return [dict(part.split(": ", 1) for part in text.split("; ")) for text in texts]


def own_bits(name: str) -> int:
    return {"layer1": 5, "layer2": 3, "layer3": 2}[name.split(".")[0]]


def test_drawn_bits_are_those_of_the_network(converted: Converted, tmp_path: Path) -> None:
    ((name, spec),) = [(name, spec) for name, spec in figures(converted.alone(MIXED)) if name.startswith("bits")]
    assert (name, spec["title"]) == ("bits-layers", "Bits of each layer")
    svg = write_figures([(name, spec)], tmp_path)[0].read_text()
    bars = drawn(svg, "bar")
    model = converted.report.subjects[MIXED].model
    assert [bar["layer"] for bar in bars] == [
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    for bar in bars:
        if bar["layer"] in ("conv1", "fc"):
            assert (bar["bits of the weight"], bar["its bits"]) == ("8", "not counted")
        elif bar["layer"] == DOWNSAMPLE[0]:
            assert (bar["weight, bits"], bar["its bits"]) == ("float", "not counted")
            assert bar["bits of the weight"] == "9"  # cut off
        else:
            assert int(bar["bits of the weight"]) == int(bar["weight, bits"]) == own_bits(bar["layer"])
            assert bar["its bits"].startswith("in the average")
    assert len(drawn(svg, "point")) == len(bars)
    assert not drawn(svg, "tick")
    assert svg.count(">float<") == 1


def test_the_average_by_hand(converted: Converted) -> None:
    first, second, third = 6 * 9 * 16**2, 9 * (16 * 32 + 5 * 32**2), 9 * (32 * 64 + 5 * 64**2)
    shortcuts = 16 * 32, 32 * 64  # the first is float here
    bits = 5 * first + 3 * second + 2 * (third + shortcuts[1])
    mean = bits / (first + second + third + shortcuts[1])
    assert converted.report.data["runs"][MIXED]["mean_bits"] == pytest.approx(mean, rel=1e-5)
    chart = bits_charts(converted.report)[0]
    assert f"{mean:.2f} bits a weight on average over the quantized layers" in chart.alt
    assert "pale and not counted in it: 8-bit ends and float layers" in chart.alt
    assert "input" not in chart.alt
    assert f"<figcaption>{chart.alt}" in page(converted.report)
    bits += 3 * shortcuts[0] + 2 * 9 * 32 * 64
    second_mean = bits / (first + second + third + sum(shortcuts))
    assert f"{second_mean:.2f} bits a weight" in bits_charts(converted.report)[1].alt


def test_bytes_are_those_of_the_costs(converted: Converted, tmp_path: Path) -> None:
    report = converted.alone(MIXED)
    (chart,) = bits_charts(report)
    *costs, _, total = report.rows("costs")
    assert [row["packed_bytes"] for row in rows_of(report, chart)] == [cost["packed_bytes"] for cost in costs]
    svg = write_figures([f for f in figures(report) if f[0] == "bits-layers"], tmp_path)[0].read_text()
    for point, cost in zip(drawn(svg, "point"), costs, strict=True):
        assert point["layer"] == cost["name"]
        assert point["packed, bytes"] == f"{cost['packed_bytes']:,}"
        assert point["packed, share"] == f"{cost['packed_bytes'] / total['packed_bytes']:.2%}"


def test_inputs_are_drawn_where_they_differ(converted: Converted, tmp_path: Path) -> None:
    report = converted.alone(MIXED_INPUTS)
    (chart,) = bits_charts(report)
    assert "lines: bits of the input, none where it is float" in chart.alt
    svg = write_figures([f for f in figures(report) if f[0] == "bits-layers"], tmp_path)[0].read_text()
    ticks = {tick["layer"]: int(tick["bits (weight bar, input line)"]) for tick in drawn(svg, "tick")}
    assert ticks.pop("layer3.0.conv1") == 6
    assert len(ticks) == 19
    assert all(bits == own_bits(name) for name, bits in ticks.items())
    (bar,) = [bar for bar in drawn(svg, "bar") if bar["layer"] == "layer3.0.conv1"]
    assert (bar["weight, bits"], bar["input, bits"]) == ("4", "6")


def test_the_same_bits_everywhere_need_no_figure(converted: Converted) -> None:
    for run in (UNIFORM, INPUTS):
        report = converted.alone(run)
        assert not bits_charts(report)
        assert "Bits of each layer" not in page(report)
        assert not [name for name, _ in figures(report) if name.startswith("bits")]
    assert [chart.name for chart in bits_charts(converted.report)] == ["bits-layers-1", "bits-layers-2"]
    for chart, run in zip(bits_charts(converted.report), (MIXED, MIXED_INPUTS), strict=True):
        assert {row["run"] for row in rows_of(converted.report, chart)} == {run}
        assert chart.title == f"Bits of each layer of {converted.report.data['runs'][run]['label']}"
    assert page(converted.report).count("<h3>Bits of each layer of ") == 2


def test_what_a_converted_network_is_called(converted: Converted) -> None:
    runs = converted.report.data["runs"]
    assert [(run["label"], run["method"]) for run in runs] == [
        ("APoT 2 to 5 bits", "apot"),
        ("APoT 2 to 5 bits, inputs 2 to 6", "apot"),
        ("uniform 3 bits", "uniform"),
        ("APoT 4 bits, inputs 8", "apot"),
    ]
    assert [run["hue"] for run in runs] == ["apot", "apot", "uniform", "apot"]
    html = page(converted.report)
    assert f"<dt>bits</dt><dd>2 to 5, {runs[MIXED]['mean_bits']:.2f} on average</dd>" in html
    assert "<dt>bits</dt><dd>3</dd>" in html
    assert "<dt>bits of weights</dt><dd>4</dd><dt>bits of inputs</dt><dd>8</dd>" in html
    assert "full precision" not in html
    assert "fp32" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)


def test_accuracy_against_bits_takes_the_mean(converted: Converted) -> None:
    subjects = [load_subjects(path)[0] for path in converted.paths]
    report = build_report(subjects[:2])
    for run in report.data["runs"]:
        run["measured"] = 50.0
    (chart,) = [chart for chart in make_charts(report) if chart.name == "accuracy-bits"]
    assert [row["bits"] for row in rows_of(report, chart)] == [
        round(network_bits(subject.model).mean, 2) for subject in subjects[:2]
    ]
    assert chart.spec["layer"][0]["encoding"]["x"]["title"] == "bits of weights, the mean where layers differ"


def test_layers_of_different_methods_and_float_networks() -> None:
    model = create_model("resnet20", bits=32)
    bits = network_bits(model)
    assert (bits.specs, bits.differ, bits.mean, bits.weights_text, bits.inputs_text) == ({}, False, 32, "32", None)
    quantize(model, bits=3, overrides={"layer1.*": {"weight_levels": "uniform", "act_levels": "uniform"}})
    bits = network_bits(model)
    assert (len(bits.specs), bits.differ, bits.mean, bits.label) == (20, False, 3, "3 bits")
    assert network_method(TrainConfig(arch="resnet20", bit=32), bits) == "uniform and apot"
    for name in ("lsq", "pact", "fat-log"):
        model = create_model("resnet20", bits=32)
        quantize(model, bits=3, method=name)
        assert network_method(TrainConfig(arch="resnet20", bit=32), network_bits(model)) == name
