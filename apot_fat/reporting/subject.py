"""What a report is about: a network with its weights, and all that its file or folder says of how it came about."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from apot_fat.checkpoint import PACKED_SUFFIX, best_accuracy
from apot_fat.data import Dataset
from apot_fat.models import find_architecture
from apot_fat.training.build import check_classes, images_key, load_config_dataset, make_batches, sample_images
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device, set_numerics
from apot_fat.training.folder import LAST, best_index, best_or_last, read_run, recorded_shape
from apot_fat.training.loop import Result, evaluate
from apot_fat.training.network import check_images, log_normalization, open_network
from apot_fat.training.recorded import recorded_history

IMAGE_SIZES = {"cifar10": 32, "imagenet": 224}  # pixels, of the data sets of the papers
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}

log = logging.getLogger("apot_fat")


@dataclass(frozen=True)
class Subject:
    """A network of a report.

    Args:
        path: where it was read from: a run folder, a checkpoint or a packed file.
        kind: ``run``, ``checkpoint`` or ``packed``.
        config: the run's, or for the others what is known: network, variant and bits.
        model: with the weights of the best epoch, in evaluation mode.
        num_classes: its outputs, where they are known.
        history: one row an epoch, as in ``metrics.jsonl``; empty but for runs.
        recorded: best top-1 that the file records, %, or None.
        trained: whether ``config`` is a run's, with its recipe.
        environment: what a run was computed with, as its checkpoint records it; else empty.
        shape: (C, H, W) of its images as a run's checkpoint records it, or None.
        group: which of the report's paths it came with, from 0.
    """

    path: Path
    kind: str
    config: TrainConfig
    model: nn.Module
    num_classes: int | None
    history: tuple[dict[str, Any], ...]
    recorded: float | None
    trained: bool
    environment: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, int, int] | None = None
    group: int = 0

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best epoch."""
        return self.history[best_index(list(self.history))] if self.history else None


@dataclass(frozen=True)
class Images:
    """Images of a report.

    Args:
        name: what they are called.
        batch: a few, the first test images, normalised, (N, C, H, W).
        result: the network's accuracy on all of them; None unless asked for.
    """

    name: str
    batch: Tensor
    result: Result | None


def load_subjects(path: Path, group: int = 0, own: str | None = None, **given: Any) -> list[Subject]:
    """The networks at a path, from many bits to few.

    Args:
        path: a run folder, a folder that holds run folders at any depth (as a sweep's does), a checkpoint (ours or
            released) or a packed file.
        group: for ``Subject``.
        own: what builds a network of one's own, see ``open_network``.
        given: ``arch``, ``bit`` and ``preset`` of a checkpoint that does not record them and does not lie in a folder
            called ``<arch>_<bit>bit``.

    Raises:
        ValueError: none of these, a damaged file, or a network that is not known.
    """
    if path.is_dir():
        if (path / LAST).is_file():
            return [_run(path, group)]
        folders = sorted(entry.parent for entry in path.rglob(LAST))
        if not folders:
            raise ValueError(f"{path}: neither a run folder (it holds no {LAST}) nor a folder of run folders")
        runs = []
        for folder in tqdm(folders, desc="read", unit="run", leave=False, disable=None):
            try:
                runs.append(_run(folder, group))
            except ValueError as error:  # one that has just begun keeps nobody from seeing the others
                if folder == folders[-1] and not runs:
                    raise
                log.warning("not in the report: %s", error)
        return sorted(runs, key=lambda run: (run.config.arch.count("_"), run.config.arch, -run.config.bit))
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; name a run folder, a checkpoint or a packed file")
    return [_file(path, group, own, given)]


def read_once() -> Callable[[TrainConfig], Dataset]:
    """What reads the test images that a config names, and the same ones only once."""
    found: dict[tuple[object, ...], Dataset] = {}

    def read(config: TrainConfig) -> Dataset:
        key = images_key(config)
        if key not in found:
            found[key] = load_config_dataset(config, need_train=False)
        return found[key]

    return read


