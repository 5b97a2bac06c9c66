from __future__ import annotations

import copy
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tqdm import TMonitor

from apot_fat import QuantConv2d, preset
from apot_fat.checkpoint import read_checkpoint, write_checkpoint
from apot_fat.models import create_model
from apot_fat.quant import seam
from apot_fat.quant.fast.kernels import inductor_options
from apot_fat.training import TrainConfig, train
from apot_fat.training import compile as training_compile
from apot_fat.training.compile import compile_network
from apot_fat.training.folder import LAST

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OURS = "apot_fat", "WARNING"


def network(bits: int = 3) -> nn.Module:
    conv = QuantConv2d(3, 4, 3, spec=preset("apot-cifar", bits=bits))
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The keywords of ``torch.compile`` and then the first input's shape of each graph, none of which is compiled."""
    seen: list[Any] = []
    compile_ = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append([tuple(i.shape) for i in inputs if isinstance(i, Tensor) and i.dim() == 4 and i.shape[1] == 3])
        return graph.forward

    def compile_as(model: nn.Module, *, options: dict[str, Any], **keywords: Any) -> Any:
        seen.append(options)
        return compile_(model, backend=backend, **keywords)

    monkeypatch.setattr(torch, "compile", compile_as)
    monkeypatch.setattr(seam.speed, "compiler_works", lambda device_type: True)
    monkeypatch.setattr(training_compile, "_announced", {})
    monkeypatch.setattr(training_compile, "choose_kernels", lambda mode: None)
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield seen


def test_each_size_of_batch_has_a_graph_of_its_own_which_is_announced(
    compilations: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = compile_network(network(), "model", CPU)
    with caplog.at_level("INFO", logger="apot_fat"):
        for size in (8, 3, 8, 8, 3):
            model(torch.randn(size, 3, 4, 4)).sum().backward()
        model.eval()(torch.randn(3, 3, 4, 4))
    said = [message for message in caplog.messages if message.startswith("compiling the network for ")]
    assert [message.split(":")[0].removeprefix("compiling the network for ") for message in said] == [
        "training on 8 × 3 × 4 × 4", "training on 3 × 3 × 4 × 4", "evaluation on 3 × 3 × 4 × 4"
    ]  # fmt: skip
    sizes = [shape[0] for shapes in compilations[1:] for shape in shapes if shape[1:] == (3, 4, 4)]
    assert sizes == [8, 3, 3]
    assert all(type(size) is int for size in sizes)


@pytest.mark.usefixtures("compilations")
def test_stages_of_chains_do_not_use_up_the_compilers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_compile, "_GRAPHS", 4)  # those of a stage
    monkeypatch.setattr(training_compile, "_NETWORKS", 1)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1
    for bits in (4, 3):
        model = compile_network(network(bits), "model", CPU)
        for size in (8, 3):
            for training in (True, False):
                model.train(training)
                model(torch.randn(size, 3, 4, 4))


