"""The process that the processes of runs are forked from: with everything imported they start within milliseconds.

It takes lines of JSON from a socket, each one a process to start, and tells of each that it started, stopped or ended.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver, util
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.figure  # noqa: F401 (what a run imports on its way, is imported here)
import torch.utils.tensorboard  # noqa: F401
from torch.utils.tensorboard.summary import hparams  # noqa: F401

from apot_fat.command_line import run_main
from tests.faults.networks import small_network

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
Main = Callable[[list[str] | None], None]
ENDING_A_RUN = (signal.SIGINT, signal.SIGTERM)
_FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod"}


def serve(channel: socket.socket) -> dict[str, Any]:
    """Start processes until the channel closes; in each of them, what was asked for is returned."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    requests = channel.makefile("rb", buffering=0)

    def tell(**news: Any) -> None:
        channel.sendall(json.dumps(news).encode() + b"\n")

    while True:
        ready, _, _ = select.select([channel.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 16)
            while (news := _next_news()) is not None:
                tell(pid=news[0], **news[1])
        if channel.fileno() in ready:
            line = requests.readline()
            if not line:
                os._exit(0)
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for file in (requests, channel):
                    file.close()
                os.close(woken)
                os.close(wake)
                return dict(json.loads(line))
            tell(started=pid)


def _next_news() -> tuple[int, dict[str, Any]] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
    except ChildProcessError:
        return None
    if not pid:
        return None
    return pid, {"stopped": True} if os.WIFSTOPPED(status) else {"code": os.waitstatus_to_exitcode(status)}


def load_main(script: Path) -> Main:
    """The ``main`` of a script."""
    main: Main = runpy.run_path(str(script))["main"]
    return main


def become(request: dict[str, Any], mains: dict[str, Main]) -> Main:
    """Become the process of a run; what it calls with the request's arguments."""
    assert len(os.listdir("/proc/self/task")) == 1  # a fork keeps one thread, and the locks of all
    os.setsid()
    os.environ.update(request["environment"])
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target in (1, 2):
        os.dup2(output, target)
    os.close(output)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.argv = [f"{request['script']}.py", *request["argv"]]
    if request["has_workers"] and sys.version_info < (3, 14):  # from then on it takes a key, and seconds
        _fork_the_fork_server()
    if request["watched"]:
        _watch(request["watched"], request["stop_at"])

    def main(argv: list[str] | None) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_A_RUN)
        with small_network():
            mains[request["script"]](argv)

    return main


def _fork_the_fork_server() -> None:
    # as multiprocessing starts it, and start_fork_server has it started, but forked: its imports take seconds
    server: Any = forkserver._forkserver
    address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    if not util.is_abstract_socket_namespace(address):
        os.chmod(address, 0o600)
    listener.listen()
    alive, server._forkserver_alive_fd = os.pipe()
    if not (pid := os.fork()):
        os.close(server._forkserver_alive_fd)
        forkserver.main(listener.detach(), alive, [])
        os._exit(0)
    listener.close()
    os.close(alive)
    server._forkserver_address, server._forkserver_pid = address, pid


def _watch(folder: str, stop_at: int) -> None:
    # stands still before a given operation on a file under the folder, and says at the end how many there were
    seen = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _FILE_EVENTS and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == stop_at:
                os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(look)
    if not stop_at:
        atexit.register(lambda: print(f"{seen} operations on files", flush=True))


def run(request: dict[str, Any], mains: dict[str, Main]) -> NoReturn:
    """Be the process of a run, and end as an interpreter does but for taking its modules apart, which takes seconds."""
    try:
        run_main(become(request, mains), request["argv"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for number in ENDING_A_RUN:  # what they do to an interpreter at its end is Python's affair
        signal.signal(number, signal.SIG_IGN)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(int(code or 0))


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_A_RUN)  # a process takes them once it runs a script
    loaded = {script.stem: load_main(script) for script in (SCRIPTS / "train.py", SCRIPTS / "progressive.py")}
    run(serve(socket.socket(fileno=int(sys.argv[1]))), loaded)
