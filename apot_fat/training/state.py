"""What a run changes, and its checkpoints therefore hold."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apot_fat.checkpoint import load_weights
from apot_fat.text import one_line
from apot_fat.training.averaging import WeightAverage
from apot_fat.training.distributed import Processes
from apot_fat.training.environment import environment
from apot_fat.training.loop import Position

log = logging.getLogger("apot_fat")


@dataclass(frozen=True)
class TrainState:
    """The objects of a run that change with its steps.

    Args:
        model: the network, on its device and without wrappers.
        optimizer, schedule, scaler: what its steps take.
        average: of its weights, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    average: WeightAverage | None

    @property
    def tested(self) -> nn.Module:
        """The network that is evaluated and kept: the average, if there is one."""
        return self.average.model if self.average else self.model

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def content(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        content = {
            "state_dict": self.tested.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "environment": environment(self.device),
        }
        if self.average:
            content["average"] = {"trained": self.model.state_dict(), "steps": self.average.steps}
        return content

    def restore(self, content: dict[str, Any], processes: Processes) -> tuple[list[dict[str, Any]], Position | None]:
        """Go on from a checkpoint, the random numbers of this process included.

        Args:
            content: the checkpoint.
            processes: those of this run.

        Returns:
            One row an epoch so far, and where within an epoch the checkpoint lies; None at its end.

        Raises:
            ValueError: it lies within an epoch of another number of processes, or does not hold what a run's does.
        """
        try:
            return self._restore(content, processes)
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the checkpoint is not one of such a run, or damaged ({one_line(error)})") from error

    def _restore(self, content: dict[str, Any], processes: Processes) -> tuple[list[dict[str, Any]], Position | None]:
        if self.average is not None:
            self.average.load_state_dict(content["state_dict"], content["average"]["steps"])
        load_weights(self.model, content if self.average is None else content["average"]["trained"])
        _warn_of_changes(content.get("environment", {}), environment(self.device))
        self.optimizer.load_state_dict(content["optimizer"])
        for group in self.optimizer.param_groups:  # a run of before may have stepped otherwise
            group["fused"] = True
        self.schedule.load_state_dict(content["schedule"])
        self.scaler.load_state_dict(content["scaler"])
        if processes.rank < len(content["rng"]):
            rng = content["rng"][processes.rank]
            torch.set_rng_state(rng["cpu"])
            if self.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.device)
        if "positions" not in content:
            return content["history"], None
        positions = content["positions"]
        if len(positions) != processes.world:
            raise ValueError(
                f"the checkpoint lies within an epoch of {len(positions)} processes, this run has {processes.world}: "
                "go on with as many"
            )
        return content["history"], Position(**positions[processes.rank])


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The random numbers of this process, those of its GPU included."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _warn_of_changes(before: dict[str, str], now: dict[str, str]) -> None:
    if changed := [f"{name} {old} (now {now.get(name)})" for name, old in before.items() if now.get(name) != old]:
        log.warning("the run so far was computed with %s: its last bits may come out otherwise", ", ".join(changed))
