"""Processes that decode images: deaf to the signals that end a run, and gone when it has ended."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import connection, forkserver, resource_tracker

_ENDING_A_RUN = (signal.SIGINT, signal.SIGTERM)


def start_fork_server() -> None:
    """Start the process that workers are forked from, where it does not run yet.

    Ctrl-C reaches the whole process group, and workers must go on until the run has saved. The server gets the signals
    blocked, and the workers from it: they are deaf to them from their first moment, seconds before ``begin_worker``.
    """
    forkserver.set_forkserver_preload(["__main__", "apot_fat.data.stream", "torchvision.transforms.v2"])  # once for all
    resource_tracker.ensure_running()  # starting it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_A_RUN)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> Callable[[int], None]:
    """What a worker calls first: it ignores the signals that end a run, and ends with this process."""
    return partial(_begin, _lifeline())


@cache
def _lifeline() -> connection.Connection:
    # Closed by this process's exit or death. PyTorch's watch is on the fork server, which lives as long as any worker:
    # together they would outlive the run. And multiprocessing, at exit, waits for workers, whom its SIGTERM spares.
    reader, writer = multiprocessing.Pipe(duplex=False)
    atexit.register(writer.close)
    return reader


def _begin(lifeline: connection.Connection, _: int) -> None:
    for number in _ENDING_A_RUN:  # the server may have been another's, with nothing blocked
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: connection.Connection) -> None:
    connection.wait([lifeline])
    os._exit(1)
