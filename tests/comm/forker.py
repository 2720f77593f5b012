"""A process that has imported and made ready once what ranks need, and forks them, which spares each of them a second.

It reads one job per line and answers with the ranks' exit statuses. It never runs a tensor operation itself, so neither
threads of torch's nor a CUDA context exist when it forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.comm.rank import run_rank


def main() -> None:
    make_ready()
    for line in sys.stdin:
        job = json.loads(line)
        ranks = {rank: fork(Path(job["folder"]), rank) for rank in range(job["world_size"])}
        statuses = reap(ranks, time.monotonic() + job["timeout"], set(job["without"]))
        sys.stdout.write(json.dumps(statuses) + "\n")
        sys.stdout.flush()


def make_ready() -> None:
    """What the ranks would do one by one."""
    import pytest  # noqa: F401  by the modules that their functions stand in
    import torch._dynamo  # noqa: F401  by torch, when the first optimizer is made

    import onebit.optim  # noqa: F401

    with contextlib.suppress(ImportError):
        import numba

        numba.njit("void()")(lambda: None)  # the compiler makes itself ready, to load a kernel from the disk as well


def fork(folder: Path, rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        run_rank(folder, rank)
        sys.exit(0)  # as a script ends: what is left behind is torn down, and may fail
    return pid


def reap(ranks: dict[int, int], deadline: float, without: set[int]) -> dict[int, str]:
    """How each rank ended. Those in `without` are killed when the others are through, and all at the deadline."""
    statuses: dict[int, str] = {}
    while len(statuses) < len(ranks):
        for rank, pid in ranks.items():
            if rank in statuses:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                statuses[rank] = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
            elif time.monotonic() > deadline or ranks.keys() - statuses.keys() <= without:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[rank] = "still running at the end, and killed"
        time.sleep(0.005)
    return statuses


if __name__ == "__main__":
    main()