def test_networks_of_the_same_layers_share_their_graphs(
    compilations: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(8, 3, 4, 4)
    grown = []
    with caplog.at_level("INFO", logger="apot_fat"):
        for seed, bits in enumerate((3, 4, 3, 4, 3)):  # seeds of a chain
            torch.manual_seed(seed)
            plain = network(bits)
            model = compile_network(copy.deepcopy(plain), "model", CPU)
            for _ in range(2):
                for net in (model, plain):
                    net.train()
                    net(x).square().sum().backward()
                    net.eval()
                with torch.no_grad():
                    torch.testing.assert_close(model(x), plain(x))
            for compiled, eager in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(compiled.grad, eager.grad)
            grown.append(len([shapes for shapes in compilations if (8, 3, 4, 4) in shapes]))
    assert grown == [2, 4, 4, 4, 4]
    assert len([message for message in caplog.messages if message.startswith("compiling")]) == 4


def test_few_batches_of_a_kind_have_no_graph(compilations: list[Any]) -> None:
    x = torch.randn(8, 3, 4, 4)
    enough = training_compile.AUTO_BATCHES
    for tests, mode in ((enough - 1, "model"), (enough, "model"), (enough - 1, "auto"), (None, "model")):
        torch.compiler.reset()
        compilations.clear()
        batches = None if tests is None else {(True, 8): enough, (True, 3): 300, (False, 8): tests}
        model = compile_network(network(), mode, CPU, batches=batches)
        for part in (x, x[:3]):
            model(part).sum().backward()
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
        sizes = [shape[0] for shapes in compilations[1:] for shape in shapes if shape[1:] == (3, 4, 4)]
        assert sizes == {enough - 1: [8], enough: [8, 8], None: [8, 3, 8]}[tests]


def test_a_teacher_that_sees_many_batches_is_compiled_too(
    compilations: list[Any], tiny_npz: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_compile, "AUTO_BATCHES", 6)
    write_checkpoint({"state_dict": create_model("vgg_tiny", bits=32, num_classes=3).state_dict()}, tmp_path / "t.pth")
    options: dict[str, Any] = {"data": str(tiny_npz[0]), "test_data": str(tiny_npz[1]), "batch_size": 16, "lr": 0.001}
    options |= {
        "arch": "vgg_tiny",
        "teacher": str(tmp_path / "t.pth"),
        "distill_weight": 1.0,
        "epochs": 2,
        "histogram_every": 0,
    }
    losses = []
    for mode in ("off", "auto"):
        summary = train(TrainConfig(**options, compile=mode, output=str(tmp_path / mode)))
        losses.append(read_checkpoint(summary.folder / LAST)["history"][1]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    graphs = [shapes for shapes in compilations if isinstance(shapes, list) and (16, 3, 8, 8) in shapes]
    assert len(graphs) == 2  # the network's, of training, and the teacher's


def test_auto_is_the_whole_network_on_cuda_replayed_where_gradients_are_not_added_up(compilations: list[Any]) -> None:
    assert isinstance(compile_network(network(), "auto", CPU), nn.Sequential)
    for cuda_graphs in (True, False):
        compiled = compile_network(network(), "auto", GPU, cuda_graphs=cuda_graphs)
        assert type(compiled).__name__ == "_CompiledNetwork"
        expected = inductor_options("cuda") | ({"triton.cudagraphs": True} if cuda_graphs else {})
        assert compilations.pop() == expected
    enough = training_compile.AUTO_BATCHES
    for device in (CPU, GPU):
        for few in ({}, {(True, 8): enough - 1, (True, 3): enough - 1, (False, 8): enough}):
            assert isinstance(compile_network(network(), "auto", device, batches=few), nn.Sequential)
        assert not isinstance(compile_network(network(), "auto", device, batches={(True, 8): enough}), nn.Sequential)
    assert not isinstance(compile_network(network(), "model", GPU, batches={(True, 8): 1}), nn.Sequential)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seam.speed, "compiler_works", lambda device_type: False)
        assert isinstance(compile_network(network(), "auto", GPU), nn.Sequential)
        with pytest.raises(ValueError, match="compile 'model': no working compiler for cuda"):
            compile_network(network(), "model", GPU)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_shown_the_seconds_that_compiling_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        before = set(threading.enumerate())
        with training_compile._clock("compiling for training", every=0.01):
            time.sleep(1.1)
        assert all(isinstance(thread, TMonitor) for thread in set(threading.enumerate()) - before)  # tqdm's own
        assert ("compiling for training: 00:01" in stream.getvalue()) is shown


class Prints(nn.Module):
    """What no graph holds."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


@pytest.mark.usefixtures("compilations")
def test_auto_falls_back_and_model_does_not(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, 4, 4)
    odd = nn.Sequential(network(), Prints()).eval()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_network(odd, "model", GPU, cuda_graphs=False)(x)
    network_ = compile_network(odd, "auto", GPU, cuda_graphs=False)
    for _ in range(2):
        torch.testing.assert_close(network_(x), odd(x))
    said = [record.getMessage() for record in caplog.records if (record.name, record.levelname) == OURS]
    assert [line[:62] for line in said] == ["the network is not compiled, its quantizers alone are (Call to"]


def test_what_evaluation_keeps_stays_where_a_graph_found_it(
    compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apot_fat.quant.fast.kept.multiplies_bytes", lambda *_: False)  # with them it keeps bytes
    model = network()
    compiled = compile_network(model, "model", CPU)
    layer: Any = model[0]  # type: ignore[index]
    places = set()
    for epoch in range(3):
        layer.weight.data += 0.1 * epoch
        compiled.eval()
        x = torch.randn(2, 3, 4, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        places.add(layer._kept.for_graphs.data_ptr())
        torch.testing.assert_close(layer._kept.for_graphs, layer.quantized_weight().detach(), atol=0, rtol=0)
        compiled.train()
    assert len(places) == 1
    assert len([shapes for shapes in compilations if (2, 3, 4, 4) in shapes]) == 1  # one graph
