from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from apot_fat.checkpoint import write_checkpoint
from apot_fat.export import WRITERS, Export, export_onnx
from apot_fat.export.graph import GraphBuilder, Projection, emit_projection, emit_table
from apot_fat.export.int8 import best_range, linear_grid
from apot_fat.integer.reference import IntegerLayer
from apot_fat.models import create_model
from apot_fat.quant import EIGHT_BIT, QuantConv2d, QuantLinear, level_set, preset, quantize_activation, threshold_layers
from apot_fat.quant.fast.byte_product import largest_product
from apot_fat.quant.integers import integer_weight
from apot_fat.quant.quantizer import SignedQuantizer, UnsignedQuantizer
from apot_fat.quant.spec import InputClip
from apot_fat.reporting import cost_report

if TYPE_CHECKING:
    from tests.export.conftest import Released

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run_file(path: Path | bytes, x: Tensor, threads: int = 1, *, as_written: bool = False) -> Tensor:
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    content = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def one_input_graph(kind: int) -> Any:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([], "g", [info("x", kind, ["n"])], [info("y", kind, ["n"])])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


class Small(nn.Module):
    """Grouped and strided convolutions, a sum, ReLU6, pooling, and linear layers on (N, C) and (N, T, C)."""

    def __init__(self, name: str, bits: int) -> None:
        super().__init__()
        spec = preset(name, bits=bits, act_alpha=2.0)
        self.stem = nn.Sequential(QuantConv2d(3, 8, 3, padding=1, spec=EIGHT_BIT), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = QuantConv2d(8, 8, 3, padding=1, groups=4, spec=spec)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = QuantConv2d(8, 8, 3, padding=1, spec=spec, relu=True)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = QuantConv2d(8, 12, 1, stride=2, spec=spec, bias=True)
        self.bn3 = nn.BatchNorm2d(12)
        self.conv4 = QuantConv2d(12, 12, 3, padding=1, spec=spec)
        self.tokens = QuantLinear(12, 16, spec=spec)
        self.last = QuantLinear(16, 5, spec=EIGHT_BIT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)
        x = nn.functional.max_pool2d(nn.functional.relu6(self.bn3(self.conv3(x))), 2)
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.conv4(x)), 2)
        return self.last(self.tokens(x.flatten(2).transpose(1, 2)).mean(1))


def small(name: str, bits: int) -> nn.Module:
    model = Small(name, bits)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0, 1)  # negative factors too
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean = torch.randn(module.num_features) / 4
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


@pytest.mark.parametrize("clip", ["above", "both", "relu"])
@pytest.mark.parametrize(
    ("family", "bits"),
    [(family, bits) for family in ("uniform", "apot", "pot") for bits in (2, 3, 4, 5, 8)],
)
def test_quantizer_makes_the_published_decisions(family: str, bits: int, clip: InputClip) -> None:
    levels = level_set(family, bits)
    alpha = torch.tensor(1.0)
    thresholds = torch.tensor(levels.thresholds)
    x = torch.cat([thresholds, torch.nextafter(thresholds, torch.tensor(0.0)), torch.linspace(-1.5, 1.5, 999)])
    builder = GraphBuilder(one_input_graph(1))
    emit_projection(builder, "x", Projection(UnsignedQuantizer(levels, -3, clip, "full"), 1.0), "y")
    found = run_file(builder.finish().SerializeToString(), x)
    assert torch.equal(found, quantize_activation(x, alpha, levels, clip=clip).abs() * found.sign())


def test_signed_quantizer_mirrors_the_levels() -> None:
    levels, alpha = level_set("apot", 3), 0.7
    x = torch.linspace(-1, 1, 501)
    builder = GraphBuilder(one_input_graph(1))
    emit_projection(builder, "x", Projection(SignedQuantizer(levels, -3, True), alpha), "y")
    expected = x.sign() * quantize_activation(x.abs(), torch.tensor(alpha), levels)
    assert torch.equal(run_file(builder.finish().SerializeToString(), x), expected)


