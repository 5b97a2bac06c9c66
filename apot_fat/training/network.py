"""The network that a config names or a file holds: the one place that opens checkpoints and packed files."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apot_fat.checkpoint import (
    PACKED_SUFFIX,
    TORCHVISION,
    checkpoint_thresholds,
    load_packed,
    load_weights,
    num_outputs,
    packed_normalization,
    read_newest,
    torchvision_weights,
)
from apot_fat.data import Dataset
from apot_fat.models import create_model, find_architecture, list_models, register
from apot_fat.quant import seam
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.quant.watching import evaluation_mode
from apot_fat.text import one_line
from apot_fat.training.config import BEST, TrainConfig
from apot_fat.training.recorded import recorded_config

_RUN_FOLDER = re.compile(r"(?P<arch>.+)_(?P<bits>\d+)bit")
_OWN, _OWN_PRESET = "own:", "apot-cifar"  # no network of ours is called so, and FAT has constants of its own for images
_OF_THE_MACHINE = {"device": "auto", "gpu": None, "workers": None}

log = logging.getLogger("apot_fat")


def create_network(config: TrainConfig, num_classes: int) -> nn.Module:
    """The network a config names."""
    options = {name: True for name in ("weight_per_channel", "act_per_channel") if getattr(config, name)}
    return create_model(config.arch, config.preset, config.bit, num_classes, **options)


@dataclass(frozen=True)
class NetworkFile:
    """A network with the weights of a file, on the CPU and in evaluation mode, and what the file says of it.

    Args:
        where: the file, as errors call it.
        config: that of its run; of a file that records none what is known, the rest being defaults.
        model: the network.
        num_classes: its outputs; None of a network of one's own.
        content: what else a checkpoint holds; empty for a packed file.
        is_recorded: whether the file records the config.
    """

    where: str
    config: TrainConfig
    model: nn.Module
    num_classes: int | None
    content: dict[str, Any]
    is_recorded: bool


def best_of_run(source: str | Path) -> str | Path:
    """The best checkpoint of a run folder; any other path as it is.

    Raises:
        ValueError: a folder without one.
    """
    if not Path(source).is_dir():
        return source
    if not (Path(source) / BEST).is_file():
        raise ValueError(f"{source}: is no run folder, it holds no {BEST}; name a checkpoint or a run folder")
    return Path(source) / BEST


def open_network(
    source: str | Path, given: dict[str, Any] | None = None, own: str | None = None, **assumed: Any
) -> NetworkFile:
    """Open a checkpoint, ours or published, a packed file, or torchvision's weights.

    Args:
        source: its path, or that of a run folder, whose best checkpoint it is then; or ``torchvision``.
        given: config values of the command line. ``arch``, ``bit`` and ``preset`` must be those that the file records;
            the others come over its own.
        own: ``FILE.py:FUNCTION`` that builds a network of one's own, float, which the file's weights are for.
        assumed: config values of a checkpoint that records none, where neither ``given`` nor the name of its folder,
            ``<arch>_<bits>bit``, says them.

    Raises:
        ValueError: no such file or a damaged one; a network that is not known, or another than the given one.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    if "data" in given:
        given.setdefault("test_data", None)  # the recorded one belongs to other data
    if source != TORCHVISION and (found := best_of_run(source)) != source:
        log.info("%s: its %s", source, BEST)
        source = found
    if own is not None:
        return _open_own(Path(source), given, own)
    if Path(source).suffix == PACKED_SUFFIX:
        return _open_packed(Path(source), given)
    if source == TORCHVISION:
        where = f"--init {TORCHVISION}"
        assumed = {**assumed, "bit": FLOAT_BITS} | given
        if "arch" not in assumed:
            raise ValueError(f"{where}: name the network with --arch")
        content: dict[str, Any] = {"state_dict": torchvision_weights(assumed["arch"])}
    else:
        where, content = f"checkpoint {source}", read_newest(source, log.warning)
    recorded = recorded_config(content, where)
    if recorded is not None:
        _check_given(where, given, recorded)
        config = replace(recorded, **(_OF_THE_MACHINE | given)).normalized_as(recorded)
    else:
        config = _assumed_config(where, Path(source), content, given, assumed)
    classes = num_outputs(content, where)
    model = load_weights(create_network(config, classes), content, label=where).eval()
    return NetworkFile(where, config, model, classes, content, recorded is not None)


@torch.no_grad()
def check_images(where: str | Path, model: nn.Module, images: Tensor, dataset: Dataset | None = None) -> None:
    """Raise ``ValueError`` unless a network takes such images and has an output for every test label of a data set.

    Args:
        where: the network's file, for the message.
        model: the network.
        images: one or more, (N, C, H, W), on its device.
        dataset: what they come from; None for noise, without labels.
    """
    channels = images.shape[1]
    try:
        with evaluation_mode(model), seam.speed.uncompiled():
            logits = model(images)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        own = next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), channels)
        if own != channels:
            raise ValueError(
                f"{where}: takes {own}-channel images, commands read {channels}-channel ones; with yours call "
                "quantize(net, calibration=images), save_packed, export_onnx, integer_program and cost_report in Python"
            ) from error
        size = " × ".join(map(str, images.shape[1:]))
        reason = f"{type(error).__name__}: {one_line(error):.160}"
        raise ValueError(f"{where}: refuses images of {size} ({reason}); give their size by --image-size") from error
    if dataset is None:
        return
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{where}: gives {shape} for {len(images)} images; commands take logits, (images, classes)")
    if int(dataset.test.labels_N.max()) >= logits.shape[1]:
        classes = f"{dataset.name} has {len(dataset.classes)} classes"
        raise ValueError(f"{where}: has {logits.shape[1]} outputs, {classes}; name images of its classes by --data")


