"""One epoch of training, and evaluation. Logging, saving and the schedule of epochs belong to the caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from apot_fat.data.sharding import Batch, Batches, batches_since
from apot_fat.training.device import amp_dtype, float32_products
from apot_fat.training.distributed import sum_over_processes
from apot_fat.training.finite import FiniteGuard
from apot_fat.training.objective import Objective


@dataclass(frozen=True)
class Result:
    """What one pass over a set of images gave.

    Args:
        loss: mean over the images, nats: the objective in training, the cross entropy in evaluation.
        correct: images whose largest logit is their class.
        total: images.
        seconds: wall time.
    """

    loss: float
    correct: int
    total: int
    seconds: float

    @property
    def top1(self) -> float:
        """Accuracy, %."""
        return 100 * self.correct / self.total


class Meter:
    """The published log line: value of the last step and mean so far of time, loss and precision."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = 0
        self.start = self.before = time.perf_counter()
        self.data_seconds = self.last_data_seconds = 0.0

    def data_ready(self) -> None:
        """Note that the batch is there."""
        self.last_data_seconds = time.perf_counter() - self.before
        self.data_seconds += self.last_data_seconds

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> None:
        """Add a batch and its mean loss, unless ``counts`` (0-d bool) says no; nothing is read back from the device."""
        self.last_count = len(labels)
        self.last_loss = loss.detach()
        self.last_correct = (logits.detach().argmax(1) == labels).sum()
        added = self.last_loss.float() * self.last_count, self.last_correct, torch.full_like(self.total, len(labels))
        for total, value in zip((self.loss_sum, self.correct, self.total), added, strict=True):
            total += value if counts is None else torch.where(counts, value, 0)
        self.steps += 1
        now = time.perf_counter()
        self.last_seconds, self.before = now - self.before, now

    def state(self) -> dict[str, float]:
        """What ``restore`` takes: plain numbers."""
        return {
            "loss_sum": self.loss_sum.item(),
            "correct": int(self.correct),
            "total": int(self.total),
            "steps": self.steps,
            "seconds": time.perf_counter() - self.start,
            "data_seconds": self.data_seconds,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Go on where another meter stood."""
        self.loss_sum.fill_(state["loss_sum"])
        self.correct.fill_(state["correct"])
        self.total.fill_(state["total"])
        self.steps = int(state["steps"])
        self.data_seconds = state["data_seconds"]
        self.start = time.perf_counter() - state["seconds"]

    def line(self, head: str, *, with_data: bool) -> str:
        """The published line."""
        parts = [head, f"Time {self.last_seconds:.3f} ({(self.before - self.start) / self.steps:.3f})"]
        if with_data:
            parts.append(f"Data {self.last_data_seconds:.3f} ({self.data_seconds / self.steps:.3f})")
        precision = 100 * self.last_correct.item() / self.last_count
        total = max(int(self.total), 1)
        parts.append(f"Loss {self.last_loss.item():.4f} ({self.loss_sum.item() / total:.4f})")
        parts.append(f"Prec {precision:.3f}% ({100 * self.correct.item() / total:.3f}%)")
        return "\t".join(parts)

    def result(self) -> Result:
        """The whole pass, over all processes."""
        sums = torch.stack([self.loss_sum.double(), self.correct.double(), self.total.double()])
        loss_sum, correct, total = sum_over_processes(sums).tolist()
        # a total of 0: every step was left out
        return Result(loss_sum / max(total, 1), int(correct), max(int(total), 1), time.perf_counter() - self.start)


class Position(NamedTuple):
    """Where a pass of training stands: batches done by this process, and the state of its meter."""

    batches: int
    meter: dict[str, float]


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    *,
    objective: Objective | None = None,
    amp: str = "off",
    guard: FiniteGuard | None = None,
    log: Callable[[str], None] | None = None,
    print_freq: int = 100,
    epoch: int = 0,
    position: Position | None = None,
    after_step: Callable[[int, Callable[[], Position]], None] | None = None,
) -> Result:
    """One pass of SGD over the batches, a schedule step after each optimiser step.

    The gradient of a step is that of the objective over its images, however they are divided among accumulated batches
    and processes. Between two log lines nothing waits for the device.

    Args:
        model: the network, or ``DistributedDataParallel`` around it.
        objective: the loss of a batch; by default its cross entropy.
        amp: ``off``, ``auto``, ``bf16`` or ``fp16`` (with an enabled ``scaler``).
        guard: of the same model, optimiser and scaler; by default no step may be left out.
        log: takes the published line every ``print_freq`` batches.
        epoch: its number, for the log.
        position: where the pass stands already; by default at its beginning.
        after_step: called after each optimiser step with the batches done so far and a function that tells where the
            pass stands, once it has made sure that every step so far was finite; what it raises ends the pass.

    Raises:
        NonFiniteError: a gradient that is infinite or NaN, see ``FiniteGuard``.
    """
    model.train()
    objective = objective or Objective()
    device = next(model.parameters()).device
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    meter = Meter(device)
    guard = guard or FiniteGuard(model, optimizer, scaler)
    say: Callable[[str], None] = log or _silent
    settle: Callable[[], None] = _nothing
    optimizer.zero_grad(set_to_none=True)
    start = 0
    if position is not None:
        meter.restore(position.meter)
        start = position.batches
    for index, batch in enumerate(_bar(batches, f"epoch {epoch}", show=log is not None, start=start), start):
        meter.data_ready()
        with _no_sync(model, not batch.ends_step):
            with autocast(device, amp):
                loss, logits = objective(model, batch)
            scaler.scale(loss * (batch.share * world)).backward()  # DistributedDataParallel divides by world
        if batch.ends_step:
            counts = guard.step(index, loss)
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            counts = loss.isfinite()
        meter.update(loss, logits, batch.labels, counts)
        settle = partial(guard.settle, epoch, index, batch.x, say)
        if log and index % print_freq == 0:
            settle()
            log(meter.line(f"Epoch: [{epoch}][{index}/{batches.num_batches}]", with_data=True))
        if batch.ends_step:
            guard.look(epoch, index, batch.x, say)
            if after_step is not None:
                after_step(index + 1, partial(_position, index + 1, meter, settle))
    settle()
    return meter.result()


def _position(batches: int, meter: Meter, settle: Callable[[], None]) -> Position:
    settle()
    return Position(batches, meter.state())


def _silent(_: str) -> None:
    pass


def _nothing() -> None:
    pass


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    amp: str = "off",
    log: Callable[[str], None] | None = None,
    print_freq: int = 100,
    after_batch: Callable[[], None] | None = None,
) -> Result:
    """Loss and accuracy of a model in evaluation mode, each image counted once; the model's mode is restored.

    On CUDA without TF32, whatever ``set_numerics`` chose: the result is the CPU's but for what float32's own rounding
    moves.

    Args:
        model: the network itself, without ``DistributedDataParallel``: processes may see different numbers of batches.
        amp: ``off``, or the mixed precision to evaluate in: ``auto``, ``bf16`` or ``fp16``.
        log: takes the published line every ``print_freq`` batches.
        after_batch: called after each; what it raises ends the pass.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    meter = Meter(device)
    for index, batch in enumerate(_bar(batches, "test", show=log is not None)):
        with float32_products(device), autocast(device, amp):
            logits = model(batch.x)
            loss = F.cross_entropy(logits, batch.labels)
        meter.update(loss, logits, batch.labels)
        if log and index % print_freq == 0:
            log(meter.line(f"Test: [{index}/{batches.num_batches}]", with_data=False))
        if after_batch is not None:
            after_batch()
    model.train(was_training)
    return meter.result()


def _no_sync(model: nn.Module, active: bool) -> AbstractContextManager[object]:
    # gradients are summed over processes once a step, after the last of its accumulated batches
    return model.no_sync() if active and isinstance(model, DistributedDataParallel) else nullcontext()


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """The mixed precision of ``off``, ``auto``, ``bf16`` or ``fp16``."""
    dtype = amp_dtype(amp, device)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _bar(batches: Batches, label: str, *, show: bool, start: int = 0) -> Iterator[Batch]:
    # in images, so that it says images/s and the time left; none where the output is not a terminal (disable=None)
    disable = None if show else True
    total = batches.num_images
    done = total * start // max(batches.num_batches, 1)
    with tqdm(total=total, initial=done, desc=label, unit="img", leave=False, disable=disable) as bar:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        for batch in batches_since(batches, start):
            yield batch
            bar.update(len(batch.labels) * world)
