"""A network of one's own on the command lines: --model FILE.py:FUNCTION."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apot_fat import clipping_table, quantize, save_packed
from apot_fat.quant.layers import threshold_line

Run = Callable[..., tuple[int, str, str]]
NETWORK = """
from torch import nn


def own_convnet():
    convs = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
"""


def test_files_of_a_network_of_ones_own(run: Run, tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(NETWORK)
    namespace: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(NETWORK, namespace)
    model = namespace["own_convnet"]()
    torch.save(model.state_dict(), tmp_path / "float.pth")
    named = ("--model", f"{own}:own_convnet")
    data = ("--data", tiny_npz[0], "--test-data", tiny_npz[1])
    code, out, err = run(
        "quantize.py", "--init", "../float.pth", *named, *data, "--bits", 4, "--output", "q.safetensors"
    )
    assert (code, err) == (0, "")
    correct = re.findall(r"^([\d,]+) of 21 correct", out, re.MULTILINE)
    code, out, err = run("evaluate.py", "--init", "q.safetensors", *named, *data)
    assert (code, err) == (0, "")
    assert f"{correct[1]} of 21 images correct" in out
    with_others = ("--mean", "0.1,0.2,0.3", "--std", "2,2,2")
    code, out, err = run(
        "quantize.py", "--init", "../float.pth", *named, *data, *with_others, "--bits", 4, "--output", "o.safetensors"
    )
    assert (code, err) == (0, "")
    code, out, err = run("evaluate.py", "--init", "o.safetensors", *named, *data)
    assert (code, err) == (0, "")
    assert "mean 0.1,0.2,0.3, std 2.0,2.0,2.0, units of 255\n" in out
    code, out, err = run("report.py", "q.safetensors", *named, "--data", tiny_npz[1], "--output", "q.html")
    assert (code, err) == (0, "")
    assert "own_convnet" in Path("q.html").read_text()
    code, out, err = run(
        "export.py", "q.safetensors", *named, "--image-size", 8, "--to", "packed", "--output", "r.safetensors"
    )
    assert (code, err) == (0, "")
    quantize(model, bits=4)
    save_packed(model, "own.safetensors")
    code, out, err = run("show_params.py", "own.safetensors")
    assert (code, err) == (0, "")
    lines = [threshold_line(layer.weight_alpha, layer.act_alpha) for layer in clipping_table(model)]
    assert out.splitlines() == lines
    for argv, message in (
        ((), "give one to fill as model (--model)"),
        (("--model", "absent.py:own_convnet"), "'absent.py' does not run (FileNotFoundError"),
        (("--model", f"{own}:large"), "no function large in"),
        (("--model", "own"), "--model own: expected FILE.py:FUNCTION"),
    ):
        code, _, err = run("evaluate.py", "--init", "own.safetensors", *argv, *data)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


BUILDERS = """
import own_blocks


def small():
    import own_heads

    return own_heads.add(own_blocks.convs())


def needs(classes):
    return small()


def raises():
    raise RuntimeError("no\\nGPU")


def stops():
    raise SystemExit(0)


def nothing():
    pass
"""
BLOCKS = """
from torch import nn


class Convs(nn.Sequential):
    def forward(self, x):
        import own_scales

        return super().forward(x) * own_scales.ONE


