"""The examples, and what the calls of the Python API give and show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import apot_fat
from apot_fat import (
    Reconstruction,
    TrainConfig,
    clipping_table,
    cost_report,
    evaluate,
    list_recipes,
    quantize,
    read_recipe,
    report,
    train,
)
from apot_fat.checkpoint import write_checkpoint
from apot_fat.models import create_model
from tests.scripts.conftest import ROOT


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/examples" / name), run_name="example")


def test_an_own_network_is_quantized_and_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    defaults = Reconstruction.__init__.__defaults__
    assert defaults is not None
    monkeypatch.setattr(Reconstruction.__init__, "__defaults__", (20, 20, *defaults[2:]))  # steps
    example("own_network.py")["main"](tmp_path)
    out = capsys.readouterr().out
    before, after = (float(found) for found in re.findall(r"^(?:float|3 bits): (\d+\.\d)%", out, re.MULTILINE))
    assert before > 90
    assert after > before - 5
    assert (tmp_path / "digits.onnx").is_file()


def test_a_row_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    example("paper_row.py")["main"](epochs=1, batch_size=256)
    out = capsys.readouterr().out
    assert re.findall(r"^ ?(\d+) bits: best \d+\.\d\d%, last ", out, re.MULTILINE) == ["32", "4", "3", "2"]
    assert Path("row.html").is_file()


def test_the_commands_as_calls_are_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    run = train(TrainConfig(data="digits", arch="vgg_tiny", bit=4, epochs=1, batch_size=256))
    page = report("result", "r.html")
    result = evaluate("digits_resnet20_apot_3bit")
    mine = evaluate(run.folder / "model_best.pth.tar")
    assert capfd.readouterr() == ("", "")
    assert (run.bits, run.epochs) == (4, 1)
    assert mine.top1 == run.best
    assert mine.config.epochs == 1
    assert repr(page) == f"Report({page.data['runs'][0]['label']})"
    assert (result.correct, result.total, result.dataset) == (358, 360, "digits")
    assert "Conv2d" not in repr(result)  # a notebook shows it: no line a layer
    assert len(page.rows("layers")) == 4


def test_recipes_as_configs() -> None:
    assert "digits/resnet20_apot" in list_recipes()
    config = read_recipe("digits/resnet20_apot").config(3, {"epochs": 2})
    assert (config.arch, config.bit, config.epochs, config.data) == ("resnet20", 3, 2, "digits")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate("absent.pth"), r"^checkpoint absent\.pth: no such file"),
        (
            lambda: evaluate("digits_resnet20_apot_3bit", dataa="digits"),
            r"unknown key 'dataa' \(did you mean",
        ),
        (lambda: evaluate("digits_resnet20_apot_3bit", bit=4), "3 bits"),
        (lambda: report("absent", "r.html"), "^absent: no such file or folder"),
        (lambda: report(["net.pth"], "net.pth"), r"^net\.pth: is read here, and would be overwritten"),
    ],
)
def test_bad_arguments_are_one_line(call: Any, message: str) -> None:
    write_checkpoint({"state_dict": create_model("res20", bits=4).state_dict()}, "net.pth")
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_tables_are_shown_in_notebooks_with_text_escaped() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 1))
    net.add_module("<script>", nn.Conv2d(8, 8, 1))
    net.add_module("last", nn.Conv2d(8, 4, 1))
    conversion = quantize(net, bits=3, calibration=torch.randn(4, 3, 8, 8))
    shown: list[Any] = [conversion, clipping_table(net), cost_report(net, (3, 8, 8))]
    for table in shown:
        html = table._repr_html_()
        assert html.count("<table>") == html.count("</table>") == 1
        assert "&lt;script&gt;" in html
        assert "<script>" not in html
    assert shown[0]._repr_html_().count("<tr>") == 1 + len(conversion.rows)
    assert "the network's output: error" in shown[0]._repr_html_()
    assert shown[1]._repr_html_().count("<tr>") == 1 + len(clipping_table(net))
    assert "mask" not in shown[1]._repr_html_()


def test_every_public_name_is_there_and_listed() -> None:
    for name in apot_fat.__all__:
        assert getattr(apot_fat, name) is not None
        assert name in dir(apot_fat)
    assert apot_fat.models.create_model is create_model
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = apot_fat.quantise
