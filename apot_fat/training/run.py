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

from apot_fat.checkpoint import (
    TORCHVISION,
    atomic_write,
    load_weights,
    read_newest,
    remove_leftovers,
    torchvision_weights,
    write_checkpoint,
)
from apot_fat.data import (
    Augmentation,
    Batches,
    Dataset,
    FileBatches,
    FileSet,
    ImageBatches,
    ImageSet,
    Mixing,
    Sharding,
    load_dataset,
)
from apot_fat.models import create_model
from apot_fat.quant.diagnosis import odd_layers
from apot_fat.quant.layers import clipping_table, keep_thresholds_positive, quant_layers
from apot_fat.quant.thresholds import initialize_thresholds
from apot_fat.training.averaging import WeightAverage
from apot_fat.training.board import Board
from apot_fat.training.compile import compile_network
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device
from apot_fat.training.distributed import (
    Processes,
    gather_objects,
    largest_over_processes,
    launched,
    process_group,
    synchronize_batch_norm,
    wait_for_all,
    wrap,
)
from apot_fat.training.environment import environment
from apot_fat.training.interruption import InterruptedRunError, SignalWatch
from apot_fat.training.loop import Meter, Position, Result, autocast, evaluate, train_epoch
from apot_fat.training.objective import Objective
from apot_fat.training.optim import freeze_late, make_optimizer, make_schedule
from apot_fat.training.teacher import load_teacher, teacher_path

LAST, BEST, METRICS, CONFIG = "checkpoint.pth.tar", "model_best.pth.tar", "metrics.jsonl", "config.toml"
FILE_SIZE = 224  # height and width that image files are brought to, pixels
_FREE_TO_CHANGE = {"output", "device", "gpu", "print_freq", "histogram_every", "test_batch_size", "data_root"}
_FREE_TO_CHANGE |= {"epochs", "workers", "dist_timeout", "on_damaged", "compile", "skip_nonfinite", "checkpoint_every"}

log = logging.getLogger("apot_fat")