@pytest.mark.parametrize("threaded", [False, True])
def test_table_as_arithmetic_of_bytes(threaded: bool) -> None:
    rng = np.random.default_rng(0)
    random = np.sort(rng.integers(0, 256, 256))
    tables = [random, np.arange(256), np.minimum(np.arange(256), 15), np.repeat([7, 255], 128), np.full(256, 9)]
    tables += [np.repeat([0, 3, 255], [1, 254, 1]), np.repeat([0, 1], [255, 1]), np.repeat([5, 6], [1, 255])]
    for bits in (2, 3, 4):
        for last in (20, 100, 254, 700):  # bytes up to the threshold, or some of them
            projection = Projection(UnsignedQuantizer(level_set("apot", bits), -3, "relu", "full"), float(last))
            tables += [projection.project(np.arange(256) + offset) for offset in (0.0, 0.5)]
    x = torch.arange(256).to(torch.uint8)
    for table in tables:
        builder = GraphBuilder(one_input_graph(2))
        builder.add("Identity", emit_table(builder, "x", table, threaded=threaded), output="y")
        for as_written in (False, True):  # onnxruntime makes one operator of three
            found = run_file(builder.finish().SerializeToString(), x, as_written=as_written)
            assert found.tolist() == table.tolist()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("apot-cifar", 3), ("fat-cifar", 4), ("apot-imagenet-pot", 5), ("uniform-mobilenet", 8), ("apot-cifar", 32)],
)
def test_float_file_equals_the_network_on_any_batch(name: str, bits: int, tmp_path: Path) -> None:
    model = small(name, bits).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = export_onnx(model, tmp_path / "net.onnx", (3, 16, 16))
    assert report.error <= 1e-5
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval()(x)
    found = torch.cat([run_file(tmp_path / "net.onnx", part) for part in x.split([1, 5])])
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert (errors <= 1e-4).sum() >= 5  # a last bit may turn a decision
    file = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert {node.domain for node in file.graph.node} == {""}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("name", "bits"), [("apot-cifar", 4), ("fat-cifar", 3), ("apot-imagenet-pot", 3)])
def test_float_file_rounds_once_behind_exact_sums(name: str, bits: int, per_channel: bool, tmp_path: Path) -> None:
    spec = preset(name, bits=bits, act_alpha=2.0, weight_per_channel=per_channel)
    layer, x = QuantConv2d(64, 8, 3, padding=1, bias=True, spec=spec), torch.rand(4, 64, 9, 9) * 3
    if per_channel:
        layer.weight_alpha.data.mul_(torch.rand(8) + 0.5)  # type: ignore[union-attr]
    weight = integer_weight(layer)
    assert weight is not None
    unit = 2.0 / layer.spec.act_set.denominator * weight.scale.double().reshape(-1, 1, 1) / weight.denominator
    exact = IntegerLayer(layer).accumulate(x).double() * unit + layer.bias.detach().double()[:, None, None]  # type: ignore[union-attr]
    assert_rounded_once(layer, x, exact, tmp_path)


def test_float_file_rounds_once_behind_a_float_input(tmp_path: Path) -> None:
    layer, x = QuantConv2d(3, 8, 5, padding=2, spec=EIGHT_BIT), 2 * torch.randn(4, 3, 12, 12)
    weight = integer_weight(layer)
    assert weight is not None
    exact = nn.functional.conv2d(x.double(), weight.numerators * weight.unit(4), padding=2)
    assert_rounded_once(layer, x, exact, tmp_path)


def assert_rounded_once(layer: nn.Module, x: Tensor, exact: Tensor, folder: Path) -> None:
    """The layer and a batch norm behind it, as a file: float32 numbers next to the exact ones, or almost."""
    norm = nn.BatchNorm2d(8)
    for parameter in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(parameter)  # type: ignore[arg-type]
    norm.running_var = torch.rand(8) + 0.5
    network = nn.Sequential(layer, norm).eval()
    with torch.no_grad():
        expected = norm.double()(exact)
        norm.float()
        # not where batch norm takes almost all of a value away
        large = expected.abs() > (norm.weight / norm.running_var.sqrt()).abs()[:, None, None] * exact.abs().amax() / 16
    export_onnx(network, folder / "layer.onnx", tuple(x.shape[1:]), verify_with=x)
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(folder / "layer.onnx").graph.node]
    found = run_file(folder / "layer.onnx", x, threads=2)
    assert torch.equal(found, run_file(folder / "layer.onnx", x, threads=1))
    last_bits = (found - expected)[large] / torch.tensor(np.spacing(expected.float().abs().numpy()))[large]
    assert last_bits.square().mean().sqrt() < 0.35  # numbers rounded once: sqrt(1/12) = 0.29
    assert last_bits.abs().max() < 1


