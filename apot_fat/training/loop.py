"""One epoch of training, and evaluation. Logging, saving and the schedule of epochs belong to the caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from apot_fat.data.sharding import Batch, Batches
from apot_fat.training.distributed import sum_over_processes
from apot_fat.training.objective import Objective

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        self.total = self.steps = 0
        self.start = self.before = time.perf_counter()
        self.data_seconds = self.last_data_seconds = 0.0

    def data_ready(self) -> None:
        """Note that the batch is there."""
        self.last_data_seconds = time.perf_counter() - self.before
        self.data_seconds += self.last_data_seconds

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch and its mean loss; nothing is read back from the device."""
        self.last_count = len(labels)
        self.last_loss = loss.detach()
        self.last_correct = (logits.detach().argmax(1) == labels).sum()
        self.loss_sum += self.last_loss.float() * self.last_count
        self.correct += self.last_correct
        self.total += self.last_count
        self.steps += 1
        now = time.perf_counter()
        self.last_seconds, self.before = now - self.before, now

    def state(self) -> dict[str, float]:
        """What ``restore`` takes: plain numbers."""
        return {
            "loss_sum": self.loss_sum.item(),
            "correct": int(self.correct),
            "total": self.total,
            "steps": self.steps,
            "seconds": time.perf_counter() - self.start,
            "data_seconds": self.data_seconds,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Go on where another meter stood."""
        self.loss_sum.fill_(state["loss_sum"])
        self.correct.fill_(state["correct"])
        self.total, self.steps = int(state["total"]), int(state["steps"])
        self.data_seconds = state["data_seconds"]
        self.start = time.perf_counter() - state["seconds"]

    def line(self, head: str, *, with_data: bool) -> str:
        """The published line."""
        parts = [head, f"Time {self.last_seconds:.3f} ({(self.before - self.start) / self.steps:.3f})"]
        if with_data:
            parts.append(f"Data {self.last_data_seconds:.3f} ({self.data_seconds / self.steps:.3f})")
        precision = 100 * self.last_correct.item() / self.last_count
        parts.append(f"Loss {self.last_loss.item():.4f} ({self.loss_sum.item() / self.total:.4f})")
        parts.append(f"Prec {precision:.3f}% ({100 * self.correct.item() / self.total:.3f}%)")
        return "\t".join(parts)

    def result(self) -> Result:
        """The whole pass, over all processes."""
        sums = torch.stack(
            [self.loss_sum.double(), self.correct.double(), self.correct.new_tensor(self.total).double()]
        )
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
    skip_nonfinite: int = 0,
    log: Callable[[str], None] | None = None,
    print_freq: int = 100,
    epoch: int = 0,
    position: Position | None = None,
    after_step: Callable[[int, Meter], None] | None = None,
) -> Result:
    """One pass of SGD over the batches, a schedule step after each optimiser step.

    The gradient of a step is that of the objective over its images, however they are divided among accumulated batches
    and processes.

    Args:
        model: the network, or ``DistributedDataParallel`` around it.
        objective: the loss of a batch; by default its cross entropy.
        amp: ``off``, ``bf16`` or ``fp16`` (with an enabled ``scaler``).
        skip_nonfinite: steps in a row that may be left out, batch statistics and all, because their gradient is not
            finite. With fp16 a gradient that overflows its scale is the scaler's business, and only the loss counts.
        log: takes the published line every ``print_freq`` batches.
        epoch: its number, for the log.
        position: where the pass stands already; by default at its beginning.
        after_step: called after each optimiser step with the batches done so far; what it raises ends the pass.

    Raises:
        NonFiniteError: one more such step in a row.
    """
    model.train()
    objective = objective or Objective()
    device = next(model.parameters()).device
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    meter = Meter(device)
    optimizer.zero_grad(set_to_none=True)
    guard = _FiniteGuard(model, scaler, skip_nonfinite)
    if position is not None:
        meter.restore(position.meter)
    for index, batch in enumerate(_bar(batches, f"epoch {epoch}", show=log is not None)):
        if position is not None and index < position.batches:
            continue  # drawn all the same: the random numbers of later batches follow theirs
        meter.data_ready()
        with _no_sync(model, not batch.ends_step):
            with autocast(device, amp):
                loss, logits = objective(model, batch)
            scaler.scale(loss * (batch.share * world)).backward()  # DistributedDataParallel divides by world
        if not guard.accepts(loss, batch.ends_step):
            where = f"epoch {epoch}, step {index}"
            guard.tolerate(where, batch.x, loss)
            (log or _silent)(f"{where}: gradient not finite (loss {loss.item():.4g}), step left out")
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            continue
        if batch.ends_step:
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        meter.update(loss, logits, batch.labels)
        if log and index % print_freq == 0:
            log(meter.line(f"Epoch: [{epoch}][{index}/{batches.num_batches}]", with_data=True))
        if batch.ends_step and after_step is not None:
            after_step(index + 1, meter)
    return meter.result()


class NonFiniteError(RuntimeError):
    """Training cannot go on: the gradient of a step is infinite or NaN."""


class _FiniteGuard:
    """Looks at the gradient of every optimiser step, before the step is made."""

    def __init__(self, model: nn.Module, scaler: torch.amp.GradScaler, allowed: int) -> None:
        self.model, self.allowed, self.in_a_row = model, allowed, 0
        self.by_loss = scaler.is_enabled()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()] if allowed else []
        self.loss_is_finite = True
        self._remember()

    def accepts(self, loss: Tensor, ends_step: bool) -> bool:
        """Whether the step may be made; True too where none is due yet."""
        if self.by_loss:
            self.loss_is_finite = self.loss_is_finite and bool(loss.isfinite())
        if not ends_step:
            return True
        if self.by_loss:
            bad = sum_over_processes(torch.tensor(float(not self.loss_is_finite), device=loss.device))
            finite, self.loss_is_finite = not bad, True
        else:  # summed over processes already
            grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            finite = bool(torch.stack(torch._foreach_norm(grads)).isfinite().all()) if grads else True
        if finite:
            self.in_a_row = 0
            self._remember()
        return finite

    def tolerate(self, where: str, x: Tensor, loss: Tensor) -> None:
        """Undo what the step left in the network's statistics, or raise ``NonFiniteError``."""
        self.in_a_row += 1
        if self.in_a_row > self.allowed:
            raise NonFiniteError(
                f"{where}: gradient not finite, loss {loss.item():.4g}; {_first_non_finite(self.model, x)}; the last "
                "checkpoint stands: lower lr or the threshold learning rates, or give --skip-nonfinite"
            )
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)

    def _remember(self) -> None:
        self.kept = [buffer.clone() for buffer in self.buffers]