@dataclass(frozen=True)
class RunSummary:
    """What a finished run gave.

    Args:
        folder: the run folder.
        arch, method, bits: what was trained.
        epochs: epochs trained.
        last, best: top-1 on the test images, %, at the last and at the best epoch (``best_epoch``, from 1).
        last_val: top-1 on the held-out images at the last epoch, %; None without ``val_split``.
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
    last_val: float | None
    best: float
    best_epoch: int
    best_on: str
    thresholds: tuple[float, ...]
    seconds: float


def train(config: TrainConfig, *, resume: str | None = None, dataset: Dataset | None = None) -> RunSummary:
    """Train one network at one bit-width and leave the run folder ``output/<arch>_<bits>bit``.

    Under torchrun all processes train it together and the first writes the files. Every epoch is tested; the best is
    the one with the highest test accuracy, as published, or with ``val_split`` on the held-out training images.

    Args:
        config: the run.
        resume: ``auto`` to go on where the folder's last checkpoint stands (or start, if there is none), or the path
            of a checkpoint of the same run; None to start.
        dataset: already loaded images; by default those the config names.

    Raises:
        ValueError: anything in the config, the data or a checkpoint that does not fit, before any file is written; a
            folder that holds a run already, without ``resume``.
        NonFiniteError: the gradient became infinite or NaN; the last checkpoint stands.
        InterruptedRunError: SIGINT or SIGTERM came; the run was saved after the step under way.
    """
    processes = launched()
    device = choose_device(config.device, config.gpu, processes.local_rank)
    sharding = Sharding(processes.rank, processes.world, config.accumulate)
    sharding.check(config.batch_size)
    folder = Path(config.output) / config.run_name
    state = _resume_state(folder, config, resume)
    dataset = dataset or load_config_dataset(config)
    assert dataset.train is not None
    seed_everything(config.seed)
    model = create_network(config, len(dataset.classes))
    if state is None:
        load_initial_weights(model, config)
    if config.sync_bn and processes.is_distributed:
        model = synchronize_batch_norm(model, device)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    network = compile_network(model, config.compile, device)

    train_batches = make_batches(config, dataset.train, device, sharding, training=True)
    test_batches = make_batches(config, dataset.test, device, sharding)
    val_batches = None if dataset.val is None else make_batches(config, dataset.val, device, sharding)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, len(train_batches))
    freeze_late(model, optimizer, schedule, config, len(train_batches))
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    objective = make_objective(config, len(dataset.classes), device)
    average = WeightAverage(model, config.ema_decay, optimizer) if config.ema_decay else None
    tested_model = average.model if average else model
    tested_network = compile_network(tested_model, config.compile, device) if average else network
    trackers = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, "average": average}
    if not len(train_batches):
        raise ValueError(f"{dataset.name}: {len(dataset.train)} training images do not fill one batch")

    history: list[dict[str, Any]] = []
    position = None
    if state is not None:
        history, position = _restore(state, trackers, processes)
    with (
        process_group(processes, device, config.dist_timeout),
        _Records(folder, config, processes, history, image_shape(config, dataset.test)) as records,
        SignalWatch(log.warning) as watch,
    ):
        log.info(
            "%s: %s, %s at %d bits on %s, %s", folder, config.arch, config.preset, config.bit, dataset.name, device
        )
        if processes.is_distributed:
            log.info("%d processes, %d images a step", processes.world, config.batch_size)
        if state is None:
            set_initial_thresholds(model, config, train_batches, device)
        trained_model = wrap(network, processes, device)  # every process takes the first one's parameters
        say = log.info if processes.is_first else None
        warned: set[str] = set()
        for epoch in range(len(history), config.epochs):
            train_batches.set_epoch(epoch)
            saver = _StepSaver(records, trackers, history, watch, config.checkpoint_every, device)
            trained = train_epoch(
                trained_model,
                train_batches,
                optimizer,
                schedule,
                scaler,
                objective=objective,
                amp=config.amp,
                skip_nonfinite=config.skip_nonfinite,
                log=say,
                print_freq=config.print_freq,
                epoch=epoch,
                position=position,
                after_step=saver.after_step,
            )
            position = None
            keep_thresholds_positive(model)
            averaging_seconds = 0.0
            if average is not None:
                with autocast(device, config.amp):
                    averaging_seconds = average.estimate_batch_norm(train_batches.unmixed(), config.bn_batches)
            options: dict[str, Any] = {"amp": config.amp, "after_batch": saver.after_test_batch}
            tested = evaluate(tested_network, test_batches, log=say, print_freq=config.print_freq, **options)
            held_out = None if val_batches is None else evaluate(tested_network, val_batches, **options)
            log.info(" * Prec %.3f%%", tested.top1)
            if processes.is_first and saver.test_batch is not None:  # the first alone logs
                _warn_once(epoch, odd_layers(tested_model, saver.test_batch), warned)
            history.append(_metrics(epoch, optimizer, tested_model, trained, tested, held_out))
            history[-1]["seconds"] += averaging_seconds
            records.save(trackers, history, saver.test_batch)
            saver.stop_if_asked(saved=True)
    return _summary(folder, config, history)


def _warn_once(epoch: int, sentences: list[str], warned: set[str]) -> None:
    for sentence in sentences:
        if sentence not in warned:
            warned.add(sentence)
            log.warning("epoch %d: %s", epoch, sentence)


def summarize(folder: Path) -> RunSummary:
    """The summary of a run folder, from its files.

    Raises:
        ValueError: no run there, or a damaged file.
    """
    config, content = read_run(folder)
    return _summary(folder, config, content["history"])


def read_run(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Config and newest checkpoint of a run folder with at least one finished epoch.

    Raises:
        ValueError: no run there, a damaged file, or no finished epoch.
    """
    content = read_newest(folder / LAST, log.warning)
    config = run_config(content, folder / LAST)
    if not content["history"]:
        raise ValueError(f"{folder}: the run has finished no epoch yet; go on with --resume auto")
    return config, content


def _summary(folder: Path, config: TrainConfig, history: list[dict[str, Any]]) -> RunSummary:
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
        last_val=history[-1].get("val_top1"),
        best=history[best]["test_top1"],
        best_epoch=best + 1,
        best_on=_selection_key(history).removesuffix("_top1"),
        thresholds=tuple(alpha for alpha in alphas if alpha is not None),
        seconds=sum(row["seconds"] for row in history),
    )


