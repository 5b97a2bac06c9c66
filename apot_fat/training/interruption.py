"""Signals that end a run: the step under way is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_WATCHED = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(Exception):
    """A run ended by a signal, saved as far as it went.

    Args:
        signum: the signal's number.
        saved: what to tell the user.
    """

    def __init__(self, signum: int, saved: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {saved}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What shells expect of a process ended by the signal: 128 + its number."""
        return 128 + self.signum


class SignalWatch:
    """Notes SIGINT and SIGTERM while it is open instead of dying of them; a second SIGINT interrupts at once.

    ``received`` is the number of the first signal, or None. Outside the main thread it notes nothing.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.received: int | None = None
        self.notice = notice
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            self.notice(f"{signal.Signals(number).name}: finishing this step, then saving")