@torch.no_grad()
def _first_non_finite(model: nn.Module, x: Tensor) -> str:
    """Where in a network infinite or NaN values come up on a batch."""
    if not x.isfinite().all():
        return "the images are not finite"
    found: list[str] = []

    def note(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, _: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                alphas = (
                    ("weight", getattr(module, "weight_alpha", None)),
                    ("activation", getattr(module, "act_alpha", None)),
                )
                said = [f", {side} alpha {alpha.mean().item():.4g}" for side, alpha in alphas if alpha is not None]
                found.append(name + "".join(said))

        return hook

    plain = model.module if isinstance(model, DistributedDataParallel) else model
    leaves = [(name, module) for name, module in plain.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(note(name)) for name, module in leaves]
    try:
        with torch.compiler.set_stance("force_eager"):
            plain(x)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the first layer whose output is not finite is {found[0]}"
    return "every layer's output is finite, the gradient alone is not"


def _silent(_: str) -> None:
    pass


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    amp: str = "off",
    log: Callable[[str], None] | None = None,
    print_freq: int = 100,
    after_batch: Callable[[Tensor], None] | None = None,
) -> Result:
    """Loss and accuracy of a model in evaluation mode, each image counted once; the model's mode is restored.

    Args:
        model: the network itself, without ``DistributedDataParallel``: processes may see different numbers of batches.
        amp: ``off``, ``bf16`` or ``fp16``.
        log: takes the published line every ``print_freq`` batches.
        after_batch: called with the images of each; what it raises ends the pass.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    meter = Meter(device)
    for index, batch in enumerate(_bar(batches, "test", show=log is not None)):
        with autocast(device, amp):
            logits = model(batch.x)
            loss = F.cross_entropy(logits, batch.labels)
        meter.update(loss, logits, batch.labels)
        if log and index % print_freq == 0:
            log(meter.line(f"Test: [{index}/{batches.num_batches}]", with_data=False))
        if after_batch is not None:
            after_batch(batch.x)
    model.train(was_training)
    return meter.result()


def _no_sync(model: nn.Module, active: bool) -> AbstractContextManager[object]:
    # gradients are summed over processes once a step, after the last of its accumulated batches
    return model.no_sync() if active and isinstance(model, DistributedDataParallel) else nullcontext()


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """The mixed precision of ``off``, ``bf16`` or ``fp16``."""
    dtype = AMP_DTYPES[amp]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _bar(batches: Batches, label: str, *, show: bool) -> Iterator[Batch]:
    # in images, so that it says images/s and the time left; none where the output is not a terminal (disable=None)
    disable = None if show else True
    with tqdm(total=batches.num_images, desc=label, unit="img", leave=False, disable=disable) as bar:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        for batch in batches:
            yield batch
            bar.update(len(batch.labels) * world)