class _Records:
    """The files of a run folder, written by the first process alone."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        processes: Processes,
        history: list[dict[str, Any]],
        shape: tuple[int, int, int],
    ) -> None:
        self.folder, self.config, self.processes = folder, config, processes
        self.done, self.shape = list(history), shape
        self.board: Board | None = None

    def __enter__(self) -> _Records:
        if self.processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            with atomic_write(self.folder / CONFIG) as temporary:
                temporary.write_text(tomli_w.dumps(self.config.to_dict()), encoding="utf-8")
            with atomic_write(self.folder / METRICS) as temporary:  # without rows of an epoch that was not saved
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.done), encoding="utf-8")
            self.board = Board(self.folder, self.config, len(self.done))
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()

    def save_within_epoch(self, trackers: dict[str, Any], history: list[dict[str, Any]], position: Position) -> None:
        """Write a checkpoint between two steps; every process waits until it is there."""
        states = gather_objects((_rng_state(), position._asdict()))
        if self.board is not None:
            checkpoint = self._checkpoint(trackers, history, [rng for rng, _ in states])
            checkpoint["positions"] = [position for _, position in states]
            write_checkpoint(checkpoint, self.folder / LAST, keep_before=True)
        wait_for_all()

    def save(self, trackers: dict[str, Any], history: list[dict[str, Any]], images: torch.Tensor | None = None) -> None:
        """Record the epoch just ended, the last images evaluated; every process waits until its files are there."""
        rng = gather_objects(_rng_state())
        if self.board is not None:
            row, best = history[-1], best_index(history)
            log.info("best acc: %f", history[best][_selection_key(history)])
            self.board.write(row, _tested(trackers), images, row["epoch"] - 1)
            checkpoint = self._checkpoint(trackers, history, rng)
            if best == len(history) - 1:
                write_checkpoint(checkpoint, self.folder / BEST)
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            write_checkpoint(checkpoint, self.folder / LAST, keep_before=True)
        wait_for_all()

    def _checkpoint(
        self, trackers: dict[str, Any], history: list[dict[str, Any]], rng: list[dict[str, torch.Tensor]]
    ) -> dict[str, Any]:
        average = trackers["average"]
        return {
            "arch": self.config.arch,
            "epoch": len(history),
            "best_prec": history[best_index(history)]["test_top1"] if history else None,
            "state_dict": _tested(trackers).state_dict(),
            **({"average": {"trained": trackers["model"].state_dict(), "steps": average.steps}} if average else {}),
            **{name: trackers[name].state_dict() for name in ("optimizer", "schedule", "scaler")},
            "rng": rng,
            "environment": environment(next(trackers["model"].parameters()).device),
            "config": self.config.to_dict(),
            "image_shape": self.shape,
            "history": history,
        }


class _StepSaver:
    """Saves within an epoch: every so many steps, and when a signal ends the run."""

    def __init__(
        self,
        records: _Records,
        trackers: dict[str, Any],
        history: list[dict[str, Any]],
        watch: SignalWatch,
        every: int,
        device: torch.device,
    ) -> None:
        self.records, self.trackers, self.history, self.watch, self.every = records, trackers, history, watch, every
        self.device = device
        self.steps = 0
        self.reached: tuple[int, Meter] | None = None
        self.test_batch: torch.Tensor | None = None

    def after_step(self, batches: int, meter: Meter) -> None:
        self.steps += 1
        self.reached = batches, meter
        due = self.every > 0 and self.steps % self.every == 0
        if due:
            self._save()
        self.stop_if_asked(saved=due)

    def after_test_batch(self, x: torch.Tensor) -> None:
        self.test_batch = x
        # processes see different numbers of batches and cannot agree here: several go on to the epoch's end
        if not self.records.processes.is_distributed:
            self.stop_if_asked(saved=False)

    def stop_if_asked(self, *, saved: bool) -> None:
        # a signal may reach the processes in different steps
        asked = largest_over_processes(self.watch.received or 0, self.device)
        if not asked:
            return
        if not saved:
            self._save()
        raise InterruptedRunError(asked, f"saved in {self.records.folder}; go on with --resume auto")

    def _save(self) -> None:
        if self.reached is not None:
            batches, meter = self.reached
            self.records.save_within_epoch(self.trackers, self.history, Position(batches, meter.state()))


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
        stream=config.streams,
    )


def image_shape(config: TrainConfig, images: ImageSet | FileSet) -> tuple[int, int, int]:
    """(C, H, W) of an image as the network takes it."""
    height, width = images.size if isinstance(images, ImageSet) else 2 * (config.image_size or FILE_SIZE,)
    return 3, height, width


def recorded_shape(content: dict[str, Any], where: str) -> tuple[int, int, int] | None:
    """(C, H, W) of the images that a run of ours trained on, as its checkpoint records it; None where it does not.

    Raises:
        ValueError: something else there than a shape.
    """
    shape = content.get("image_shape")
    if shape is None:
        return None
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(type(n) is int and 0 < n < 1 << 16 for n in shape):
        raise ValueError(f"{where}: image_shape {shape!r:.60}: not three sizes; the file is damaged, take another")
    return shape


def make_batches(
    config: TrainConfig,
    images: ImageSet | FileSet,
    device: torch.device,
    sharding: Sharding = Sharding(),  # noqa: B008 (frozen)
    *,
    training: bool = False,
) -> Batches:
    """Batches of images: shuffled and augmented for training, in order for evaluation."""
    mean, std = config.normalization()
    batch_size = config.batch_size if training else config.test_batch_size
    options: dict[str, Any] = {
        "training": training,
        "seed": config.seed,
        "channels_last": config.channels_last,
        "sharding": sharding,
        "mixing": Mixing(config.mixup, config.cutout) if training else Mixing(),
    }
    if isinstance(images, ImageSet):
        augmentation = Augmentation(config.crop_padding, config.flip) if training else None
        return ImageBatches(images, batch_size, device, mean, std, augmentation=augmentation, **options)
    options |= {"crop": config.crop, "workers": config.workers, "on_damaged": config.on_damaged}
    return FileBatches(images, batch_size, device, mean, std, image_size=config.image_size or FILE_SIZE, **options)


def create_network(config: TrainConfig, num_classes: int) -> nn.Module:
    """The network a config names."""
    options = {"weight_per_channel": True} if config.weight_per_channel else {}
    return create_model(config.arch, config.preset, config.bit, num_classes, **options)


def created_config(model: nn.Module, **given: Any) -> TrainConfig:
    """The config of a network that ``create_model`` built, such as a packed file's; ``given`` names what it leaves."""
    made: Any = model.created_as
    return TrainConfig.from_dict({**given, "arch": made["name"], "preset": made["preset"], "bit": made["bits"]})


