"""The commands and scripts of README and the guides, run as they stand there but for data and what EXCEPTED lists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apot_fat import Reconstruction
from apot_fat.checkpoint import write_checkpoint
from apot_fat.data import NAMED
from apot_fat.export import WRITERS
from apot_fat.models import create_model
from apot_fat.models.registry import _REGISTRY
from apot_fat.quant import threshold_layers
from apot_fat.quant.levels import LEVEL_FAMILIES, level_set
from apot_fat.quant.spec import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "checkpoints/README.md", *sorted((ROOT / "apot_fat").rglob("README.md"))]
EXTEND = ROOT / "apot_fat/README.md"
Run = Callable[..., tuple[int, str, str]]

# stands in for CIFAR-10 and hundreds of epochs: added, with a few random images, to commands that name no data
SMALL: dict[str, tuple[object, ...]] = {
    "train.py": ("--epochs", 1, "-b", 16),
    "progressive.py": ("--epochs", 1, "-b", 16, "--bits", "4,3", "--reconstruct", 0),
}
SMALL["quantize.py"] = ("--images", 2, "--reconstruct", "--steps", 1, "--joint-steps", 1)
EXCEPTED = {
    "torchrun": "several GPUs; tests/training/test_distributed.py runs two processes",
    "--config imagenet/": "ImageNet; tests/training/test_recipes.py reads every recipe",
    "resnet56": "as the one before it with other settings; tests/training/test_recipes.py trains two steps",
    "vggsmall": "a large network; tests/training/test_recipes.py trains two steps",
    "cifar10_full": "CIFAR-10 at full length; tests/scripts/test_sweep.py runs it tiny",
    "speedrun": "CIFAR-10 from nothing; tests/training/test_progressive.py runs it on digits",
    "apot_res20_3bit": "a download; tests/checkpoint/test_released.py serves it from this machine",
    "gcc": "tests/scripts/test_export_c.py compiles C",
    "qemu": "tests/integer/test_processors.py runs C there",
    "cp tests/integer/bare": "as the one above",
    "./res20_3bit": "tests/scripts/test_export_c.py runs C",
    "python -c": "as the two above",
    "--mode int8": "refused of the random network that stands in here; tests/export/test_onnx.py",
}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(language: str, pages: list[Path] = PAGES) -> list[str]:
    found = (re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL) for page in pages)
    return list(chain.from_iterable(found))


def commands(pages: list[Path]) -> list[str]:
    lines = "\n".join(blocks("bash", pages)).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def _files_it_names(run: Run) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 16), ("test", 10), ("cifar10_lossless_test", 20)):
        images, labels = rng.integers(0, 256, (count, 3, 32, 32), np.uint8), np.arange(count) % 10
        np.savez(f"{name}.npz", images=images, labels=labels)
    for folder in ("configs", "checkpoints"):
        Path(folder).symlink_to(ROOT / folder)
    for bits in (3, 32):
        network = {"state_dict": create_model("res20", bits=bits).state_dict()}
        write_checkpoint(network, f"res20_{bits}bit/model_best.pth.tar")


@pytest.mark.usefixtures("_files_it_names")
@pytest.mark.parametrize(
    ("pages", "least"), [(PAGES[:1], 12), pytest.param(PAGES[1:], 20, marks=pytest.mark.slow)], ids=["README", "guides"]
)
def test_every_command_runs_as_shown(run: Run, pages: list[Path], least: int) -> None:
    ran, left = 0, []
    for command in commands(pages):
        reasons = [reason for part, reason in EXCEPTED.items() if part in command]
        if reasons:
            left.append(f"{command}: {reasons[0]}")
            continue
        program, name, *arguments = shlex.split(command)
        assert program in ("python", "apot-fat"), command
        name = name.removeprefix("scripts/") if program == "python" else f"{name.replace('-', '_')}.py"
        added: tuple[object, ...] = ()
        if "-e" in arguments or "--test_only" in arguments:
            added = ("--data", "test.npz")
        elif name in SMALL and "--data" not in arguments:
            added = ("--data", "train.npz", "--test-data", "test.npz", *SMALL[name])
        code, _, err = run(name, *arguments, *added)
        assert (code, err) == (0, ""), command
        ran += 1
    print("\n".join([f"{ran} commands ran; left out:", *left]))
    assert ran >= least


@pytest.fixture
def _registries_as_they_were() -> Iterator[None]:
    registries: list[dict[str, Any]] = [NAMED, WRITERS, LEVEL_FAMILIES, PRESETS, _REGISTRY]
    kept = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, kept, strict=True):
        registry.clear()
        registry.update(entries)
    level_set.cache_clear()


@pytest.mark.usefixtures("_registries_as_they_were")
def test_the_places_where_a_quantizer_a_network_a_data_set_and_an_export_go(run: Run) -> None:
    namespace: dict[str, object] = {}
    added = blocks("python", [EXTEND])
    assert len(added) == 4
    for block in added:
        exec(block, namespace)
    line = ("--arch", "small", "--preset", "fibonacci", "--bit", 3, "--data", "stripes", "--epochs", 2, "-b", 50)
    code, out, err = run("train.py", *line)
    assert (code, err) == (0, ""), out
    assert " * Prec 100.000%" in out
    code, _, err = run("export.py", "result/small_3bit/model_best.pth.tar", "--to", "program", "--output", "small.pt2")
    assert (code, err) == (0, "")
    program = torch.export.load("small.pt2").module()
    assert program(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    several = "fully_shard"  # processes; tests/training/test_sharded.py
    own = [b for b in blocks("python", [page for page in PAGES if page != EXTEND]) if several not in b]
    assert len(own) == 4
    defaults = Reconstruction.__init__.__defaults__
    assert defaults is not None
    monkeypatch.setattr(Reconstruction.__init__, "__defaults__", (2, 2, *defaults[2:]))  # steps
    for block in own:
        net = create_model("resnet20", bits=32)
        exec(block, {"__name__": "readme", "net": net, "images": torch.rand(16, 3, 8, 8)})
        quantized = {layer.spec.weight_bits for _, layer in threshold_layers(net)}
        assert quantized == ({3} if "quantize(net, bits=3" in block else set())


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", text(page)):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            assert found.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", text(found), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_readme_is_short() -> None:
    assert len(text(PAGES[0]).splitlines()) <= 250
