"""Runs of one or several processes as torchrun would start and end them, forked from a zygote."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120
GRACE_S = 30  # torchrun's, between SIGTERM and SIGKILL


class Launcher:
    """A zygote on a small disk of its own.

    Args:
        disk: an empty folder; where the system allows it the zygote sees there a file system of ``size`` bytes.
        size: of the disk.
    """

    def __init__(self, disk: Path, size: int = 256 << 20) -> None:
        ours, its = socket.socketpair()
        command = [sys.executable, "-m", "tests.faults.zygote", str(its.fileno())]
        mount = f'mount -t tmpfs -o size={size} tmpfs "{disk}"'
        # a name space of the user's needs no root
        inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        self.has_small_disk = not subprocess.run([*inside, mount], capture_output=True, check=False).returncode
        if self.has_small_disk:
            command = [*inside, f'{mount} && exec "$@"', "sh", *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.zygote = subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()], env=environment)
        its.close()
        self.channel = ours
        self.lines = ours.makefile("rb", buffering=0)
        self.disk = disk
        self.news: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.channel.close()
        self.zygote.wait(timeout=LIMIT_S)

    @property
    def seen_disk(self) -> Path:
        """The disk as this process sees it."""
        return Path(f"/proc/{self.zygote.pid}/root{self.disk}") if self.has_small_disk else self.disk

    def start(self, **request: Any) -> int:
        """The number of a new process, of which ``news`` tells from now on."""
        self.channel.sendall(json.dumps(request).encode() + b"\n")
        while True:
            if (pid := self._listen(LIMIT_S)) is not None:
                self.news[pid] = {}
                return pid

    def _listen(self, seconds: float) -> int | None:
        if not select.select([self.lines], [], [], seconds)[0]:
            return None
        line = self.lines.readline()
        assert line, "the zygote has ended"
        news = json.loads(line)
        if "started" in news:
            return int(news["started"])
        self.news.setdefault(news["pid"], {}).update(news)
        return None

    def listen(self, seconds: float) -> None:
        """Take what news there are; wait at most so long for them."""
        self._listen(seconds)
        while select.select([self.lines], [], [], 0)[0]:
            self._listen(0)


class Attempt:
    """A run's processes from their start until all have ended.

    Args:
        launcher: starts them.
        command: the script's name, and what follows it on the command line.
        processes: how many.
        log: file that takes what they print.
        watched, stop_at: the first process stands still before that operation on a file under the folder, from 1.
        has_workers: whether they have workers.
    """

    def __init__(
        self,
        launcher: Launcher,
        command: Sequence[str],
        processes: int,
        log: Path,
        *,
        watched: Path,
        stop_at: int = 0,
        has_workers: bool = False,
    ) -> None:
        self.launcher, self.log = launcher, log
        log.touch()
        environment: dict[str, str] = {}
        if processes > 1:  # as torchrun does it: the store is the launcher's
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.pids: list[int] = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            pid = launcher.start(
                script=command[0],
                argv=command[1:],
                environment={**environment, **ranks},
                log=str(log),
                watched="" if rank else str(watched),
                stop_at=stop_at,
                has_workers=has_workers,
            )
            self.pids.append(pid)
        self.start = time.monotonic()  # the first one has waited for the zygote's imports

    @property
    def codes(self) -> dict[int, int]:
        """Exit codes by rank of the processes that have ended; that of a signal's victim is below 0."""
        news = [self.launcher.news[pid] for pid in self.pids]
        return {rank: told["code"] for rank, told in enumerate(news) if "code" in told}

    @property
    def stands_still(self) -> bool:
        """Whether the first process waits before its operation."""
        return "stopped" in self.launcher.news[self.pids[0]]

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until something holds or all have ended; whether it holds.

        If one has failed the others get SIGTERM, and SIGKILL if they do not mind it.
        """
        failed_at = None
        while not (holds := until()) and len(self.codes) < len(self.pids):
            self.launcher.listen(0.01)
            if failed_at is None and any(self.codes.values()):
                failed_at = self.seconds
                self.send(signal.SIGTERM)
            if failed_at is not None and self.seconds > failed_at + GRACE_S:
                self.abort(f"processes outlived another by {GRACE_S} s")
            if self.seconds > LIMIT_S:
                self.abort(f"no end after {LIMIT_S} s")
        return holds

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to processes that live, by default to all."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ranks is None or rank in ranks):
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, number)

    def send_to_groups(self, number: signal.Signals) -> None:
        """Send a signal to all processes and their children."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)

    def abort(self, reason: str) -> None:
        """Fail, saying where the processes stand."""
        self.send(signal.SIGUSR1)
        time.sleep(1)
        self.send_to_groups(signal.SIGKILL)
        raise AssertionError(f"{reason}: exit codes {self.codes}\n{self.log.read_text()[-20000:]}")

    def check_nothing_is_left(self) -> None:
        """Fail if processes of theirs live on."""
        end = time.monotonic() + 30
        while left := [found for pid in self.pids for found in session(pid)]:
            if time.monotonic() > end:
                self.send_to_groups(signal.SIGKILL)
                raise AssertionError(f"processes left: {left}\n{self.log.read_text()[-20000:]}")
            time.sleep(0.01)

    def workers(self) -> list[int]:
        """Processes that decode images: the children of the fork servers."""
        found = [process for pid in self.pids for process in session(pid)]
        servers = {number for number, parent in found if parent in self.pids}
        return [number for number, parent in found if parent in servers]


def session(leader: int) -> list[tuple[int, int]]:
    """(Number, parent's number) of the living processes of a session."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, number = file.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if int(number) == leader and state != "Z":
            found.append((int(file.parent.name), int(parent)))
    return found
