"""What a rank asks of MPI beside what it asks of any transport."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import mpi_backend
from onebit.comm.backend import Backend
from onebit.comm.errors import BackendError
from onebit.comm.registry import make_backend
from onebit.comm.staging import Staging
from tests.comm.known_bytes import as_bytes, exchanged, gathered, start_all_gather, start_all_to_all
from tests.comm.transport_checks import EVERYWHERE, exercise


def check_mpi_sub_communicators(backend: Backend) -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    for colour in (backend.rank % 2, 0, MPI.UNDEFINED if backend.rank == 0 else 1):
        # Ranks in reverse, so that a backend that confused its communicator with the world would be found out.
        communicator = world.Split(colour, key=-backend.rank)
        if colour == MPI.UNDEFINED:
            with pytest.raises(BackendError, match="null communicator"):
                make_backend(communicator)
            continue
        own = make_backend(communicator, timeout=backend.timeout)
        assert (own.name, own.rank, own.size) == ("mpi", communicator.rank, communicator.size)
        exercise(own)
        communicator.Free()  # and with it the duplicate
    half = world.Split(backend.rank % 2)
    between = half.Create_intercomm(0, world, 1 - backend.rank % 2)
    with pytest.raises(BackendError, match="intercommunicator"):
        make_backend(between)
    between.Free()
    half.Free()


def check_mpi_is_found_by_name_and_by_communicator(backend: Backend) -> None:
    from mpi4py import MPI

    for spec in ("mpi", MPI.COMM_WORLD):
        assert (make_backend(spec).name, make_backend(spec).size) == ("mpi", backend.size)
    with pytest.raises(BackendError, match=f"a launcher has started {backend.size} ranks"):
        make_backend()
    with pytest.raises(BackendError, match="null communicator"):
        make_backend(MPI.COMM_NULL)
    assert make_backend("mpi", device="cuda").name == "mpi"
    with pytest.raises(
        BackendError, match=f"rank {backend.rank}: all_reduce .* carries cpu and cuda tensors, got one on"
    ):
        backend.all_reduce(torch.zeros(3, device="meta"))
    with pytest.raises(BackendError, match="expected an mpi4py communicator, got str"):
        mpi_backend.MpiBackend("world")


def check_mpi_messages_of_the_user_do_not_collide_with_ours(backend: Backend) -> None:
    from mpi4py import MPI

    mine = np.full(3, backend.rank, dtype=np.int32)
    theirs = np.empty(3 * backend.size, dtype=np.int32)
    # On one communicator MPI would pair the first calls of the ranks with each other, whatever they are.
    if backend.rank == 0:
        work, received, _ = start_all_gather(backend, 6, torch.int16)
        request = MPI.COMM_WORLD.Iallgather(mine, theirs)
    else:
        request = MPI.COMM_WORLD.Iallgather(mine, theirs)
        work, received, _ = start_all_gather(backend, 6, torch.int16)
    work.wait()
    request.Wait()
    assert np.array_equal(as_bytes(received), gathered(backend, 6, torch.int16))
    assert np.array_equal(theirs, np.repeat(np.arange(backend.size), 3))


def check_mpi_second_backend_of_a_communicator_costs_no_second_duplicate(backend: Backend) -> None:
    from mpi4py import MPI

    if backend.rank == 0:  # alone: making the first was collective, so this would hang if it duplicated again
        again = mpi_backend.MpiBackend(MPI.COMM_WORLD, timeout=5.0)
        assert again.traffic is not backend.traffic
    backend.barrier()


@contextlib.contextmanager
def most(count: int) -> Iterator[None]:
    """Pretend that MPI can count no further."""
    before, mpi_backend.MAX_COUNT = mpi_backend.MAX_COUNT, count
    try:
        yield
    finally:
        mpi_backend.MAX_COUNT = before


def check_mpi_counts_beyond_its_limit(backend: Backend) -> None:
    with most(100):
        for k in (99, 100, 101, 199, 200, 201, 2500, 10_001):
            for start, expected in ((start_all_to_all, exchanged), (start_all_gather, gathered)):
                work, received, _ = start(backend, k, torch.uint8)
                work.wait()
                assert np.array_equal(as_bytes(received), expected(backend, k, torch.uint8)), k
            for dtype in (torch.float32, torch.bfloat16):
                total = torch.arange(k).remainder(16).to(dtype)
                backend.all_reduce(total).wait()
                assert torch.equal(total, (torch.arange(k).remainder(16) * backend.size).to(dtype)), k


class Elsewhere(Staging):
    """Takes CPU tensors for those of a device that MPI cannot read."""

    def needed(self, tensor: Tensor) -> bool:
        return True


def check_mpi_staged_tensors(backend: Backend) -> None:
    assert isinstance(backend, mpi_backend.MpiBackend)
    assert not backend.cuda_aware or torch.cuda.is_available()
    before = backend._staging, backend.cuda_aware
    backend._staging, backend.cuda_aware = Elsewhere(), False
    try:
        for check in EVERYWHERE:
            check(backend)
        work, received, sent = start_all_to_all(backend, 1000, torch.float32)
        expected, untouched = exchanged(backend, 1000, torch.float32), as_bytes(received).copy()
        sent.zero_()  # what travels is a copy
        time.sleep(0.2)
        assert np.array_equal(as_bytes(received), untouched)  # delivered by wait, on the stream that is current then
        work.wait()
        assert np.array_equal(as_bytes(received), expected)
    finally:
        backend._staging, backend.cuda_aware = before
