"""Every function of the package that takes tensors or networks takes some of the device here, or it is said why not.

A function is reached if it is called with a tensor of the fake device, or with a network on it, in a tour of the works.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apot_fat.models.imagenet_resnet import Bottleneck, ImageNetResNet
from apot_fat.models.registry import LayerMaker
from apot_fat.quant import fit_threshold, level_set, preset
from apot_fat.quant.fast import layer_output
from apot_fat.training.build import make_batches
from apot_fat.training.objective import mixed
from apot_fat.training.optim import make_optimizer
from apot_fat.training.teacher import _InBfloat16
from tests.cuda import works
from tests.fake_cuda import DEVICE, FakeCuda

PACKAGE = Path(__file__).resolve().parents[2] / "apot_fat"
_TAKEN = re.compile(r"\b(Tensor|Batch|Integers|nn\.\w+|\w*Conv2d|\w*Linear|AnyQuantized)\b")

NOT_REACHED = {
    "before anything is on the device: files read, networks made, what an error says": [
        "checkpoint.bit_packing:unpack_bits",
        "checkpoint.packed_file:*",
        "checkpoint.packed_layers:unpack_layer",
        "checkpoint.weights:_hint",
        "checkpoint.weights:_is_float_bias",
        "data.images:*Set.subset",
        "data.stream:_collate",
        "models.mobilenet_v2:_conv_norm_relu",
        "models.vgg:VGG.__init__",
        "plain:*",
    ],
    "on the CPU by what they are: copies of networks for export (test_networks.py exports one), products of bytes": [
        "export.*",
        "integer.*",
        "quant.fast.byte_product:*",
        "quant.fast.codes:activation_codes",
        "quant.fast.projection:codes_from_table",
        "quant.fast.kept:byte_weight",
        "quant.integers:integer_input",
    ],
    "compiled code alone": [
        "quant.fast.kernels:_probe",
        "quant.fast.kept:_keep_for_graphs",
        "quant.fast.kept:kept_weights",
        "quant.fast.projection:_round_to_power_of_two",
        "quant.fast.projection:search",
        "training.compile:*",
    ],
    "several processes": ["training.distributed:*", "training.sharded:*"],
    "they ask for a true GPU": ["gpu_check.*", "timing:*"],
    "a whole run, see test_run.py": [
        "quant.all_layers:show_params",
        "training.batch_norm:check_batch_norm",
        "training.folder:*",
        "training.network:check_images",
        "training.teacher:_Renormalized.*",
    ],
    "commands: they call what the tour reaches": ["commands.*"],
    "without quant.fast alone": ["quant.projection:*", "quant.seam:Plain.*"],
    "never called": ["quant.convert.calibration:_Mark.backward", "quant.quantizer:Quantizer._quantize"],
}
"""Patterns of functions that the tour does not reach, by the reason."""


def functions() -> Iterator[str]:
    """``module:function`` of each that says it takes a tensor or a network."""
    for path in sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE / "models").glob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        yield from (f"{module}:{name}" for name in _functions_in(ast.parse(path.read_text(encoding="utf-8")), ""))


def _functions_in(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            arguments = chain(child.args.posonlyargs, child.args.args, child.args.kwonlyargs, [child.args.vararg])
            hints = [ast.unparse(argument.annotation) for argument in arguments if argument and argument.annotation]
            if any(_TAKEN.search(hint) and not hint.startswith(("Callable", "type[")) for hint in hints):
                yield prefix + child.name
        elif isinstance(child, ast.ClassDef):
            yield from _functions_in(child, f"{child.name}.")


class _Recorder:
    """Notes which of some functions are called with something of the device."""

    def __init__(self, fake: FakeCuda, wanted: set[str]) -> None:
        self.fake, self.wanted = fake, wanted
        self.reached: set[str] = set()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put a recording function in the place of each, wherever it is known by name."""
        modules = [m for name, m in sys.modules.items() if name.partition(".")[0] in ("apot_fat", "tests")]
        holders = [*modules, *{v for m in modules for v in vars(m).values() if isinstance(v, type)}]
        recording: dict[int, Callable[..., Any]] = {}
        for holder in holders:
            for name, value in list(vars(holder).items()):
                function = value.__func__ if isinstance(value, staticmethod) else value
                if not isinstance(function, FunctionType) or self._name(function) not in self.wanted:
                    continue
                wrapped = recording.setdefault(id(function), self._recording(function))
                patch.setattr(holder, name, staticmethod(wrapped) if isinstance(value, staticmethod) else wrapped)

    def _name(self, function: FunctionType) -> str:
        return f"{str(function.__module__).removeprefix('apot_fat.')}:{function.__qualname__}"

    def _recording(self, function: FunctionType) -> Callable[..., Any]:
        name = self._name(function)

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if name not in self.reached and self._is_of_device([*args, *kwargs.values()]):
                self.reached.add(name)
            return function(*args, **kwargs)

        return recorded

    def _is_of_device(self, value: Any) -> bool:
        if isinstance(value, nn.Module):
            value = list(islice(value.parameters(), 1)) if "_modules" in vars(value) else None  # else half made
        if isinstance(value, Tensor):
            return self.fake.lies_here(value)
        if isinstance(value, dict):
            value = [*value.values()]
        return isinstance(value, tuple | list) and any(map(self._is_of_device, value))


