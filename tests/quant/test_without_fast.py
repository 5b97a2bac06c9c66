"""Without ``apot_fat/quant/fast`` the package is right, and slower."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apot_fat import QuantConv2d, QuantLinear, load_packed, preset, save_packed
from apot_fat.models import create_model
from apot_fat.quant import EIGHT_BIT, PRESETS, seam, set_kernels
from apot_fat.training.compile import compile_network

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ("test_fake_quant.py", "test_frequency.py", "test_layers.py", "test_levels.py", "test_lsq_pact.py")
FAST = "compiled or sgd_on_the_threshold"


def without_fast(call: str, *args: str) -> None:
    """Run Python where ``apot_fat.quant.fast`` cannot be imported."""
    code = f"import sys; sys.modules['apot_fat.quant.fast'] = None; {call}"
    path = {"PYTHONPATH": str(ROOT), "APOT_FAT_KERNELS": "auto"}
    ran = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, env=os.environ | path, capture_output=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr).decode()[-3000:]


def layer_results() -> dict[str, Any]:
    """Of layers of every kind their outputs and gradients in training, and their outputs in evaluation."""
    found = {}
    for name in PRESETS:
        for per_channel in (False, True):
            for bits in (2, 4):
                torch.manual_seed(bits)
                spec = preset(name, bits=bits, weight_per_channel=per_channel)
                conv = QuantConv2d(4, 6, 3, padding=1, groups=2, bias=True, spec=spec, relu=per_channel)
                for layer, x in ((conv, torch.randn(2, 4, 5, 5)), (QuantLinear(4, 6, spec=spec), torch.randn(3, 2, 4))):
                    y = layer(3 * x.requires_grad_())
                    y.square().sum().backward()
                    grads = [x.grad, *(parameter.grad for parameter in layer.parameters())]
                    with torch.no_grad():
                        again = layer.eval()(x)
                    found[f"{name} {per_channel} {bits} {type(layer).__name__}"] = [y.detach(), *grads, again]
    return found


def network_results(folder: Path) -> Tensor:
    """What a network gives after a step of training, and then again from a packed file."""
    torch.manual_seed(0)
    model, x = create_model("resnet20", "fat-cifar", 3, num_classes=3), torch.randn(4, 3, 8, 8)
    network = compile_network(model, "off", torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    network(x).square().mean().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = network(x)
        save_packed(model, folder / "packed")
        torch.testing.assert_close(load_packed(folder / "packed")(x), logits, atol=0, rtol=0)
    return logits


def plain_work(path: str) -> None:
    """The results without ``quant/fast``, and what is refused then."""
    folder = Path(path)
    assert type(seam.speed) is seam.Plain
    set_kernels("eager")
    torch.save((layer_results(), network_results(folder)), folder / "plain")
    with pytest.raises(ValueError, match="kernels 'compiled': choose one of auto, eager"):
        set_kernels("compiled")
    model = nn.Sequential(QuantConv2d(4, 4, 3, spec=EIGHT_BIT), QuantConv2d(4, 6, 3, spec=preset("apot-cifar", bits=3)))
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()


def test_the_results_are_the_same(tmp_path: Path) -> None:
    work = (
        "from pathlib import Path; from tests.quant.test_without_fast import plain_work; plain_work(Path(sys.argv[1]))"
    )
    without_fast(work, str(tmp_path))
    set_kernels("eager")
    plain_layers, plain_network = torch.load(tmp_path / "plain")
    torch.testing.assert_close(plain_layers, layer_results(), atol=0, rtol=0)
    # the convolutions that skip are summed in another order
    torch.testing.assert_close(plain_network, network_results(tmp_path), atol=1e-5, rtol=1e-5)


def test_the_tests_of_the_papers_pass() -> None:
    options = ["-q", "-p", "no:cacheprovider", "-k", f"not ({FAST})"]
    tests = [f"tests/quant/{name}" for name in PAPERS]
    without_fast("import pytest; sys.exit(pytest.main(sys.argv[1:]))", *options, *tests)


def test_nothing_outside_imports_the_room() -> None:
    room, door = ROOT / "apot_fat/quant/fast", ROOT / "apot_fat/quant/__init__.py"
    for path in [*(ROOT / "apot_fat").rglob("*.py"), *(ROOT / "models").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        if not path.is_relative_to(room) and path != door:
            assert "import apot_fat.quant.fast" not in path.read_text(encoding="utf-8"), path
            assert "from apot_fat.quant.fast" not in path.read_text(encoding="utf-8"), path