def load_initial_weights(model: nn.Module, config: TrainConfig) -> None:
    """Start from ``config.init``: a checkpoint of any bit-width, torchvision's fp32 weights, or nothing."""
    if config.init in (None, "none"):
        return
    source = torchvision_weights(config.arch) if config.init == TORCHVISION else str(config.init)
    load_weights(model, source, other_bits=True)


def make_objective(config: TrainConfig, num_classes: int, device: torch.device) -> Objective:
    """The loss a config asks for.

    Raises:
        ValueError: a teacher that is not there or does not fit.
    """
    teacher = None
    if config.distill_weight:
        teacher = load_teacher(config, teacher_path(config, BEST), num_classes, device)
    return Objective(
        label_smoothing=config.label_smoothing,
        teacher=teacher,
        distill_weight=config.distill_weight,
        distill_temperature=config.distill_temperature,
        dampening=config.dampening,
    )


def set_initial_thresholds(model: nn.Module, config: TrainConfig, batches: Batches, device: torch.device) -> None:
    """Set the thresholds as ``config.threshold_init`` says, on the first training batch of this process."""
    if config.threshold_init == "constant" or not any(True for _ in quant_layers(model)):
        return
    batches.set_epoch(0)
    with autocast(device, config.amp):
        initialize_thresholds(model, next(iter(batches.unmixed())).x, config.threshold_init)


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
    content = read_newest(path, log.warning)
    before = run_config(content, path).to_dict()
    now = config.to_dict()
    for name in sorted({*before, *now} - _FREE_TO_CHANGE):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"checkpoint {path}: was run with {name} = {before.get(name)!r}, not {now.get(name)!r}; "
                "give that value, or name another --output"
            )
    if before.get("epochs") != now.get("epochs") and (config.schedule != "step" or config.freeze_weights_from < 1):
        what = f"{config.schedule} schedule" if config.schedule != "step" else "freeze_weights_from"
        raise ValueError(
            f"checkpoint {path}: was run with epochs = {before['epochs']}, which its {what} depends on, "
            f"not {config.epochs}"
        )
    return content


def _restore(
    state: dict[str, Any], trackers: dict[str, Any], processes: Processes
) -> tuple[list[dict[str, Any]], Position | None]:
    average = trackers["average"]
    if average is not None:
        average.load_state_dict(state["state_dict"], state["average"]["steps"])
    load_weights(trackers["model"], state if average is None else state["average"]["trained"])
    now = environment(next(trackers["model"].parameters()).device)
    before = state.get("environment", {})
    if changed := [f"{name} {old} (now {now.get(name)})" for name, old in before.items() if now.get(name) != old]:
        log.warning("the run so far was computed with %s: its last bits may come out otherwise", ", ".join(changed))
    for name in ("optimizer", "schedule", "scaler"):
        trackers[name].load_state_dict(state[name])
    rng = state["rng"][processes.rank] if processes.rank < len(state["rng"]) else None
    if rng is not None:
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
    position = None
    if "positions" in state:
        if len(state["positions"]) != processes.world:
            raise ValueError(
                f"the checkpoint lies within an epoch of {len(state['positions'])} processes, this run has "
                f"{processes.world}: go on with as many"
            )
        position = Position(**state["positions"][processes.rank])
    return state["history"], position


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _tested(trackers: dict[str, Any]) -> nn.Module:
    model: nn.Module = trackers["average"].model if trackers["average"] else trackers["model"]
    return model


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