def load_images(
    subject: Subject,
    data: str | None,
    image_size: int | None,
    read: Callable[[TrainConfig], Dataset],
    **normalization: Any,
) -> Images | str:
    """Test images for a network: those named, else those its run names if they are at hand. Nothing is downloaded.

    Args:
        subject: the network.
        data: as ``--data``; then its accuracy on all of them is measured too, on a GPU where there is one.
        image_size: height and width they are brought to, pixels.
        read: of ``read_once``.
        normalization: ``mean`` and ``std`` of the images of ``data``, in place of what is known of the network.

    Returns:
        The images, or the reason there are none, as a sentence.

    Raises:
        ValueError: the named images cannot be read or have labels that the network does not know.
    """
    config = subject.config
    if data is not None:
        config = replace(config, data=data, test_data=None, **normalization)
        if subject.trained:
            config = config.normalized_as(subject.config)
        log_normalization(config)
    elif not subject.trained:
        return "No images: this file names none. Name some with --data."
    elif not _at_hand(config):
        return f"No images: the run's data ({config.data}) are not at hand. Name some with --data."
    config = replace(config, image_size=image_size or config.image_size, workers=0)
    try:
        dataset = read(config)
    except ValueError:
        if data is not None:
            raise
        return f"No images: the run's data ({config.data}) cannot be read any more. Name some with --data."
    batch = sample_images(config, dataset.test, torch.device("cpu"))
    check_images(subject.path, subject.model, batch[:1], None if data is None else dataset)
    if data is None:
        return Images(dataset.name, batch, None)
    check_classes(dataset, subject.num_classes, str(subject.path))
    device = choose_device()
    set_numerics(config.numerics, device)
    model = subject.model.to(device)
    result = evaluate(model, make_batches(config, dataset.test, device), log=log.debug)
    model.cpu()
    return Images(dataset.name, batch, result)


def input_shape(subject: Subject, images: Images | str, image_size: int | None) -> tuple[int, int, int]:
    """(C, H, W) of what the network takes: its images', or else those of its run or of its papers' data set."""
    if isinstance(images, Images):
        channels, height, width = images.batch.shape[1:]
        return channels, height, width
    shape = usual_shape(subject.config, subject.shape, image_size)
    check_images(subject.path, subject.model, torch.zeros(1, *shape))
    return shape


def usual_shape(
    config: TrainConfig, recorded: tuple[int, int, int] | None, image_size: int | None = None
) -> tuple[int, int, int]:
    """(C, H, W) of a network's images.

    Args:
        config: the run's, or what is known of another network.
        recorded: the shape that a run's checkpoint records.
        image_size: height and width, pixels, that go before these.
    """
    if recorded is not None and image_size is None:
        return recorded
    size = image_size or config.image_size or IMAGE_SIZES[find_architecture(config.arch).dataset]
    return 3, size, size


def _run(folder: Path, group: int) -> Subject:
    config, content = read_run(folder)
    opened = open_network(best_or_last(folder))
    shape = recorded_shape(content, f"checkpoint {folder / LAST}")
    made = content.get("environment", {})
    history, classes = tuple(content["history"]), opened.num_classes
    return Subject(folder, "run", config, opened.model, classes, history, None, True, made, shape, group)


def _file(path: Path, group: int, own: str | None, given: dict[str, Any]) -> Subject:
    opened = open_network(path, given, own)
    kind = "packed" if path.suffix == PACKED_SUFFIX else "checkpoint"
    content, recorded = opened.content, opened.is_recorded
    return Subject(
        path,
        kind,
        opened.config,
        opened.model,
        opened.num_classes,
        tuple(recorded_history(content, opened.where)) if recorded else (),
        None if recorded else best_accuracy(content),
        recorded,
        content.get("environment", {}),
        recorded_shape(content, opened.where),
        group,
    )


def _at_hand(config: TrainConfig) -> bool:
    if config.data == "digits":
        return True
    if config.data in _CIFAR_FOLDERS:
        return (Path(config.data_root) / _CIFAR_FOLDERS[config.data]).is_dir()
    path = Path(config.data_root) / "imagenet" if config.data == "imagenet" else Path(config.data)
    return path.exists() and (config.test_data is None or Path(config.test_data).exists())