def tour(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The works, one network a family."""
    for arch in works.SIZES:
        with torch.no_grad():
            works.network(DEVICE, arch, "apot-imagenet")(next(iter(_batches(arch))).x)
    block = LayerMaker(preset("apot-imagenet", 4))
    ImageNetResNet(block, Bottleneck, (1, 1, 1, 1), works.CLASSES).to(DEVICE)(torch.rand(2, 3, 32, 32, device=DEVICE))
    works.training(DEVICE, "vgg_tiny", "fat-cifar", weight_per_channel=True)
    works.training(DEVICE, "vgg_tiny", "apot-cifar", act_per_channel=True)
    fit_threshold(torch.rand(9, device=DEVICE), level_set("apot", 3), signed=False)
    x = torch.rand(4, 3, 8, 8, device=DEVICE)
    _InBfloat16(works.network(DEVICE, "vgg_tiny", "apot-cifar", 32).eval(), DEVICE)(mixed(x, 0.5))
    with patch.context() as patched:
        patched.setattr(layer_output, "REMEMBER_ELEMENTS", 0)
        run = works.config("vgg_tiny", "apot-imagenet-pot", batch_size=4)
        model = works.network(DEVICE, run.arch, run.preset_name)
        works.epoch(model, run, _batches(run.arch, batch_size=4), make_optimizer(model, run), every=1)
        works.training(DEVICE, "vgg_tiny", "lsq")
        works.conversion(DEVICE, folder, "fat")
        works.reconstruction(DEVICE, folder, "apot")
    for arch, work in (("vgg_tiny", works.looks), ("resnet20", works.files)):
        (folder / arch).mkdir()
        work(DEVICE, folder / arch, arch, "fat-cifar")
    works.streamed(DEVICE, folder / "streamed")
    works.non_finite(DEVICE)


def _batches(arch: str, **values: Any) -> Any:
    return make_batches(works.config(arch, "apot-cifar", **values), works.images(arch), DEVICE, training=True)


def test_every_function_that_takes_tensors_is_reached(
    fake: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = set(functions())
    recorder = _Recorder(fake, wanted)
    recorder.install(monkeypatch)
    tour(tmp_path, monkeypatch)
    missing = wanted - recorder.reached
    patterns = [pattern for group in NOT_REACHED.values() for pattern in group]
    assert {name for name in missing if not any(fnmatchcase(name, pattern) for pattern in patterns)} == set()
    assert [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in missing)] == []
