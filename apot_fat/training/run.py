"""A training run: its folder, its epochs, its files, and going on after an interruption."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from apot_fat.checkpoint import atomic_write, load_weights, read_checkpoint, write_checkpoint
from apot_fat.data import Augmentation, Dataset, ImageBatches, load_dataset
from apot_fat.models import create_model
from apot_fat.quant.layers import clipping_table, keep_thresholds_positive, quant_layers
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device
from apot_fat.training.loop import Result, evaluate, train_epoch
from apot_fat.training.optim import make_optimizer, make_schedule

LAST, BEST, METRICS, CONFIG = "checkpoint.pth.tar", "model_best.pth.tar", "metrics.jsonl", "config.toml"
_FREE_TO_CHANGE = {"output", "device", "gpu", "print_freq", "histogram_every", "test_batch_size", "data_root", "epochs"}

log = logging.getLogger("apot_fat")


@dataclass(frozen=True)
class RunSummary:
    """What a finished run gave.

    Args:
        folder: the run folder.
        arch, method, bits: what was trained.
        epochs: epochs trained.
        last, best: top-1 on the test images, %, at the last and at the best epoch (``best_epoch``, from 1).
        best_on: what chose the best epoch: ``test``, as published, or ``val``.
        thresholds: every clipping threshold, or empty at 32 bits.
        seconds: training and evaluation, wall time.
    """

    folder: Path
    arch: str
    method: str
    bits: int
    epochs: int
    last: float
    best: float
    best_epoch: int
    best_on: str
    thresholds: tuple[float, ...]
    seconds: float


def train(config: TrainConfig, *, resume: str | None = None, dataset: Dataset | None = None) -> RunSummary:
    """Train one network at one bit-width and leave the run folder ``output/<arch>_<bits>bit``.

    Every epoch is tested; the best is the one with the highest test accuracy, as published, or with ``val_split`` the
    highest on the held-out training images.

    Args:
        config: the run.
        resume: ``auto`` to go on where the folder's last checkpoint stands (or start, if there is none), or the path
            of a checkpoint of the same run; None to start.
        dataset: already loaded images; by default those the config names.

    Raises:
        ValueError: anything in the config, the data or a checkpoint that does not fit, before any file is written; a
            folder that holds a run already, without ``resume``.
    """
    folder = Path(config.output) / config.run_name
    state = _resume_state(folder, config, resume)
    device = choose_device(config.device, config.gpu)
    dataset = dataset or load_config_dataset(config)
    assert dataset.train is not None
    seed_everything(config.seed)
    model = create_model(config.arch, config.preset, config.bit, len(dataset.classes))
    if state is None and config.init is not None:
        load_weights(model, config.init, other_bits=True)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)

    train_batches = make_batches(config, dataset.train, device, training=True)
    test_batches = make_batches(config, dataset.test, device)
    val_batches = None if dataset.val is None else make_batches(config, dataset.val, device)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, len(train_batches))
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    trackers = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}

    folder.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, Any]] = []
    if state is not None:
        history = _restore(state, trackers, folder / METRICS)
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
    log.info("%s: %s, %s at %d bits on %s, %s", folder, config.arch, config.preset, config.bit, dataset.name, device)

    with SummaryWriter(str(folder), purge_step=len(history)) as board:
        for epoch in range(len(history), config.epochs):
            train_batches.set_epoch(epoch)
            trained = train_epoch(
                model,
                train_batches,
                optimizer,
                schedule,
                scaler,
                amp=config.amp,
                label_smoothing=config.label_smoothing,
                log=log.info,
                print_freq=config.print_freq,
                epoch=epoch,
            )
            if raised := keep_thresholds_positive(model):
                log.warning("epoch %d: %d clipping thresholds reached zero and were set to their floor", epoch, raised)
            tested = evaluate(model, test_batches, amp=config.amp, log=log.info, print_freq=config.print_freq)
            held_out = None if val_batches is None else evaluate(model, val_batches, amp=config.amp)
            log.info(" * Prec %.3f%%", tested.top1)

            row = _metrics(epoch, optimizer, model, trained, tested, held_out)
            history.append(row)
            key = _selection_key(history)
            best_epoch = best_index(history)
            log.info("best acc: %f", history[best_epoch][key])
            _write_board(board, row, model, config, epoch)
            checkpoint = _checkpoint(config, trackers, history)
            if best_epoch == epoch:
                write_checkpoint(checkpoint, folder / BEST)
            _append(folder / METRICS, row, first=epoch == 0)
            write_checkpoint(checkpoint, folder / LAST)
    return summarize(folder)


def summarize(folder: Path) -> RunSummary:
    """The summary of a run folder, from its files.

    Raises:
        ValueError: no run there, or a damaged file.
    """
    content = read_checkpoint(folder / LAST)
    config, history = run_config(content, folder / LAST), content["history"]
    best = best_index(history)
    alphas = [
        alpha for layer in history[-1]["layers"].values() for alpha in (layer["weight_alpha"], layer["act_alpha"])
    ]
    return RunSummary(
        folder=folder,
        arch=config.arch,
        method=config.method,
        bits=config.bit,
        epochs=len(history),
        last=history[-1]["test_top1"],
        best=history[best]["test_top1"],
        best_epoch=best + 1,
        best_on=_selection_key(history).removesuffix("_top1"),
        thresholds=tuple(alpha for alpha in alphas if alpha is not None),
        seconds=sum(row["seconds"] for row in history),
    )


def is_finished(config: TrainConfig) -> bool:
    """Whether the config's run folder holds all of its epochs.

    Raises:
        ValueError: a damaged checkpoint, or one of another config.
    """
    state = _resume_state(Path(config.output) / config.run_name, config, "auto")
    return state is not None and len(state["history"]) >= config.epochs


def run_config(content: dict[str, Any], path: Path) -> TrainConfig:
    """The config inside one of our checkpoints.

    Raises:
        ValueError: it holds none.
    """
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("history"), list):
        raise ValueError(f"checkpoint {path}: not written by a training run of apot-fat")
    return TrainConfig.from_dict(content["config"], f"checkpoint {path}")


def load_config_dataset(config: TrainConfig, *, need_train: bool = True) -> Dataset:
    """The data set a config names."""
    return load_dataset(
        config.data,
        test_source=config.test_data,
        root=config.data_root,
        image_size=config.image_size,
        val_split=config.val_split,
        seed=config.seed,
        need_train=need_train,
    )


def make_batches(config: TrainConfig, images: Any, device: torch.device, *, training: bool = False) -> ImageBatches:
    """Batches of an image set: shuffled and augmented for training, in order for evaluation."""
    mean, std = config.normalization()
    return ImageBatches(
        images,
        config.batch_size if training else config.test_batch_size,
        device,
        mean,
        std,
        augmentation=Augmentation(config.crop_padding, config.flip) if training else None,
        shuffle=training,
        seed=config.seed,
        channels_last=config.channels_last,
    )


def best_index(history: list[dict[str, Any]]) -> int:
    """Index of the best epoch: the first with the highest accuracy on the selecting images."""
    key = _selection_key(history)
    return max(range(len(history)), key=lambda i: (history[i][key], -i))


def seed_everything(seed: int) -> None:
    """Seed torch (every device), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 (libraries that use the global state)
    random.seed(seed)


