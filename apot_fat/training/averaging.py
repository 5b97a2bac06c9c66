"""An exponential moving average of the weights, which is what is tested and kept."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from apot_fat.checkpoint import load_weights


class WeightAverage:
    """A copy of a network whose parameters follow its own, thresholds and FAT's matrices included.

    Equation: after the first optimiser step w̄ = w, after each further w̄ ← d · w̄ + (1 − d) · w. Quantized are the
    averages, not averaged the quantized. The averages have activations of other statistics than any of the networks
    they come from: ``follow_buffers``, then ``estimate_batch_norm`` gives it its own.

    Args:
        model: the network, on its device and without wrappers.
        decay: d, (0, 1); the average reaches back about 1 / (1 − d) steps.
        optimizer: after each of its steps the average is updated; steps that are left out do not count.

    Paper: Polyak, Juditsky, 1992; batch norm as in Izmailov et al., "Averaging Weights Leads to Wider Optima", 2018.
    """

    def __init__(self, model: nn.Module, decay: float, optimizer: torch.optim.Optimizer) -> None:
        self.trained, self.decay = model, decay
        self.model = deepcopy(model).requires_grad_(False)
        """The averaged network."""
        self.count = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        optimizer.register_step_post_hook(self._follow)

    @torch.no_grad()
    def _follow(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # on the device alone: whether a step was left out only that knows
        left_out = getattr(optimizer, "found_inf", None)
        made = torch.ones_like(self.count) if left_out is None else (left_out == 0).long()
        self.count += made
        keep = torch.where(made == 0, 1.0, torch.where(self.count == 1, 0.0, self.decay))
        averages: list[Tensor] = list(self.model.parameters())
        parameters: list[Tensor] = list(self.trained.parameters())
        torch._foreach_mul_(averages, keep)
        torch._foreach_add_(averages, list(torch._foreach_mul(parameters, 1 - keep)))

    def follow_buffers(self) -> None:
        """Take the buffers that the network has now; its batch statistics are not the averaged network's."""
        for own, trained in zip(self.model.buffers(), self.trained.buffers(), strict=True):
            own.copy_(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """The average's weights, under the network's own names."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], steps: int) -> None:
        """Go on from an average of so many steps."""
        load_weights(self.model, state)
        self.count.fill_(steps)

    @property
    def steps(self) -> int:
        """Optimiser steps averaged so far."""
        return int(self.count)
