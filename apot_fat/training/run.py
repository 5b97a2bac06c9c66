"""A training run: one network at one bit-width, from its config to its folder."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apot_fat.data import Batches, Dataset, Sharding
from apot_fat.data.sharding import mix_seed
from apot_fat.quant.all_layers import clipping_table, keep_thresholds_positive
from apot_fat.quant.diagnosis import odd_layers
from apot_fat.training.averaging import WeightAverage
from apot_fat.training.batch_norm import check_batch_norm, estimate_batch_norm
from apot_fat.training.build import (
    image_shape,
    load_config_dataset,
    make_batches,
    make_objective,
    sample_images,
    seed_everything,
)
from apot_fat.training.compile import BatchKind, choose_kernels, compile_network
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device, set_numerics
from apot_fat.training.distributed import (
    Processes,
    launched,
    process_group,
    share_buffers,
    synchronize_batch_norm,
    wrap,
)
from apot_fat.training.finite import FiniteGuard
from apot_fat.training.folder import Records, RunSummary, StepSaver, run_config, summary_of
from apot_fat.training.interruption import SignalWatch
from apot_fat.training.loop import Position, Result, autocast, evaluate, train_epoch
from apot_fat.training.network import check_images, create_network
from apot_fat.training.objective import Objective
from apot_fat.training.optim import RelativeAdamW, last_rates, make_optimizer, make_schedule, say_unreached_steps
from apot_fat.training.resume import checked_sources, keep_best, resumed_content
from apot_fat.training.start import load_initial_weights, reconstruct_start, set_initial_thresholds
from apot_fat.training.state import TrainState

log = logging.getLogger("apot_fat")


def train(config: TrainConfig, *, resume: str | None = None, dataset: Dataset | None = None) -> RunSummary:
    """Train one network at one bit-width and leave the run folder ``output/<arch>_<bits>bit``.

    Under torchrun all processes train it together and the first writes the files. Every epoch is tested; the best is
    the one with the highest test accuracy, as published, or with ``val_split`` on the held-out training images.

    Args:
        config: the run.
        resume: ``auto`` to go on where the folder's last checkpoint stands (or start, if there is none), or the path
            of a checkpoint of the same run; None to start.
        dataset: already loaded images; by default those the config names, as its checkpoints go on saying.

    Raises:
        ValueError: anything in the config, the data or a checkpoint that does not fit, before any file is written; a
            folder that holds a run already, without ``resume``.
        NonFiniteError: the gradient became infinite or NaN; the last checkpoint stands.
        InterruptedRunError: SIGINT or SIGTERM came; the run was saved after the step under way.
    """
    processes = launched()
    device = choose_device(config.device, config.gpu, processes.local_rank)
    set_numerics(config.numerics, device)
    choose_kernels(config.compile)
    sharding = Sharding(processes.rank, processes.world, config.accumulate)
    sharding.check(config.batch_size)
    if config.sync_bn and config.compile == "model" and processes.is_distributed:
        raise ValueError("compile 'model': no graph holds sync_bn's sums over processes; choose auto or quantizers")
    say_unreached_steps(config)
    folder = Path(config.output) / config.run_name
    before = resumed_content(config, resume)
    if before is not None:
        config = config.normalized_as(run_config(before, folder))
    with process_group(processes, device, config.dist_timeout):
        return _train(config, resume, dataset, before, processes, device, sharding)


def _train(
    config: TrainConfig,
    resume: str | None,
    dataset: Dataset | None,
    before: dict[str, Any] | None,
    processes: Processes,
    device: torch.device,
    sharding: Sharding,
) -> RunSummary:
    # a function, so that nothing of it is left when its process group ends
    folder = Path(config.output) / config.run_name
    dataset = dataset or load_config_dataset(config)
    if dataset.train is None or (config.val_split and dataset.val is None):
        what = "training images" if dataset.train is None else f"held-out images, val_split is {config.val_split}"
        raise ValueError(f"{dataset.name}: the given images have no {what}; load_config_dataset(config) has")
    shape = image_shape(config, dataset.test)
    about = {
        "image_shape": shape,
        "sources": checked_sources(before, config, dataset),
    }
    seed_everything(config.seed)
    since = time.perf_counter()
    sets = _make_sets(config, dataset, device, sharding)
    classes, is_new = len(dataset.classes), before is None
    state = _make_state(config, classes, shape, sets.train.steps, device, processes, is_new=is_new)
    check_batch_norm(state.model, config, sets.train.num_images, sharding, sets.sample[:1])
    if processes.rank:  # dropout of its own; the network is the first process's
        torch.manual_seed(mix_seed(config.seed, processes.rank))
    objective = make_objective(config, classes, device)
    history, position = ([], None) if before is None else state.restore(before, processes)
    if position is not None:
        since -= position.meter["seconds"]
    again = state.tested if position is None else None
    with (
        Records(folder, config, processes, history, about, sets.sample, again) as records,
        SignalWatch(log.warning) as watch,
    ):
        log.info(
            "%s: %s, %s at %d bits on %s, %s", folder, config.arch, config.preset, config.bit, dataset.name, device
        )
        if processes.is_distributed:
            log.info("%d processes, %d images a step", processes.world, config.batch_size)
        if processes.is_first:
            keep_best(folder, resume, history)
        if before is None:
            set_initial_thresholds(state.model, config, sets.train, device)
            assert dataset.train is not None
            if processes.is_first:  # the others take its parameters
                reconstruct_start(state.model, config, dataset.train, classes, device)
        epochs = _Epochs(config, processes, device, sets, state, objective)
        if before is None and isinstance(state.optimizer, RelativeAdamW):
            state.optimizer.take_sizes()
        for epoch in range(len(history), config.epochs):
            saver = StepSaver(records, state, history, watch, config.checkpoint_every)
            row = epochs.run(epoch, saver, position)
            now = time.perf_counter()
            history.append({**row, "seconds": now - since})
            since, position = now, None
            records.save(state, history)
            saver.stop_if_asked()
    return summary_of(folder, config, history)


class _Sets(NamedTuple):
    train: Batches
    test: Batches
    val: Batches | None
    sample: Tensor

    def batches(self, epochs: int) -> Counter[BatchKind]:
        """How many of each kind this process sees in so many epochs."""
        kinds: Counter[BatchKind] = Counter()
        for training, batches in ((True, self.train), (False, self.test), (False, self.val)):
            if batches is not None:
                kinds.update({(training, size): epochs * count for size, count in batches.sizes.items()})
        return kinds


def _make_sets(config: TrainConfig, dataset: Dataset, device: torch.device, sharding: Sharding) -> _Sets:
    assert dataset.train is not None
    train_batches = make_batches(config, dataset.train, device, sharding, training=True)
    if not train_batches.steps:
        raise ValueError(f"{dataset.name}: {len(dataset.train)} training images do not fill one batch")
    test_batches = make_batches(config, dataset.test, device, sharding)
    val_batches = None if dataset.val is None else make_batches(config, dataset.val, device, sharding)
    return _Sets(train_batches, test_batches, val_batches, sample_images(config, dataset.test, device))


def _make_state(
    config: TrainConfig,
    num_classes: int,
    shape: tuple[int, int, int],
    steps: int,
    device: torch.device,
    processes: Processes,
    *,
    is_new: bool,
) -> TrainState:
    # steps are those of an epoch
    model = create_network(config, num_classes)
    if is_new:
        load_initial_weights(model, config)
        check_images(f"arch {config.arch}", model, torch.zeros(1, *shape))  # small ones end before the network does
    if config.sync_bn and processes.is_distributed:
        model = synchronize_batch_norm(model, device)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    average = WeightAverage(model, config.ema_decay, optimizer) if config.ema_decay else None
    return TrainState(model, optimizer, schedule, scaler, average)


class _Epochs:
    """Trains and tests, an epoch at a time; made within the process group."""

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        device: torch.device,
        sets: _Sets,
        state: TrainState,
        objective: Objective,
    ) -> None:
        self.config, self.processes, self.device = config, processes, device
        self.sets, self.state, self.objective = sets, state, objective
        # gradients of several batches are added up in memory that a CUDA graph would write to again
        compiled = partial(
            compile_network,
            mode=config.compile,
            device=device,
            cuda_graphs=config.accumulate == 1,
            batches={} if config.sync_bn and processes.is_distributed else sets.batches(config.epochs),
        )
        network = compiled(state.model)
        self.tested = compiled(state.tested) if state.average else network
        self.trained = wrap(network, processes, device)  # every process takes the first one's parameters
        if objective.teacher is not None and network is not state.model:
            seen = {(False, size): config.epochs * count for size, count in sets.train.sizes.items()}
            # no CUDA graphs: its logits are needed behind the network's own call
            objective.teacher = compile_network(objective.teacher, "model", device, cuda_graphs=False, batches=seen)
        self.guard = FiniteGuard(self.trained, state.optimizer, state.scaler, config.skip_nonfinite)
        self.warned: set[str] = set()

    def run(self, epoch: int, saver: StepSaver, position: Position | None) -> dict[str, Any]:
        """One epoch, from 0, or what is left of it behind a position; its metrics."""
        config, state = self.config, self.state
        say = log.info if self.processes.is_first else None
        self.sets.train.set_epoch(epoch)
        trained = train_epoch(
            self.trained,
            self.sets.train,
            state.optimizer,
            state.schedule,
            state.scaler,
            objective=self.objective,
            amp=config.amp,
            guard=self.guard,
            log=say,
            print_freq=config.print_freq,
            epoch=epoch,
            position=position,
            after_step=saver.after_step,
        )
        share_buffers(state.model)
        keep_thresholds_positive(state.model)
        self.estimate_batch_norm(epoch)
        tests = partial(evaluate, self.tested, after_batch=saver.after_test_batch)  # in float32, as what is shipped
        tested = tests(self.sets.test, log=say, print_freq=config.print_freq)
        held_out = None if self.sets.val is None else tests(self.sets.val)
        log.info(" * Prec %.3f%%", tested.top1)
        if self.processes.is_first:  # it alone logs
            self.warn(epoch, odd_layers(state.tested, self.sets.sample))
        return _metrics(epoch, state, trained, tested, held_out)

    def estimate_batch_norm(self, epoch: int) -> None:
        """Give the tested network batch statistics of its own: an average in each epoch, any at the end if asked."""
        config, state, count = self.config, self.state, 0
        if state.average is not None:
            state.average.follow_buffers()
            count = config.bn_batches
        if epoch == config.epochs - 1:
            count = config.final_bn_batches or count
        if count:
            with autocast(self.device, config.amp):
                estimate_batch_norm(state.tested, self.sets.train, count, epoch=epoch, inputs=self.objective.inputs)

    def warn(self, epoch: int, sentences: list[str]) -> None:
        """Say each sentence once a run."""
        for sentence in sentences:
            if sentence not in self.warned:
                self.warned.add(sentence)
                log.warning("epoch %d: %s", epoch, sentence)


def _metrics(epoch: int, state: TrainState, trained: Result, tested: Result, held_out: Result | None) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": epoch + 1}
    for name, result in (("train", trained), ("test", tested), ("val", held_out)):
        if result is not None:
            row |= {f"{name}_loss": result.loss, f"{name}_top1": result.top1}
    row["lr"] = last_rates(state.schedule)
    row["layers"] = {layer.name: asdict(layer) for layer in clipping_table(state.tested)}
    return row
