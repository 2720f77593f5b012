"""A rank that dies, hangs or never comes becomes a TransportError on every other rank, within the timeout."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from onebit.comm.backend import Backend
from onebit.comm.errors import TransportError
from onebit.comm.registry import make_backend
from tests.comm.launcher import RanksFailed, needs_mpi, run_ranks

TIMEOUT = 0.5
LATE = 10.0  # seconds that a busy machine may take to notice that it is over
LONG = 600.0  # longer than any test

OPERATIONS = ("all_to_all", "all_gather", "all_reduce", "barrier")


def call(backend: Backend, operation: str) -> None:
    """One collective of half a MiB and more, so that sending it needs the peer to receive."""
    piece = 1 << 19
    whole = torch.zeros(backend.size * piece, dtype=torch.uint8)
    if operation == "all_to_all":
        backend.all_to_all(torch.empty_like(whole), whole).wait()
    elif operation == "all_gather":
        backend.all_gather(whole, torch.zeros(piece, dtype=torch.uint8)).wait()
    elif operation == "all_reduce":
        backend.all_reduce(torch.zeros(piece)).wait()
    else:
        backend.barrier()


def another_group(backend: Backend) -> Backend:
    """Of the same ranks."""
    if backend.name == "gloo":
        return make_backend(dist.new_group())
    from mpi4py import MPI

    return make_backend(MPI.COMM_WORLD.Dup())


def fail(backend: Backend, how: str, limit: float) -> tuple[float, dict[str, float]]:
    """The last rank fails in its way; the others say when they were through, and how long each operation took."""
    groups = {operation: another_group(backend) for operation in OPERATIONS}  # the first failure ends a group's use
    for operation, group in groups.items():
        call(group, operation)
    for group in groups.values():
        group.timeout = limit  # only now, for ranks on a busy machine start far apart
    if backend.rank == backend.size - 1:
        time.sleep(0.2)  # the others may still be reading the last bytes
        if how == "never joins":
            time.sleep(LONG)
        os.kill(os.getpid(), {"is killed": signal.SIGKILL, "stops": signal.SIGSTOP}[how])
    took = {}
    for operation, group in groups.items():
        start = time.monotonic()
        with pytest.raises(TransportError, match=r"did not complete after .* timeout= ") as caught:
            call(group, operation)
        took[operation] = time.monotonic() - start
        error = caught.value
        assert (error.rank, error.operation) == (backend.rank, operation)
        assert error.waited == pytest.approx(took[operation], abs=0.5)
    with pytest.raises(
        TransportError, match="an earlier all_to_all of this group failed"
    ):  # nor does a later call hang
        call(groups["all_to_all"], "all_gather")
    return time.monotonic(), took


def seconds_until_raised(kind: str, world_size: int, how: str) -> list[float]:
    """Of every operation on every rank that survives, and whose processes must then end soon."""
    lost = world_size - 1
    said = run_ranks(kind, world_size, fail, how, TIMEOUT, without=[lost])[:lost]
    through = max(when for when, _ in said)
    ending = time.monotonic() - through
    assert ending < LATE, f"the processes took {ending:.1f} s to end, after {said}"
    return [seconds for _, took in said for seconds in took.values()]


def test_gloo_peer_is_killed() -> None:
    seconds = seconds_until_raised("gloo", 3, "is killed")
    assert max(seconds) < TIMEOUT + LATE
    assert min(seconds) < TIMEOUT  # its connections break at once


@pytest.mark.parametrize("how", ["stops", "never joins"])
def test_gloo_peer_hangs(how: str) -> None:
    seconds = seconds_until_raised("gloo", 3, how)
    assert max(seconds) < TIMEOUT + LATE
    assert max(seconds) >= TIMEOUT


@pytest.mark.mpi
@needs_mpi
@pytest.mark.parametrize(("world_size", "how"), [(3, "stops"), (2, "never joins")])
def test_mpi_peer_hangs(world_size: int, how: str) -> None:
    seconds = seconds_until_raised("mpi", world_size, how)
    assert max(seconds) < TIMEOUT + LATE
    assert min(seconds) >= TIMEOUT


@pytest.mark.mpi
@needs_mpi
def test_mpi_peer_is_killed_and_mpiexec_ends_the_job() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="no result: mpiexec has ended with exit status"):
        run_ranks("mpi", 2, fail, "is killed", LONG, without=[1])
    assert time.monotonic() - start < 40


def give_up_and_try_again(backend: Backend) -> list[list[float]]:
    """Rank 0 gives up on the last rank, which is late by two time limits; what the last rank hears from then on."""

    def say(number: int) -> list[float]:
        heard = torch.zeros(backend.size)
        backend.all_gather(heard, torch.full((1,), float(number))).wait()
        return heard.tolist()

    backend.barrier()
    backend.timeout = TIMEOUT
    if backend.rank == 0:
        with pytest.raises(TransportError):
            say(0)
        for _ in range(3):
            with pytest.raises(TransportError, match="an earlier all_gather of this group failed") as caught:
                say(0)
            assert caught.value.waited == 0.0
        time.sleep(4 * TIMEOUT)  # else the last rank might hear of its end
        return []
    heard = []
    time.sleep(2 * TIMEOUT)
    with contextlib.suppress(TransportError):
        for number in range(4):
            heard.append(say(number))
    return heard


@pytest.mark.parametrize("kind", ["threads", "gloo", pytest.param("mpi", marks=[pytest.mark.mpi, needs_mpi])])
def test_who_gave_up_on_a_late_peer_and_tries_again_is_never_heard_in_the_wrong_place(kind: str) -> None:
    heard = run_ranks(kind, 2, give_up_and_try_again)[1]
    assert heard in ([], [[0.0, 0.0]])  # the call that rank 0 gave up on may be complete for the late one


def come_late(backend: Backend) -> str:
    if backend.rank == 0:
        time.sleep(TIMEOUT)
        return "too late"
    with pytest.raises(TransportError) as caught:
        backend.barrier()
    return str(caught.value)


def test_threads_peer_hangs() -> None:
    said = run_ranks("threads", 3, come_late, backend_timeout=TIMEOUT / 4)
    for rank in (1, 2):
        assert f"rank {rank}: barrier did not complete after 0." in said[rank]
    # Whoever gives up first leaves, and the other may hear of that instead.
    assert any("nothing from ranks [0]" in message for message in said)