def convs():
    return Convs(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
"""
HEADS = """
from torch import nn


def add(convs):
    return nn.Sequential(convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
"""


def small_net(classes: int = 3, channels: int = 3) -> nn.Sequential:
    convs = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def test_a_network_of_ones_own_may_import_the_files_beside_it(
    run: Run, tiny_npz: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("own", BUILDERS), ("own_blocks", BLOCKS), ("own_heads", HEADS), ("own_scales", "ONE = 1.0\n")):
        (tmp_path / f"{name}.py").write_text(text)
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    torch.save(small_net().state_dict(), "float.pth")
    model = ("--model", f"{tmp_path}/own.py:small")
    code, _, err = run("evaluate.py", "--init", "float.pth", *model, "--data", tiny_npz[1])
    assert (code, err) == (0, "")
    assert sys.path == [*before, str(tmp_path)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("needs", "needs() fails (TypeError: needs() missing 1 required positional argument: 'classes'); expected a "),
        ("raises", "raises() fails (RuntimeError: no GPU); expected a function without arguments that returns the "),
        ("stops", "stops() fails (SystemExit: 0)"),
        ("nothing", "nothing() returns None, not an nn.Module; expected a function without arguments"),
    ],
)
def test_what_does_not_build_a_network_is_refused(run: Run, tmp_path: Path, function: str, message: str) -> None:
    (tmp_path / "own.py").write_text(BUILDERS.replace("import own_blocks", ""))
    refused_everywhere(run, f"{tmp_path}/own.py:{function}", message)


def test_images_of_a_network_of_ones_own_are_normalised_as_said(
    run: Run, tiny_npz: tuple[Path, Path], tmp_path: Path
) -> None:
    names = ("resnet18", "own_small", "small")  # one of ours, one spelled as FAT's networks, and another
    (tmp_path / "own.py").write_text("from tests.scripts.test_own_network import small_net\n")
    with (tmp_path / "own.py").open("a") as file:
        file.writelines(f"{name} = small_net\n" for name in names)
    torch.manual_seed(0)
    torch.save(small_net().state_dict(), "float.pth")
    data = ("--data", tiny_npz[0], "--test-data", tiny_npz[1])
    usual = "images are normalised with mean 0.491,0.482,0.447, std 0.247,0.243,0.262, units of 255; if it was trained"
    given = "images are normalised with mean 0.1,0.2,0.3, std 0.5,0.6,0.7, units of 255\n"
    told = ("--mean", "0.1,0.2,0.3", "--std", "0.5,0.6,0.7")
    sources = []
    for name, argv, said in (*((name, (), usual) for name in names), ("small", told, given)):
        named = ("--model", f"{tmp_path}/own.py:{name}", *argv)
        commands = (
            ("quantize.py", "--init", "float.pth", *data, "--output", "q.safetensors"),
            ("evaluate.py", "--init", "float.pth", "--data", tiny_npz[1]),
            ("report.py", "float.pth", "--data", tiny_npz[1], "--output", "r.html"),
        )
        for command in commands:
            code, out, err = run(*command, *named)
            assert (code, err) == (0, "")
            assert said in out
        export = ("export.py", "q.safetensors", "--to", "c", "--data", tiny_npz[1], "--output", "net.c")
        code, out, err = run(*export, *named)
        assert (code, err) == (0, "")
        assert said.partition(";")[0].strip() + "\n" in out  # the file says it
        sources.append(Path("net.c").read_text())
    assert sources[0] == sources[1] == sources[2] != sources[3]
    code, _, err = run("quantize.py", "--init", "float.pth", *data, *named, "--std", "0", "--output", "q.safetensors")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = run("report.py", "float.pth", *named, "--output", "r.html")
    assert (code, "name them with --data" in err) == (2, True)


GATED = """
import torch
from torch import nn


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.conv, self.gate = nn.Linear(8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 1)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.head(x * torch.sigmoid(self.gate(x)))


def convolutional():
    head = nn.Sequential(nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), head)


def unpooled():
    return nn.Conv2d(3, 3, 3)


def fixed_size():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
"""


@pytest.mark.parametrize("function", ["Gated", "convolutional"])
def test_the_outputs_of_a_network_of_ones_own_are_those_it_gives(
    run: Run, tiny_npz: tuple[Path, Path], tmp_path: Path, function: str
) -> None:
    named = saved(tmp_path, GATED, function)
    assert run("evaluate.py", "--init", "float.pth", *named, "--data", tiny_npz[1])[::2] == (0, "")
    assert run("report.py", "float.pth", *named, "--data", tiny_npz[1], "--output", "r.html")[::2] == (0, "")
    refused_with_images(run, named, ("--data", "digits"), "has 3 outputs, digits has 10 classes; name images of its")


@pytest.mark.parametrize(
    ("function", "size", "message"),
    [
        (
            "gray",
            8,
            "takes 1-channel images, commands read 3-channel ones; with yours call quantize(net, ",
        ),
        (
            "fixed_size",
            9,
            "refuses images of 3 × 9 × 9 (RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x392",
        ),
        ("unpooled", 8, "gives (1, 3, 6, 6) for 1 images; commands take logits, (images, classes)"),
    ],
)
def test_images_that_a_network_does_not_take_are_refused(
    run: Run, tiny_npz: tuple[Path, Path], tmp_path: Path, function: str, size: int, message: str
) -> None:
    gray = "\n\ndef gray():\n    from tests.scripts.test_own_network import small_net\n    return small_net(3, 1)\n"
    named = (*saved(tmp_path, GATED + gray, function), "--image-size", size)
    refused_with_images(run, named, ("--data", tiny_npz[0], "--test-data", tiny_npz[1]), message)
    if function != "unpooled":
        assert message in refused(run, "export.py", "float.pth", *named, "--to", "onnx", "--output", "net.onnx")
        assert message in refused(run, "report.py", "float.pth", *named, "--output", "r.html")
        c = ("--to", "c", "--data", tiny_npz[1], "--output", "net.c")
        assert message in refused(run, "export.py", "float.pth", *named, *c)
    assert list(Path.cwd().iterdir()) == [Path("float.pth").resolve()]


def test_what_is_said_beside_a_network_of_ones_own_must_hold(
    run: Run, tiny_npz: tuple[Path, Path], tmp_path: Path
) -> None:
    named = saved(tmp_path, GATED, "Gated")
    data = ("--data", tiny_npz[0], "--test-data", tiny_npz[1])
    quantized = ("--init", "q.safetensors", *named, *data)
    assert run("quantize.py", "--init", "float.pth", *named, *data, "--bits", 4, "--output", "q.safetensors")[0] == 0
    network = small_net()
    quantize(network, bits=4, exclude=["0.2"])  # what remains is the first and the last layer
    save_packed(network, "edges.safetensors")
    (tmp_path / "edges.py").write_text("from tests.scripts.test_own_network import small_net\n")
    edges = ("--init", "edges.safetensors", "--model", f"{tmp_path}/edges.py:small_net")
    assert run("evaluate.py", *quantized, "--bit", 4)[::2] == (0, "")
    for command, message in (
        (("evaluate.py", *quantized, "--bit", 2), "holds a network of 4 bits, not 2; leave out --bit"),
        (
            ("evaluate.py", *quantized, "--arch", "res20"),
            "--arch res20: the function says what it is; leave out --arch",
        ),
        (("evaluate.py", *quantized, "--preset", "lsq"), "--preset lsq: the function says what it is; leave out --pre"),
        (("evaluate.py", "--released", "apot_res20_3bit", *named), "its network is one of ours; leave out --model"),
        (
            ("quantize.py", "--init", "float.pth", *named, "--arch", "res20", "--output", "r.safetensors"),
            "leave out --ar",
        ),
        (
            ("quantize.py", *quantized, "--output", "r.safetensors"),
            "holds a network of 4 bits; give the full-precision",
        ),
        (("show_params.py", "edges.safetensors"), "holds no clipping thresholds: its layers are float, or 8-bit"),
        (("quantize.py", *edges, "--output", "r.safetensors"), "holds a network of 8 bits; give the full-precision"),
    ):
        assert message in refused(run, *command)
    assert not Path("r.safetensors").exists()


def test_a_file_that_exits_ends_no_command_in_silence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    refused_everywhere(run, f"{tmp_path}/exits.py:small", "does not run (SystemExit: 0)")


def refused_everywhere(run: Run, own: str, message: str) -> None:
    torch.save(small_net().state_dict(), "float.pth")
    for command in (
        ("evaluate.py", "--init", "float.pth"),
        ("quantize.py", "--init", "float.pth", "--output", "q.safetensors"),
        ("export.py", "float.pth", "--to", "onnx", "--output", "net.onnx"),
        ("report.py", "float.pth", "--output", "r.html"),
    ):
        assert message in refused(run, *command, "--model", own)


def refused_with_images(run: Run, named: tuple[object, ...], data: tuple[object, ...], message: str) -> None:
    for command in (
        ("evaluate.py", "--init", "float.pth", *data),
        ("quantize.py", "--init", "float.pth", *data, "--output", "q.safetensors"),
        ("report.py", "float.pth", *data[:2], "--output", "r.html"),
    ):
        assert message in refused(run, *command, *named)


def saved(folder: Path, source: str, function: str) -> tuple[str, str]:
    """--model of a network, whose weights are then in float.pth."""
    (folder / "own.py").write_text(source)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    torch.save(namespace[function]().state_dict(), "float.pth")
    return "--model", f"{folder}/own.py:{function}"


def refused(run: Run, *command: object) -> str:
    code, _, err = run(*command)
    assert (code, err.count("\n")) == (2, 1), err
    return err
