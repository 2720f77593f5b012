"""Ranks of a node share memory or are told why not; nothing is left of it, and a lost rank ends in an error in time."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onebit.comm import Backend, CompressedAllreduce, TransportError, run_threads, shared_memory
from onebit.comm.shared_memory import share_memory
from onebit.comm.threads_backend import ThreadsBackend
from tests.comm import oracle
from tests.comm.launcher import SURVIVING, mpi_survives, needs_mpi, run_ranks
from tests.comm.samples import SMALL_BUCKET, bits, normal

TIMEOUT = 1.0
LATE = 15.0  # seconds that a busy machine may take to notice that it is over
NUMEL = 5000

MPI = pytest.param("mpi", marks=[pytest.mark.mpi, needs_mpi])


@pytest.fixture
def like_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share memory as processes do."""
    monkeypatch.setattr(ThreadsBackend, "in_processes", True)


def traces() -> tuple[int, int, list[str]]:
    """Mappings and descriptors of such memory in this process, and what has a name on this machine."""
    gc.collect()
    maps = sum("memfd:onebit" in line for line in Path("/proc/self/maps").read_text().splitlines())
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    named = sorted(path.name for path in Path("/dev/shm").iterdir() if "onebit" in path.name)
    return maps, sum("memfd:onebit" in link for link in links), named


def share_and_let_go(backend: Backend) -> None:
    row_bytes, common_bytes = 10_000, 5001
    memory = share_memory(backend, row_bytes, common_bytes)
    assert memory is not None
    assert memory.rows.shape == (backend.size, row_bytes)
    assert memory.common.shape == (common_bytes,)
    assert not memory.rows.any()
    assert not memory.common.any()
    backend.barrier()
    memory.rows[backend.rank] = backend.rank + 1
    memory.common[backend.rank] = backend.rank + 1
    backend.barrier()
    for rank in range(backend.size):
        assert bool((memory.rows[rank] == rank + 1).all())
    assert memory.common[: backend.size].tolist() == list(range(1, backend.size + 1))
    backend.barrier()
    if backend.name != "threads":  # whose maps are those of all
        assert traces()[0] == 1
        part = memory.rows[0, :16]
        del memory
        assert traces()[0] == 1  # a view keeps it
        del part
        assert traces() == (0, 0, [])


@pytest.mark.parametrize("kind", ["threads", "gloo", MPI])
def test_all_see_what_each_writes_and_nothing_is_left_once_its_tensors_are_gone(kind: str) -> None:
    run_ranks(kind, 3, share_and_let_go)


def average_in_all_ways(backend: Backend) -> tuple[str | None, list[list[bytes]]]:
    reduce = CompressedAllreduce(torch.zeros(NUMEL), backend, local_group=2, bucket_mb=SMALL_BUCKET)
    seen = []
    for call in range(3):
        x = normal(backend.rank, call, numel=NUMEL)
        reduce(x)
        seen.append(bits(x))
    return reduce.local_transport, seen


def refused(backend: Backend, refuse: Callable[[Backend], None]) -> tuple[str | None, list[list[bytes]], list[str]]:
    """Averages, and what the log says of them, where something keeps ranks from sharing memory."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(shared_memory.__name__).addHandler(handler)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    refuse(backend)
    average_in_all_ways(backend)
    transport, seen = average_in_all_ways(backend)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # for the result is written to a file
    return transport, seen, said


def no_room_to_make_it(backend: Backend) -> None:
    """Rank 2, the first of its node, may make no file of more than a page."""
    if backend.rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def no_room_for_its_row(backend: Backend) -> None:
    """Rank 3, the second of its node, is refused its pages."""
    if backend.rank == 3:
        os.posix_fallocate = refuse_pages


def refuse_pages(descriptor: int, start: int, size: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_such_memory(backend: Backend) -> None:
    del os.memfd_create


def another_list_of_pids(backend: Backend) -> None:
    """What rank 0 offers is looked for in another process."""
    if backend.rank == 0:
        os.getpid = os.getppid


# What refuses, who shares all the same, and who says why not.
REFUSALS: list[tuple[Callable[[Backend], None], set[int], set[int], str]] = [
    (no_room_to_make_it, {0, 1}, {2}, "OSError: [Errno 27] File too large"),
    (no_room_for_its_row, {0, 1}, {3}, "OSError: [Errno 28] No space left on device"),
    (no_such_memory, set(), {0, 2}, "has no attribute 'memfd_create'"),
    (another_list_of_pids, {2, 3}, {0, 1}, "Error: "),
]


@pytest.mark.parametrize(("refuse", "sharing", "saying", "why"), REFUSALS, ids=[case[0].__name__ for case in REFUSALS])
def test_a_node_that_cannot_share_averages_through_its_transport_with_the_same_bits_and_says_so_once(
    refuse: Callable[[Backend], None], sharing: set[int], saying: set[int], why: str
) -> None:
    expected = run_threads(4, average_in_all_ways)
    for rank, (transport, seen, said) in enumerate(run_ranks("gloo", 4, refused, refuse)):
        assert seen == expected[rank][1]
        assert transport == ("shared memory" if rank in sharing else "gloo")
        assert len(said) == (rank in saying)
        for message in said:
            assert message.startswith(f"rank {rank % 2}: the ranks of this node cannot share 0 MiB of memory")
            assert why in message


def two_at_once(backend: Backend) -> None:
    """Two averages under way, of which one may wait for its node while the other's kernels run."""
    numels = (NUMEL, 3000)
    alone = [CompressedAllreduce(torch.zeros(n), backend, local_group=2, bucket_mb=SMALL_BUCKET) for n in numels]
    both = [CompressedAllreduce(torch.zeros(n), backend, local_group=2, bucket_mb=SMALL_BUCKET) for n in numels]
    for call in range(3):
        expected = [normal(backend.rank, call, n, numel=n) for n in numels]
        given = [x.clone() for x in expected]
        for reduce, x in zip(alone, expected, strict=True):
            reduce(x)
        works = [reduce.start(x) for reduce, x in zip(both, given, strict=True)]
        for work in reversed(works) if call % 2 else works:
            work.wait()
        assert [bits(x) for x in given] == [bits(x) for x in expected]