@pytest.mark.parametrize(
    ("name", "bits", "convs"),
    [("apot-cifar", 3, 4), ("fat-cifar", 4, 4), ("apot-imagenet", 4, 4), ("apot-imagenet-uniform", 8, 0)],
)
def test_int8_file_is_close_and_has_integer_convolutions(name: str, bits: int, convs: int, tmp_path: Path) -> None:
    model = small(name, bits)
    x = torch.randn(32, 3, 16, 16)
    report = export_onnx(
        model, tmp_path / "net.onnx", (3, 16, 16), "int8", verify_with=x, max_error=0.1, min_agreement=0.8
    )
    file = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert {opset.domain for opset in file.opset_import} == {""}  # standard operators alone
    kinds = [node.op_type for node in file.graph.node]
    assert report.integer_convs == kinds.count("QLinearConv") == convs
    assert kinds.count("Conv") == 5 - convs
    with torch.no_grad():
        y = model(x)
    for as_written in (False, True):  # of other runtimes' ways one: every operator by itself
        found = run_file(tmp_path / "net.onnx", x, as_written=as_written)
        assert ((found - y).norm() / y.norm()) < 0.1


def test_cells_of_the_next_quantizer_keep_its_decisions(tmp_path: Path) -> None:
    # without sums every decision is taken on integers: hardly a value may differ
    spec = preset("apot-cifar", bits=4, act_alpha=2.0)
    body = [
        QuantConv2d(4, 16, 3, padding=1, spec=spec, relu=True),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        QuantConv2d(16, 4, 3, padding=1, spec=spec),
    ]
    model = nn.Sequential(*body).eval()
    x = 2 * torch.randn(4, 4, 12, 12)
    report = export_onnx(model, tmp_path / "net.onnx", (4, 12, 12), "int8", verify_with=x, min_agreement=0)
    assert report.integer_convs == 2
    assert report.error < 0.02


def test_ties_that_rounding_decides_do_not_refuse_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    spec = preset("apot-cifar", bits=3, act_alpha=1.5)
    layers = [QuantConv2d(3, 8, 3, spec=spec), QuantConv2d(8, 8, 3, spec=spec, relu=True), nn.Flatten()]
    report = export_onnx(nn.Sequential(*layers), tmp_path / "net.onnx", (3, 16, 16))
    assert report.error <= report.max_error


def test_negative_levels_stay_float(tmp_path: Path) -> None:
    model = nn.Sequential(QuantConv2d(3, 4, 3, spec=preset("fat-cifar", bits=4)), nn.Flatten()).eval()
    report = export_onnx(model, tmp_path / "net.onnx", (3, 8, 8), "int8")
    assert report.integer_convs == 0
    assert report.error <= 1e-5


