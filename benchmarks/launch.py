"""Starts the ranks of one run as processes of this machine, and leaves none behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onebit.benchmarks.signals import held_signals

GRACE = 10.0  # seconds that the other ranks have to end by themselves once one has failed


class RankError(RuntimeError):
    """A rank ended with a status other than 0.

    Attributes:
        status: that status; negative: the signal that ended it.
    """

    def __init__(self, rank: int, status: int) -> None:
        end = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        super().__init__(f"rank {rank} ended with {end}; its messages stand above")
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where one rank runs: a command to put before its own, and variables for its environment."""

    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


def loopback(ranks: int) -> list[Host]:
    """`ranks` hosts that are this machine, joined by its loopback interface."""
    return [Host(environment={"GLOO_SOCKET_IFNAME": "lo"})] * ranks


def launch(
    hosts: Sequence[Host], arguments: Sequence[str], module: str = "onebit.benchmarks", backend: str = "gloo"
) -> None:
    """Run `python -m MODULE` with `arguments` as one rank on each of `hosts`; wait for all of them.

    Before its arguments the module gets ``--backend=`` and ``--init_method=``, where the ranks meet.

    Ranks meet in a file, so that no route is needed but the one that is measured.

    Raises:
        RankError: a rank failed; the others have been ended.
    """
    with tempfile.TemporaryDirectory(prefix="onebit-") as folder, held_signals() as release:
        meeting = f"--init_method=file://{Path(folder) / 'meeting'}"
        own = [sys.executable, "-m", module, f"--backend={backend}", meeting, *arguments]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, host in enumerate(hosts):
                environment = {**os.environ, **host.environment, **_rank_variables(rank, len(hosts))}
                command = [*host.prefix, *own, *host.arguments]
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
            _wait(processes, release)
        finally:
            for process in processes:
                _end(process)


def _rank_variables(rank: int, size: int) -> dict[str, str]:
    return {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{size}"}


def _wait(processes: Sequence[subprocess.Popen[bytes]], release: Callable[[], None]) -> None:
    """Return when all have ended well; raise `RankError` for the first that has not, after a grace for its peers."""
    first: RankError | None = None
    deadline = math.inf
    while True:
        release()
        states = [process.poll() for process in processes]
        if first is None and any(states):
            first = next(RankError(rank, state) for rank, state in enumerate(states) if state)
            deadline = time.monotonic() + GRACE
        if None not in states or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if first is not None:
        raise first


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a rank that still runs, with its session, and collect it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