@pytest.mark.usefixtures("like_processes")
@pytest.mark.parametrize("kind", ["threads", "gloo", MPI])
def test_two_averages_at_once_do_not_mix(kind: str) -> None:
    run_ranks(kind, 4, two_at_once)


@pytest.mark.usefixtures("like_processes")
def test_numbers_that_go_past_the_cache_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_threads(4, average_in_all_ways)
    monkeypatch.setattr("onebit.compress.cpu.stream.STREAM_BYTES", 0)
    assert run_threads(4, average_in_all_ways) == expected


@pytest.mark.usefixtures("like_processes")
def test_a_rank_that_takes_its_step_back_late_still_has_what_others_gave() -> None:
    gone_on = threading.Event()

    def take_back(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.zeros(NUMEL), backend, local_group=2, bucket_mb=SMALL_BUCKET)
        reduce(normal(backend.rank, numel=NUMEL))
        before = [part.clone() for part in (*reduce.residual.worker, *reduce.residual.server)]
        work = reduce.start(normal(backend.rank, 1, numel=NUMEL))
        work.finish()
        if backend.rank == 1:
            assert gone_on.wait(60)
        work.undo()
        for part, kept in zip((*reduce.residual.worker, *reduce.residual.server), before, strict=True):
            # Recomputed from what was said: a sum and a difference of numbers below 8 are rounded.
            torch.testing.assert_close(part, kept, rtol=0, atol=4 * 8 * oracle.UNIT)
        again = reduce.start(100 * normal(backend.rank, 2, numel=NUMEL))
        if backend.rank == 0:
            gone_on.set()
        again.wait()
        reduce(normal(backend.rank, 3, numel=NUMEL))

    run_threads(4, take_back)


@pytest.mark.usefixtures("like_processes")
def test_a_rank_that_has_given_up_writes_no_more_where_others_may_still_read() -> None:
    def give_up(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.zeros(NUMEL), backend, local_group=2)
        reduce(normal(backend.rank, numel=NUMEL))
        assert reduce.levels is not None
        [bucket] = reduce._buckets
        held = bucket.part.node._given  # type: ignore[attr-defined]
        before = held.clone()
        with pytest.raises(TransportError, match="all_gather did not complete"), backend.guard("all_gather"):
            raise OSError("the network is gone")
        for _ in range(2):
            with pytest.raises(TransportError, match="an earlier all_gather of this group failed"):
                reduce(torch.ones(NUMEL))
        work = reduce.start_with(*reduce.encoding([torch.ones(NUMEL)]), send=False)
        with pytest.raises(TransportError, match="an earlier all_gather of this group failed"):
            work.spoil(0)
        assert torch.equal(held, before)

    run_threads(4, give_up)


# --- lost ranks


def lose(backend: Backend, how: str, folder: str) -> tuple[float, tuple[int, int, list[str]]]:
    """Rank 1 is lost between two averages; the others say how long the second took to fail, and what is left then."""
    reduce = CompressedAllreduce(torch.zeros(NUMEL), backend, local_group=2, bucket_mb=SMALL_BUCKET)
    assert reduce.local_transport == "shared memory"
    reduce(normal(backend.rank, numel=NUMEL))
    assert reduce.levels is not None
    for group in (backend, reduce.levels.inside, reduce.levels.between):
        group.timeout = TIMEOUT
    before = [part.clone() for part in (*reduce.residual.worker, *reduce.residual.server)]
    if backend.rank == 1:
        time.sleep(0.2)  # the others may still be reading the last bytes
        os.kill(os.getpid(), signal.SIGKILL if how == "is killed" else signal.SIGSTOP)
    since = time.monotonic()
    with pytest.raises(TransportError):
        reduce(normal(backend.rank, 1, numel=NUMEL))
    took = time.monotonic() - since
    for part, kept in zip((*reduce.residual.worker, *reduce.residual.server), before, strict=True):
        # As above.
        torch.testing.assert_close(part, kept, rtol=0, atol=4 * 8 * oracle.UNIT)
    del reduce
    left = traces()
    if (
        backend.name == "mpi"
    ):  # at its end a rank aborts the job, for it has a collective open: not before all have told
        (Path(folder) / str(backend.rank)).touch()
        while len(list(Path(folder).iterdir())) < backend.size - 1 and time.monotonic() < since + LATE:
            time.sleep(0.05)
        atexit.register(time.sleep, 2.0)
    return took, left


@pytest.mark.parametrize("how", ["is killed", "stops"])
@pytest.mark.parametrize("kind", ["gloo", MPI])
def test_a_rank_lost_inside_a_node_is_an_error_on_the_others_in_time_and_leaves_no_memory(
    kind: str, how: str, tmp_path: Path
) -> None:
    if kind == "mpi" and how == "is killed" and not mpi_survives():
        pytest.skip("this mpiexec ends the job with a rank that is killed")
    flags = SURVIVING if kind == "mpi" and how == "is killed" else ()
    said = run_ranks(kind, 4, lose, how, str(tmp_path), without=[1], mpiexec_flags=flags)
    for took, left in (outcome for rank, outcome in enumerate(said) if rank != 1):
        assert took < TIMEOUT + LATE
        assert left == (0, 0, [])
