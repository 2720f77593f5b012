"""The launcher that the other tests stand on: it hides no failure, takes none for granted, and leaves no process."""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from onebit.comm.backend import Backend
from onebit.comm.errors import TransportError
from tests.comm.launcher import RanksFailed, needs_mpi, run_ranks

PROCESSES = ["gloo", pytest.param("mpi", marks=[pytest.mark.mpi, needs_mpi])]


def abort_at_exit(backend: Backend, tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    atexit.register(os.abort)
    return backend.rank, tensor + backend.rank


def test_a_result_counts_whatever_happens_at_exit() -> None:
    results = run_ranks("gloo", 2, abort_at_exit, torch.ones(2))
    assert [rank for rank, _ in results] == [0, 1]
    assert torch.equal(results[1][1], torch.full((2,), 2.0))


def one_raises(backend: Backend) -> None:
    sys.stderr.write(f"rank {backend.rank} says something\n")
    if backend.rank == 1:
        raise ValueError("the cause")
    backend.barrier()


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_cause_comes_before_its_consequences(kind: str) -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(kind, 2, one_raises)
    message = str(caught.value)
    assert message.startswith(f"rank 1 of 2 over {kind}: Traceback")
    assert "ValueError: the cause" in message
    assert "rank 1 says something" in message
    assert f"rank 0 of 2 over {kind}: " in message


def one_vanishes(backend: Backend) -> None:
    if backend.rank == 0:
        os._exit(7)


def test_a_rank_without_a_result_is_a_failure() -> None:
    with pytest.raises(RanksFailed, match="rank 0 of 2 over gloo: no result: exit status 7"):
        run_ranks("gloo", 2, one_vanishes)


def one_hangs(backend: Backend, folder: Path) -> None:
    (folder / str(backend.rank)).write_text(str(os.getpid()))
    if backend.rank == 0:
        time.sleep(600)


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and which nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("kind", "limit"), [("gloo", 3.0), pytest.param("mpi", 8.0, marks=[pytest.mark.mpi, needs_mpi])]
)
def test_no_process_outlives_the_limit(kind: str, limit: float, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=f"rank 0 of 2 over {kind}: no result: still running"):
        run_ranks(kind, 2, one_hangs, tmp_path, timeout=limit)
    assert time.monotonic() - start < 40
    ranks = [int(file.read_text()) for file in tmp_path.iterdir()]
    patience = time.monotonic() + 10  # a process that was sent SIGKILL ends when the kernel comes to it
    while any(map(is_running, ranks)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(is_running, ranks))


def test_a_rank_that_is_expected_to_vanish_gives_none() -> None:
    assert run_ranks("gloo", 2, returns_or_vanishes, without=[1]) == ["here", None]


def returns_or_vanishes(backend: Backend) -> str:
    if backend.rank == 1:
        os._exit(1)
    with pytest.raises(TransportError):
        backend.barrier()
    return "here"
