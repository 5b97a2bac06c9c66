"""The optimiser's parameter groups and the learning rate over time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.convert.reconstruction import parameter_sizes
from apot_fat.quant.quantizer import PARAMETERS
from apot_fat.training.config import TrainConfig

log = logging.getLogger("apot_fat")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Groups for the optimiser, as published.

    With ``threshold_groups``: activation thresholds at ``act_alpha_lr``; weight thresholds and FAT's matrices at
    ``weight_alpha_lr``; both with ``alpha_weight_decay``. The rest, or everything without, at ``lr`` and
    ``weight_decay``.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``; empty ones are left out.
    """
    act_alphas: list[nn.Parameter] = []
    weight_alphas: list[nn.Parameter] = []
    if config.threshold_groups:
        for _, layer in threshold_layers(model):
            for name in PARAMETERS:
                if (parameter := getattr(layer, name)) is not None:
                    (act_alphas if name.startswith("act_") else weight_alphas).append(parameter)
    apart = {id(p) for p in (*act_alphas, *weight_alphas)}
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups: list[dict[str, object]] = [
        {"name": "weights", "params": rest, "lr": config.lr, "weight_decay": config.weight_decay},
        {"name": "act_alpha", "params": act_alphas, "lr": config.act_alpha_lr},
        {"name": "weight_alpha", "params": weight_alphas, "lr": config.weight_alpha_lr},
    ]
    for group in groups[1:]:
        group["weight_decay"] = config.alpha_weight_decay
    return [group for group in groups if group["params"]]


class RelativeAdamW(torch.optim.AdamW):
    """AdamW whose steps are relative to the size of each parameter as it was when ``take_sizes`` was called.

    Equation: θ ← θ + s (AdamW(θ) − θ), s = max(RMS(θ), 0.001) of then (``parameter_sizes``); 1 before. An Adam step of
    lr moves each by that share of its root mean square: one rate does for weights of 0.05, scales of 1 and thresholds
    of 3, as in reconstruction. All parameters of a group take one fused step: a group for each would take as long on a
    GPU's host as the network.

    Paper: Kingma, Ba, "Adam", ICLR 2015; Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    def __init__(self, groups: list[dict[str, object]], betas: tuple[float, float]) -> None:
        super().__init__(groups, betas=betas, fused=True)
        self.before = [p.detach().clone() for p in self._parameters()]

    def take_sizes(self) -> None:
        """Make steps relative to the parameters as they are now; a checkpoint of the optimiser keeps the sizes."""
        for group in self.param_groups:
            group["sizes"] = parameter_sizes(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters; what the closure gives, if there is one."""
        parameters = self._parameters()
        torch._foreach_copy_(self.before, parameters)
        loss = super().step(closure)
        sizes = [size for group in self.param_groups for size in group.get("sizes", [1.0] * len(group["params"]))]
        torch._foreach_lerp_(parameters, self.before, [1 - size for size in sizes])
        return loss

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or Adam over ``parameter_groups``, fused: a flag on the device can tell a step to do nothing.

    Adam's β are ``momentum`` and 0.999; weight decay is decoupled, lr · weight_decay a step.
    """
    groups = parameter_groups(model, config)
    if config.optimizer == "adam":
        return RelativeAdamW(groups, betas=(config.momentum, 0.999))
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, fused=True)
    if config.momentum:  # PyTorch would take uninitialised memory, and keep it if the first step is left out
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule to step after every optimiser step; all groups follow the same curve."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(config, step, steps_per_epoch))


def last_rates(schedule: torch.optim.lr_scheduler.LambdaLR) -> dict[str, float]:
    """The learning rate of each group, by its name, in the last step that was made."""
    groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    step = max(schedule.last_epoch - 1, 0)  # it stands at the step to come
    return {group["name"]: float(base) * factor(step) for group, base, factor in groups}


def say_unreached_steps(config: TrainConfig) -> None:
    """Say which steps of the learning rate lie behind the run's end, such as a recipe's in a shorter run."""
    counts = config.schedule == "step" and config.lr_unit == "epochs"
    if late := [str(step) for step in config.lr_steps if counts and step >= config.epochs]:
        log.info("lr_steps %s: not reached in %d epochs; --lr-steps sets others", ", ".join(late), config.epochs)


def lr_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """What the initial learning rates are multiplied by.

    Equation, T the run's steps, s the step from 0: ``step`` γ^(number of lr_steps ≤ s); ``cosine``
    (1 + cos(π s / T)) / 2; ``onecycle`` from 1/25 up to 1 at 0.3 T and down to 1e-4, both as half cosines. A warm-up
    multiplies by (s + 1) / warmup first. ``lr_steps`` and ``warmup`` count epochs or steps, as ``lr_unit`` says.

    Args:
        config: schedule and its fields.
        step: optimiser steps done, ≥ 0.
        steps_per_epoch: to count in epochs.
    """
    progress = min(step / (config.epochs * steps_per_epoch), 1.0)
    now = step if config.lr_unit == "steps" else step / steps_per_epoch
    if config.schedule == "step":
        factor = config.lr_gamma ** sum(now >= milestone for milestone in config.lr_steps)
    elif config.schedule == "cosine":
        factor = _half_cosine(1.0, 0.0, progress)
    elif progress < 0.3:
        factor = _half_cosine(1 / 25, 1.0, progress / 0.3)
    else:
        factor = _half_cosine(1.0, 1e-4, (progress - 0.3) / 0.7)
    warmup = config.warmup if config.lr_unit == "steps" else config.warmup * steps_per_epoch
    return factor * min((step + 1) / max(warmup, 1), 1.0)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
