"""Reading a few numbers of a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

CHECK_EVERY = 10
"""Steps between looks at what a device or the other processes found: a run answers within twice as many."""


class LateRead:
    """What is put in comes out at the next exchange: by then a GPU has long computed it, and nobody waits.

    On a CPU it comes out at once.
    """

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, torch.cuda.Event] | None = None

    def exchange(self, values: Tensor) -> list[float] | None:
        """Put in the values of a 1-d tensor; those put in before come out, or None the first time."""
        if values.device.type != "cuda":
            return values.tolist()
        before, self._waiting = self._waiting, _start_copy(values)
        if before is None:
            return None
        numbers, copied = before
        copied.synchronize()
        return numbers.tolist()

    def forget(self) -> None:
        """Drop what was put in last."""
        self._waiting = None


def _start_copy(values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    # only into pinned memory does a copy go on by itself
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))  # which may not be the current device
    return host, copied