def log_normalization(config: TrainConfig) -> None:
    """Say what the images of a network of one's own are normalised with, which no file of it records."""
    if config.arch.startswith(_OWN):
        mean, std = (",".join(map(str, values)) for values in config.normalization())
        hint = "" if config.mean and config.std else "; if it was trained with others, give --mean and --std"
        log.info("images are normalised with mean %s, std %s, units of 255%s", mean, std, hint)


def _open_packed(path: Path, given: dict[str, Any]) -> NetworkFile:
    model = load_packed(path)
    made: Any = model.created_as
    papers = find_architecture(made["name"]).dataset
    where = f"packed file {path}"
    known = {"arch": made["name"], "preset": made["preset"], "bit": made["bits"], "data": papers}
    config = TrainConfig.from_dict(known | _normalized_as(path), where)
    _check_given(where, given, config)
    return NetworkFile(where, replace(config, **given), model, made["num_classes"], {}, is_recorded=False)


def _normalized_as(packed: Path) -> dict[str, Any]:
    mean, std = packed_normalization(packed) or ((), ())
    return {"mean": mean, "std": std} if len(mean) == 3 else {}  # commands read images of three channels


def _open_own(path: Path, given: dict[str, Any], own: str) -> NetworkFile:
    for option in ("arch", "preset"):
        if option in given:
            value = given[option]
            raise ValueError(
                f"--model {own} with --{option} {value}: the function says what it is; leave out --{option}"
            )
    build = _builder(own)
    name = _OWN + own.rpartition(":")[2]
    if name not in list_models():
        register(name, "cifar10")(lambda layers, num_classes: build())
    if path.suffix == PACKED_SUFFIX:
        where, model, content = f"packed file {path}", load_packed(path, build()), {}
        given = _normalized_as(path) | given
    else:
        where, content = f"checkpoint {path}", read_newest(path, log.warning)
        model = load_weights(build(), content, label=where).eval()
    bits = [layer.spec.weight_bits for _, layer in threshold_layers(model)]
    if not bits:  # a small network may be its first and last layer alone
        bits = [layer.spec.weight_bits for layer in model.modules() if isinstance(layer, AnyQuantized)]
    known = {"preset": _OWN_PRESET, "arch": name, "bit": max(bits, default=FLOAT_BITS)}
    _check_given(where, given, TrainConfig.from_dict(known, where))
    config = TrainConfig.from_dict(known | given, where)
    return NetworkFile(where, config, model, None, content, is_recorded=False)


def _builder(own: str) -> Callable[[], nn.Module]:
    """What builds a network of one's own; whatever goes wrong in the user's code is a ``ValueError``."""
    file, colon, name = own.rpartition(":")
    if not colon:
        raise ValueError(f"--model {own}: expected FILE.py:FUNCTION")
    folder = str(Path(file).resolve().parent)
    try:
        with _imports_from(folder):
            function = runpy.run_path(file).get(name)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"--model {own}: {file!r} does not run ({reason})") from error
    if not callable(function):
        raise ValueError(f"--model {own}: no function {name} in {file}; give FILE.py:FUNCTION")
    wanted = "expected a function without arguments that returns the network, float"

    def build() -> nn.Module:
        try:
            with _imports_from(folder):
                model = function()
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"--model {own}: {name}() fails ({reason}); {wanted}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model {own}: {name}() returns {model!r:.60}, not an nn.Module; {wanted}")
        return model

    return build


@contextmanager
def _imports_from(folder: str) -> Iterator[None]:
    # first, as Python does for a script; afterwards last, for what a network imports when it runs
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _check_given(where: str, given: dict[str, Any], recorded: TrainConfig) -> None:
    if find_architecture(given.get("arch", recorded.arch)).name != find_architecture(recorded.arch).name:
        raise ValueError(f"{where}: holds {recorded.arch}, not {given['arch']}; leave out --arch")
    if given.get("bit", recorded.bit) != recorded.bit:
        raise ValueError(f"{where}: holds a network of {recorded.bit} bits, not {given['bit']}; leave out --bit")
    if given.get("preset", recorded.preset) != recorded.preset:
        raise ValueError(f"{where}: holds {recorded.preset}, not {given['preset']}; leave out --preset")


def _assumed_config(
    where: str, path: Path, content: dict[str, Any], given: dict[str, Any], assumed: dict[str, Any]
) -> TrainConfig:
    named = _RUN_FOLDER.fullmatch(path.resolve().parent.name)
    known: dict[str, Any] = assumed | ({"arch": named["arch"], "bit": int(named["bits"])} if named else {}) | given
    if not checkpoint_thresholds(content, where):
        if given.get("bit", FLOAT_BITS) != FLOAT_BITS:
            raise ValueError(
                f"{where}: holds no clipping thresholds, it is of full precision, not of {given['bit']} bits"
            )
        known["bit"] = FLOAT_BITS
    if missing := [f"--{name}" for name in ("arch", "bit") if name not in known]:
        raise ValueError(
            f"{where}: records no network and lies in no <arch>_<bits>bit folder; give {' and '.join(missing)}"
        )
    known.setdefault("data", find_architecture(known["arch"]).dataset)
    config = TrainConfig.from_dict(known, where)
    log.info("%s records no network: taken for %s, %s, at %d bits", where, config.arch, config.preset, config.bit)
    return config
