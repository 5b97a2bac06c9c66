"""Optimiser steps, but none whose gradient is infinite or NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apot_fat.quant.watching import watch_outputs
from apot_fat.training.readback import CHECK_EVERY, LateRead

FP16_SEARCH = 32
"""Steps in a row that may overflow with fp16: each halves the loss's scale, 2^16 at first."""


class NonFiniteError(RuntimeError):
    """Training cannot go on: the gradient of a step is infinite or NaN."""


class FiniteGuard:
    """Makes the optimiser's steps and leaves out those whose gradient is not finite.

    Which those are the device decides. A GPU is asked every ``CHECK_EVERY`` steps, and waited for only before
    something is saved; so a run that cannot go on makes up to twice as many passes more. From the first step beyond
    those allowed on no step is made: the weights stay those that it met.

    Args:
        model: the network, or ``DistributedDataParallel`` around it.
        optimizer: with ``fused=True``; of another every step waits for the device.
        scaler: of the loss; enabled for fp16.
        allowed: steps in a row that may be left out, batch statistics and all. With fp16 ``FP16_SEARCH`` at least, but
            statistics stay: there it is mostly the scaled gradient that overflows.
        every: steps between two looks; by default 1 on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        allowed: int = 0,
        *,
        every: int | None = None,
    ) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self.parameters[0].device
        self.allowed = max(allowed, FP16_SEARCH) if scaler.is_enabled() else allowed
        self.every = every or (1 if device.type == "cpu" else CHECK_EVERY)
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()] if allowed else []
        self.kept = [buffer.clone() for buffer in self.buffers]
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        # steps left out so far, 1 once they were too many in a row, and of the last one left out number and loss
        self.found = torch.zeros(4, dtype=torch.float64, device=device)
        self.said = 0.0
        self.late = LateRead()

    @torch.no_grad()
    def step(self, number: int, loss: Tensor) -> Tensor:
        """Make a step, or leave it out; whether it was made, 0-d bool on the device.

        Args:
            number: of the batch that ends the step, from 0.
            loss: of that batch, 0-d.
        """
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        bad = ~torch.stack(torch._foreach_norm(grads)).isfinite().all()  # summed over processes already
        self.in_a_row = (self.in_a_row + 1) * bad
        left_out, stopped = self.found[:2].unbind()
        now = torch.stack([left_out + 1, (self.in_a_row > self.allowed).double(), _number(number, loss), loss.double()])
        self.found = torch.where(bad & (stopped == 0), now, self.found)
        made = ~bad & (stopped == 0)
        self._make(made, grads)
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(bad, kept, buffer))
            kept.copy_(buffer)
        return made

    def _make(self, made: Tensor, grads: list[Tensor]) -> None:
        if self.scaler.is_enabled():  # finds what is not finite itself, and shall find it where no step is to be made
            torch._foreach_mul_(grads, torch.where(made, 1.0, torch.nan))
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif all(group.get("fused") for group in self.optimizer.param_groups):
            self.optimizer.found_inf = (~made).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif made:
            self.optimizer.step()

    def look(self, epoch: int, number: int, x: Tensor, log: Callable[[str], None]) -> None:
        """After a step: every so often see what was left out.

        Args:
            epoch: its number.
            number: of the batch just done.
            x: the batch.
            log: told of steps left out.

        Raises:
            NonFiniteError: more steps in a row than allowed.
        """
        if (number + 1) % self.every == 0:
            self._act(self.late.exchange(self.found), epoch, number, x, log)

    def settle(self, epoch: int, number: int, x: Tensor, log: Callable[[str], None]) -> None:
        """``look``, at all steps made so far: before anything of them is saved."""
        self.late.forget()
        self._act(self.found.tolist(), epoch, number, x, log)

    def _act(self, found: list[float] | None, epoch: int, number: int, x: Tensor, log: Callable[[str], None]) -> None:
        if found is None:
            return
        left_out, stopped, last, loss = found
        what = f"epoch {epoch}, step {last:.0f}: gradient not finite"
        if stopped:
            raise NonFiniteError(
                f"{what}, loss {loss:.4g}{self._in_a_row()}; {_first_non_finite(self.model, x, later=last != number)}; "
                "the last checkpoint stands: lower lr or the threshold learning rates, or give --skip-nonfinite"
            )
        if left_out > self.said and not self.scaler.is_enabled():
            count = int(left_out - self.said)
            log(f"{what} (loss {loss:.4g}), " + ("step left out" if count == 1 else f"{count} steps left out by now"))
        self.said = left_out

    def _in_a_row(self) -> str:
        return f", {self.allowed + 1} steps in a row" if self.allowed else ""


def _number(number: int, like: Tensor) -> Tensor:
    return torch.full((), number, dtype=torch.float64, device=like.device)


@torch.no_grad()
def _first_non_finite(model: nn.Module, x: Tensor, *, later: bool) -> str:
    """Where in a network infinite or NaN values come up on a batch, the one that had them or a later one."""
    if not x.isfinite().all():
        return "the images are not finite"
    found: list[str] = []
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    names = {module: name for name, module in plain.named_modules() if not list(module.children())}

    def look(module: nn.Module, output: object) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            alphas = (
                ("weight", getattr(module, "weight_alpha", None)),
                ("activation", getattr(module, "act_alpha", None)),
            )
            said = [f", {side} alpha {alpha.mean().item():.4g}" for side, alpha in alphas if alpha is not None]
            found.append(names[module] + "".join(said))

    with torch.compiler.set_stance("force_eager"), watch_outputs(list(names), look):
        plain(x)
    if found:
        return f"the first layer whose output is not finite is {found[0]}"
    if later:
        return "with the same weights every layer's output is finite on a later batch"
    return "every layer's output is finite, the gradient alone is not"
