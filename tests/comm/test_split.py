"""Parts of a group are groups of their own: right members in the right order, errors for all, no hang."""

from __future__ import annotations

import time

import pytest
import torch

from onebit.comm import Backend, BackendError, TransportError, make_backend, run_threads
from tests.comm.launcher import needs_mpi, run_ranks

TIMEOUT = 1.0
LATE = 10.0  # seconds that a busy machine may take to notice that it is over

PROCESSES = [("gloo", 4), pytest.param("mpi", 4, marks=[pytest.mark.mpi, needs_mpi])]


def gathered(backend: Backend, value: int) -> list[int]:
    mine = torch.tensor([value])
    everyone = mine.new_empty(backend.size)
    backend.all_gather(everyone, mine).wait()
    return [int(number) for number in everyone]


def split_in_all_ways(backend: Backend) -> None:
    rank, size = backend.rank, backend.size
    for colors in ([7] * size, [r % 2 for r in range(size)], [-r for r in range(size)], [r >= 2 for r in range(size)]):
        colors = [int(color) * 2**40 for color in colors]
        members = [r for r in range(size) if colors[r] == colors[rank]]
        before = (backend.traffic.collectives, backend.traffic.wire_bytes)
        part = backend.split(colors[rank])
        assert (part.rank, part.size) == (members.index(rank), len(members))
        assert (part.name, part.device_type, part.timeout) == (backend.name, backend.device_type, backend.timeout)
        assert (backend.traffic.collectives, backend.traffic.wire_bytes) == (before[0] + 1, before[1] + 24 * (size - 1))
        assert gathered(part, rank) == members
        assert part.traffic.wire_bytes == 8 * (len(members) - 1)
        pieces = torch.tensor([100 * rank + r for r in members])  # for every member what it must get from this rank
        received = torch.empty_like(pieces)
        part.all_to_all(received, pieces).wait()
        assert received.tolist() == [100 * r + rank for r in members]
        total = torch.tensor([float(rank)])
        part.all_reduce(total).wait()
        assert float(total) == sum(members)
        part.barrier()
        # The whole group and several parts work side by side, each in its own order.
        other = backend.split(colors[rank])
        assert gathered(backend, rank) == list(range(size))
        assert gathered(other, rank) == gathered(part, rank) == members
        smaller = part.split(part.rank // 2)
        assert gathered(smaller, rank) == members[part.rank // 2 * 2 : part.rank // 2 * 2 + 2]


@pytest.mark.parametrize(("kind", "world_size"), [("threads", size) for size in (1, 2, 5)] + PROCESSES)
def test_a_part_has_the_ranks_of_one_color_in_their_order_and_its_own_collectives(kind: str, world_size: int) -> None:
    run_ranks(kind, world_size, split_in_all_ways)


def test_one_rank_alone_is_a_part_of_its_own() -> None:
    backend = make_backend("single", timeout=5.0)
    part = backend.split(3)
    assert (part.name, part.rank, part.size, part.timeout) == ("single", 0, 1, 5.0)
    assert gathered(part, 9) == [9]


def test_a_color_that_is_no_number_of_64_bits_is_refused_on_all_ranks() -> None:
    def split(backend: Backend, color: object) -> None:
        wrong = backend.rank == 1
        expected = f"rank {backend.rank}: split: the color must be an int of 64 bits, and on rank 1 it is not"
        with pytest.raises(BackendError, match=expected + (f"; got {color!r}" if wrong else "$")):
            backend.split(color if wrong else 0)  # type: ignore[arg-type]
        assert gathered(backend.split(0), backend.rank) == [0, 1, 2]  # nothing is broken by it

    for color in ("left", 2**63, True, None):
        run_threads(3, split, color)


def split_in_other_groups(backend: Backend) -> None:
    """Rank 0 is in a group of its own first, then all are in one more."""
    torch.distributed.new_group([0])
    counts = r"ranks \[0, 2\] are in \[2, 1\]"
    since = time.monotonic()
    with pytest.raises(
        BackendError, match=f"rank {backend.rank}: split: .* equally many groups, and {counts}; split, or"
    ):
        backend.split(backend.rank % 2)
    assert time.monotonic() - since < LATE
    for rank in range(1, backend.size):
        torch.distributed.new_group([rank])
    part = backend.split(backend.rank % 2)
    assert gathered(part, backend.rank) == list(range(backend.rank % 2, backend.size, 2))


def test_ranks_that_are_in_other_groups_are_told_so_and_do_not_wait_for_each_other() -> None:
    run_ranks("gloo", 3, split_in_other_groups)


def fail_in_a_part(backend: Backend) -> float:
    """Rank 3 leaves out a collective of its part; the others of this part hear of it, those elsewhere do not."""
    part = backend.split(backend.rank // 2)
    assert gathered(part, backend.rank) == [backend.rank // 2 * 2, backend.rank // 2 * 2 + 1]
    if backend.rank == 3:
        time.sleep(3 * TIMEOUT)
        return 0.0
    part.timeout = TIMEOUT
    since = time.monotonic()
    if backend.rank == 2:
        with pytest.raises(TransportError, match="all_gather did not complete"):
            gathered(part, 0)
        for broken in (part, backend):  # what comes next would not be matched
            assert not broken.sound
            with pytest.raises(TransportError, match="an earlier all_gather of this group failed"):
                gathered(broken, 0)
        with pytest.raises(TransportError, match="an earlier all_gather of this group failed"):
            backend.split(0)
    else:
        assert gathered(part, backend.rank) == [0, 1]
        assert backend.sound
    return time.monotonic() - since


@pytest.mark.parametrize("kind", ["threads", "gloo", pytest.param("mpi", marks=[pytest.mark.mpi, needs_mpi])])
def test_a_late_rank_ends_in_an_error_within_the_time_limit_and_breaks_the_whole_group_there(kind: str) -> None:
    lost = [3] if kind == "mpi" else []  # its job is aborted with the collective that was never joined
    took = run_ranks(kind, 4, fail_in_a_part, without=lost)
    assert max(seconds for seconds in took if seconds is not None) < TIMEOUT + LATE


def never_split(backend: Backend) -> float:
    backend.timeout = TIMEOUT
    since = time.monotonic()
    if backend.rank == 0:
        time.sleep(2 * TIMEOUT)
    else:
        with pytest.raises(TransportError, match="all_gather did not complete"):
            backend.split(0)
    return time.monotonic() - since


@pytest.mark.parametrize("kind", ["threads", "gloo"])
def test_a_rank_that_does_not_split_fails_the_others_within_the_time_limit(kind: str) -> None:
    assert max(run_ranks(kind, 3, never_split)) < 2 * TIMEOUT + LATE


def test_a_rank_that_has_ended_fails_the_waits_of_its_parts_at_once() -> None:
    def end(backend: Backend) -> None:
        part = backend.split(0).split(backend.rank // 2)
        if backend.rank == 3:
            raise ValueError("this rank's own")
        if backend.rank == 2:
            gathered(part, 0)

    since = time.monotonic()
    with pytest.raises(ValueError, match="this rank's own"):  # and not the TransportError that follows from it
        run_threads(4, end)
    assert time.monotonic() - since < LATE


def free(backend: Backend) -> int:
    from mpi4py import MPI

    whole = MPI.COMM_WORLD.Dup()
    part = make_backend(whole).split(backend.rank % 2)
    assert gathered(part, backend.rank) == [backend.rank]
    whole.Free()
    return 0


@pytest.mark.mpi
@needs_mpi
def test_freeing_the_communicator_frees_its_parts() -> None:
    assert run_ranks("mpi", 2, free) == [0, 0]