def _selection_key(history: list[dict[str, Any]]) -> str:
    return "val_top1" if "val_top1" in history[0] else "test_top1"


def _resume_state(folder: Path, config: TrainConfig, resume: str | None) -> dict[str, Any] | None:
    last = folder / LAST
    if resume is None:
        if last.exists():
            raise ValueError(f"{folder} holds a run already: go on with --resume auto, or name another --output")
        return None
    path = last if resume == "auto" else Path(resume)
    if resume == "auto" and not path.exists():
        return None
    content = read_checkpoint(path)
    before = run_config(content, path).to_dict()
    now = config.to_dict()
    for name in sorted({*before, *now} - _FREE_TO_CHANGE):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"checkpoint {path}: was run with {name} = {before.get(name)!r}, not {now.get(name)!r}; "
                "give that value, or name another --output"
            )
    if before.get("epochs") != now.get("epochs") and config.schedule != "step":
        raise ValueError(
            f"checkpoint {path}: was run with epochs = {before['epochs']}, which its {config.schedule} schedule "
            f"depends on, not {config.epochs}"
        )
    return content


def _restore(state: dict[str, Any], trackers: dict[str, Any], metrics: Path) -> list[dict[str, Any]]:
    model: nn.Module = trackers["model"]
    load_weights(model, state)
    for name in ("optimizer", "schedule", "scaler"):
        trackers[name].load_state_dict(state[name])
    torch.set_rng_state(state["rng"]["cpu"])
    if torch.cuda.is_available() and "cuda" in state["rng"]:
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    history: list[dict[str, Any]] = state["history"]
    with atomic_write(metrics) as temporary:  # drops rows of an epoch that was not saved
        temporary.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    return history


def _checkpoint(config: TrainConfig, trackers: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    return {
        "arch": config.arch,
        "epoch": len(history),
        "best_prec": history[best_index(history)]["test_top1"],
        "state_dict": trackers["model"].state_dict(),
        **{name: trackers[name].state_dict() for name in ("optimizer", "schedule", "scaler")},
        "rng": rng,
        "config": config.to_dict(),
        "history": history,
    }


def _metrics(
    epoch: int,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    trained: Result,
    tested: Result,
    held_out: Result | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": epoch + 1}
    for name, result in (("train", trained), ("test", tested), ("val", held_out)):
        if result is not None:
            row |= {f"{name}_loss": result.loss, f"{name}_top1": result.top1}
    row["lr"] = {group["name"]: group["lr"] for group in optimizer.param_groups}
    row["layers"] = {layer.name: asdict(layer) for layer in clipping_table(model)}
    row["seconds"] = trained.seconds + tested.seconds + (held_out.seconds if held_out else 0.0)
    return row


def _append(path: Path, row: dict[str, Any], *, first: bool) -> None:
    with path.open("w" if first else "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _write_board(board: SummaryWriter, row: dict[str, Any], model: nn.Module, config: TrainConfig, epoch: int) -> None:
    for part in ("train", "test", "val"):
        if f"{part}_loss" in row:
            board.add_scalar(f"loss/{part}", row[f"{part}_loss"], epoch)
            board.add_scalar(f"{part}_acc", row[f"{part}_top1"], epoch)
    for name, value in row["lr"].items():
        board.add_scalar(f"lr/{name}", value, epoch)
    for name, layer in row["layers"].items():
        for quantity in ("weight_alpha", "act_alpha", "mask_max", "mask_min"):
            if layer[quantity] is not None:
                board.add_scalar(f"{quantity}/{name}", layer[quantity], epoch)
    if config.histogram_every and (epoch % config.histogram_every == 0 or epoch + 1 == config.epochs):
        for name, module in quant_layers(model):
            board.add_histogram(f"weight/{name}", module.transformed_weight().detach(), epoch)