def test_a_file_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apot_fat.export.graph._cell_numerators", lambda levels: np.minimum(np.arange(256), 10))
    with pytest.raises(ValueError, match=r"differ from the network's by .* \(allowed: .*\)"):
        export_onnx(small("apot-cifar", 3), tmp_path / "net.onnx", (3, 16, 16))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_input_shape_with_the_batch_is_one_without(tmp_path: Path) -> None:
    model, x = small("apot-cifar", 3), torch.randn(3, 3, 16, 16)
    for i, shape in enumerate([(3, 16, 16), (5, 3, 16, 16), [1, 3, 16, 16]]):
        export_onnx(model, tmp_path / f"{i}.onnx", shape, verify_with=x)
        WRITERS["onnx"].write(Export(model, tmp_path / f"writer{i}.onnx", tuple(shape), x, (), ()))
    written = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == 1
    assert cost_report(model, (3, 16, 16)) == cost_report(model, [1, 3, 16, 16])


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (2, 2, 3, 16, 16), (), (3, 16.0, 16), (2, 16, 16), (1, 4, 16, 16)])
def test_a_bad_input_shape_is_said_in_the_same_words_by_all(shape: tuple[int, ...], tmp_path: Path) -> None:
    said = set()
    calls: list[Callable[[nn.Module], object]] = [
        lambda model: export_onnx(model, tmp_path / "net.onnx", shape),
        lambda model: WRITERS["onnx"].write(Export(model, tmp_path / "net.onnx", shape, None, (), ())),
        lambda model: cost_report(model, shape),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^input_shape \(") as caught:
            call(small("apot-cifar", 3))
        said.add(str(caught.value))
    assert len(said) == 1
    assert not list(tmp_path.iterdir())


class Branches(nn.Linear):
    """A layer that runs and cannot be traced."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if input.sum() > 0 else -input)


def test_mistakes_are_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="choose one of float, int8"):
        export_onnx(model, path, (4,), "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
        export_onnx(model, path, (4,), verify_with=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="PyTorch cannot export it"):
        export_onnx(Branches(4, 2), path, (4,))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs onnxscript: pip install 'apot-fat\[export\]'"):
        export_onnx(model, path, (4,))


def test_importing_the_room_needs_no_onnx() -> None:
    code = "import sys; sys.modules['onnx'] = sys.modules['onnxruntime'] = None; import apot_fat.export"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_grids_hold_zero_and_the_best_range_leaves_outliers_out() -> None:
    assert linear_grid(0.0, 255.0) == (1.0, 0)
    assert linear_grid(0.0, 0.0) == (1.0, 0)
    scale, zero = linear_grid(-1.0, 3.0)
    assert 0 < zero < 255
    assert (0 - zero) * scale == pytest.approx(-1, abs=scale)
    values = np.append(np.linspace(0, 1, 100_000), 4.0)
    assert best_range(values)[1] < 4
    assert best_range(values[:-1]) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_released_networks_classify_the_same(bits: int, released: Released, tmp_path: Path) -> None:
    model, images, labels = released(bits)
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(TensorDataset(images, labels), 128))
        in_double = copy.deepcopy(model).double()
        exact = torch.cat([in_double(x.double()).argmax(1) for x in images.split(128)])
    report = export_onnx(model, tmp_path / "float.onnx", (3, 32, 32), verify_with=images[:100])
    assert report.error <= 1e-5
    assert report.agreement >= 0.98
    found = run_file(tmp_path / "float.onnx", images, threads=2).argmax(1)
    assert torch.equal(found, exact)
    # PyTorch in float32 takes another class for an image on a threshold: at 4 bits, and at 3 where it adds floats
    assert abs(int((found == labels).sum()) - right) <= (bits == 4 or not largest_product())
    report = export_onnx(model, tmp_path / "int8.onnx", (3, 32, 32), "int8", verify_with=images[:100])
    assert report.integer_convs == report.quantized_layers == 20
    assert report.agreement >= 0.94
    if bits == 3:
        found = run_file(tmp_path / "int8.onnx", images, threads=2).argmax(1)
        assert abs(int((found == labels).sum()) - int((exact == labels).sum())) <= 3


def test_script_writes_a_file_and_says_mistakes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "export.py"))["main"]
    caplog.set_level("INFO", "apot_fat")
    path = tmp_path / "net.pth.tar"
    write_checkpoint({"state_dict": create_model("resnet20", "fat-cifar", 4).state_dict()}, path)
    line = [str(path), "--to", "onnx", "--output", str(tmp_path / "net.onnx")]
    main([*line, "--arch", "resnet_20", "--bit", "4"])
    assert "compared with PyTorch on noise" in caplog.text
    assert run_file(tmp_path / "net.onnx", torch.randn(3, 3, 32, 32)).shape == (3, 10)
    with pytest.raises(ValueError, match=r"records no network .*; give --arch and --bit"):
        main(line)


@pytest.mark.parametrize("name", ["apot-cifar", "lsq", "pact"])
@pytest.mark.parametrize("mode", ["float", "int8"])
def test_one_weight_threshold_a_channel(name: str, mode: Any, tmp_path: Path) -> None:
    model = small(name, 4)
    for _, layer in threshold_layers(model):
        layer.spec = replace(layer.spec, weight_per_channel=True)
        assert layer.weight_alpha is not None
        if name != "pact":
            layer.weight_alpha.data.mul_(torch.rand_like(layer.weight_alpha) + 0.5)
    report = export_onnx(model, tmp_path / "a.onnx", (3, 16, 16), mode, verify_with=torch.randn(8, 3, 16, 16))
    assert report.integer_convs == (4 if mode == "int8" else 0)
    assert report.error < (0.25 if mode == "int8" else 1e-4)
