"""Runs the same function on every rank of a group of threads, of Gloo or NCCL processes, or of MPI processes.

    def check(backend, base):
        ...
        return backend.rank + base

    assert run_ranks("gloo", 2, check, 10) == [10, 11]

The function stands at the top level of a module, its arguments and results can be pickled. A rank's result counts once
it is written down: whatever happens to the process after that is not the function's fault (Gloo has been seen to abort
a process at exit, "terminate called without an active exception", after all work was done).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from onebit.comm.threads_backend import run_threads
from tests.comm.rank import JOB, Job, Outcome

ROOT = Path(__file__).resolve().parents[2]
LOG_LINES = 40
MARGIN = 20.0  # seconds beyond a launch's limit in which its ranks must have been killed


class RanksFailed(AssertionError):
    """Ranks raised, or ended without a result."""


def mpiexec() -> str | None:
    """The mpiexec beside this Python, or that of the system."""
    return shutil.which(str(Path(sys.executable).with_name("mpiexec"))) or shutil.which("mpiexec")


SURVIVING = ("--with-ft", "ulfm")  # what tells mpiexec to go on without a rank that was killed


@functools.cache
def mpi_survives() -> bool:
    """Whether this mpiexec can, as Open MPI's can from version 5 on."""
    command = [mpiexec() or "mpiexec", "--allow-run-as-root", "--oversubscribe", *SURVIVING, "-n", "1", "true"]
    return mpiexec() is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mpi = pytest.mark.skipif(
    mpiexec() is None or find_spec("mpi4py") is None, reason="needs mpi4py and an mpiexec, as in onebit[mpi,dev]"
)

# For @pytest.mark.parametrize("kind, world_size", RANKS).
THREADS = [("threads", size) for size in (1, 2, 3, 4, 5, 7, 8)]
GLOO = [("gloo", size) for size in (2, 3, 4)]
MPI_SIZES = (2, 3, 4) if "ONEBIT_TEST_NP" not in os.environ else (int(os.environ["ONEBIT_TEST_NP"]),)  # make test-mpi
MPI = [pytest.param("mpi", size, marks=[pytest.mark.mpi, needs_mpi]) for size in MPI_SIZES]
RANKS = [*THREADS, *GLOO, *MPI]


def run_ranks(
    kind: str,
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    backend_timeout: float = 30.0,
    without: Collection[int] = (),
    mpiexec_flags: Sequence[str] = (),
) -> list[Any]:
    """Call ``function(backend, *args)`` on every rank; returns their results by rank.

    Args:
        kind: ``"threads"``, ``"gloo"``, ``"nccl"`` (a CUDA device per rank, Gloo beside it) or ``"mpi"``.
        timeout: seconds after which all processes are killed.
        backend_timeout: seconds that one collective may take.
        without: ranks of which no result is expected, for the function ends or stops them; they give None, and are
            killed once the others have ended.
        mpiexec_flags: beside the usual ones, such as `SURVIVING`.

    Raises:
        RanksFailed: with the tracebacks and the last lines of the output; over threads, the rank's own error.
    """
    if kind == "threads":
        return run_threads(world_size, function, *args, timeout=backend_timeout)
    job = Job(
        kind=kind,
        world_size=world_size,
        function=function,
        args=args,
        backend_timeout=backend_timeout,
        timeout=timeout,
        mpiexec_flags=tuple(mpiexec_flags),
    )
    with tempfile.TemporaryDirectory(prefix="onebit-ranks-") as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps(job))
        start = _start_mpi if kind == "mpi" else _start_torch
        return _results(folder, job, start(folder, job, without), without)


def _results(folder: Path, job: Job, statuses: dict[int, str], without: Collection[int]) -> list[Any]:
    outcomes = {rank: _outcome(folder, rank, statuses) for rank in range(job.world_size) if rank not in without}
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.error is not None}
    if failed:
        first_causes = sorted(failed, key=lambda rank: (failed[rank].secondary, rank))
        raise RanksFailed("\n".join(_report(folder, job, rank, failed[rank]) for rank in first_causes))
    return [outcomes[rank].value if rank in outcomes else None for rank in range(job.world_size)]


def _outcome(folder: Path, rank: int, statuses: dict[int, str]) -> Outcome:
    try:
        outcome: Outcome = pickle.loads((folder / f"outcome.{rank}").read_bytes())
    except FileNotFoundError:
        return Outcome(error=f"no result: {statuses.get(rank, 'mpiexec has ended')}", secondary=True)
    return outcome


def _report(folder: Path, job: Job, rank: int, outcome: Outcome) -> str:
    log = folder / f"log.{rank}"
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
    shown = [f"rank {rank} of {job.world_size} over {job.kind}: {outcome.error}", *(f"  | {line}" for line in lines)]
    return "\n".join(shown)


_forker: subprocess.Popen[str] | None = None


def _start_torch(folder: Path, job: Job, without: Collection[int]) -> dict[int, str]:
    """Have the forker run the ranks; returns how they ended."""
    global _forker
    if _forker is None or _forker.poll() is not None:
        _forker = subprocess.Popen(
            [sys.executable, "-m", "tests.comm.forker"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(_kill_group, _forker.pid)
    assert _forker.stdin is not None
    assert _forker.stdout is not None
    request = {"folder": str(folder), "world_size": job.world_size, "timeout": job.timeout, "without": list(without)}
    _forker.stdin.write(json.dumps(request) + "\n")
    _forker.stdin.flush()
    ready, _, _ = select.select([_forker.stdout], [], [], job.timeout + MARGIN)
    answer = _forker.stdout.readline() if ready else ""
    if not answer:
        _kill_group(_forker.pid)
        return dict.fromkeys(range(job.world_size), "the process that forks ranks has failed; its output is above")
    return {int(rank): status for rank, status in json.loads(answer).items()}


def _start_mpi(folder: Path, job: Job, without: Collection[int]) -> dict[int, str]:
    """Run the ranks under mpiexec; returns how they ended as far as is known."""
    command = [mpiexec(), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(job.world_size)]
    command += job.mpiexec_flags
    with (folder / "mpiexec.log").open("w") as log:
        process = subprocess.Popen(
            [*command, sys.executable, "-m", "tests.comm.mpi_rank", str(folder)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        status = _wait_mpi(process, folder, job, without)
    output = (folder / "mpiexec.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
    return dict.fromkeys(range(job.world_size), "\n".join([status, *output]))


def _wait_mpi(process: subprocess.Popen[bytes], folder: Path, job: Job, without: Collection[int]) -> str:
    expected = [folder / f"outcome.{rank}" for rank in range(job.world_size) if rank not in without]
    deadline = time.monotonic() + job.timeout
    while process.poll() is None and time.monotonic() < deadline:
        if without and all(path.exists() for path in expected):
            deadline = min(deadline, time.monotonic() + MARGIN)
        time.sleep(0.02)
    if process.poll() is not None:
        return f"mpiexec has ended with exit status {process.returncode}"
    process.terminate()  # it takes its ranks with it; a killed one leaves them behind
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for path in folder.glob("pid.*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)
    _kill_group(process.pid)
    process.wait()
    return f"still running after {job.timeout} s, and killed"


def environment() -> dict[str, str]:
    """Ours, with this process's import path, and without what a launcher of ourselves may have set."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_COMM_", "PMIX_"))}
    return {**variables, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
