"""Every transport moves the same bytes and counts them alike, whatever the dtype, size and number of ranks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from onebit.comm import mpi_backend
from onebit.comm.backend import SUMMABLE, Backend, Work
from onebit.comm.errors import BackendError
from onebit.comm.registry import make_backend
from onebit.comm.staging import Staging
from onebit.comm.torch_backend import SMALL_GATHER
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.launcher import GLOO, MPI, RANKS, run_ranks

DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
)
# Elements in one piece: one, odd, and more bytes than what transports send eagerly.
PIECES = (1, 7, 12_001)
LARGE = SMALL_GATHER // 2 + 1  # bytes that two ranks cannot gather by Gloo's way for little ones
FILL = 0xAB

Bytes = NDArray[np.uint8]


def bytes_of(rank: int, length: int, dtype: torch.dtype) -> Bytes:
    """What a rank sends: `length` elements of random bytes that every rank can work out."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    return np.random.default_rng([rank, length, itemsize]).integers(0, high, length * itemsize, dtype=np.uint8)


def as_tensor(data: Bytes, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(data.copy()).view(dtype)


def as_bytes(tensor: Tensor) -> Bytes:
    return np.frombuffer(tensor.view(torch.uint8).numpy().tobytes(), dtype=np.uint8)


def blank(length: int, dtype: torch.dtype) -> Tensor:
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return torch.full((length * itemsize,), FILL, dtype=torch.uint8).view(dtype)


def exchanged(backend: Backend, k: int, dtype: torch.dtype) -> Bytes:
    """What all_to_all of pieces of k elements must leave on this rank."""
    sent = [bytes_of(rank, backend.size * k, dtype).reshape(backend.size, -1) for rank in range(backend.size)]
    return np.concatenate([pieces[backend.rank] for pieces in sent])


def gathered(backend: Backend, k: int, dtype: torch.dtype) -> Bytes:
    """What all_gather of k elements must leave on every rank."""
    return np.concatenate([bytes_of(rank, k, dtype) for rank in range(backend.size)])


def start_all_to_all(backend: Backend, k: int, dtype: torch.dtype) -> tuple[Work, Tensor, Tensor]:
    sent = as_tensor(bytes_of(backend.rank, backend.size * k, dtype), dtype)
    received = blank(backend.size * k, dtype)
    return backend.all_to_all(received, sent), received, sent


def start_all_gather(backend: Backend, k: int, dtype: torch.dtype) -> tuple[Work, Tensor, Tensor]:
    sent = as_tensor(bytes_of(backend.rank, k, dtype), dtype)
    received = blank(backend.size * k, dtype)
    return backend.all_gather(received, sent), received, sent


def check_all_to_all_moves_every_byte(backend: Backend) -> None:
    for dtype in DTYPES:
        for k in PIECES:
            work, received, sent = start_all_to_all(backend, k, dtype)
            work.wait()
            assert np.array_equal(as_bytes(received), exchanged(backend, k, dtype)), (dtype, k)
            assert np.array_equal(as_bytes(sent), bytes_of(backend.rank, backend.size * k, dtype)), (dtype, k)


def check_all_gather_moves_every_byte(backend: Backend) -> None:
    for dtype in DTYPES:
        for k in PIECES:
            work, received, sent = start_all_gather(backend, k, dtype)
            work.wait()
            assert np.array_equal(as_bytes(received), gathered(backend, k, dtype)), (dtype, k)
            assert np.array_equal(as_bytes(sent), bytes_of(backend.rank, k, dtype)), (dtype, k)


def check_large_pieces_arrive(backend: Backend) -> None:
    for start, expected in ((start_all_to_all, exchanged), (start_all_gather, gathered)):
        work, received, _ = start(backend, LARGE, torch.uint8)
        work.wait()
        assert np.array_equal(as_bytes(received), expected(backend, LARGE, torch.uint8))


def check_all_reduce_sums_integers_exactly(backend: Backend) -> None:
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
        for k in PIECES:
            most = torch.iinfo(dtype).max // backend.size  # MPI may saturate a sum that wraps elsewhere
            each = [np.random.default_rng([rank, k]).integers(0, most, k) for rank in range(backend.size)]
            tensor = torch.from_numpy(each[backend.rank]).to(dtype, copy=True)
            backend.all_reduce(tensor).wait()
            assert np.array_equal(tensor.numpy(), np.sum(each, axis=0)), (dtype, k)


def check_all_reduce_gives_every_rank_the_same_bits_of_a_good_sum(backend: Backend) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for k in PIECES:
            each = [
                torch.from_numpy(np.random.default_rng([rank, k]).standard_normal(k)).to(dtype)
                for rank in range(backend.size)
            ]
            tensor = each[backend.rank].clone()
            backend.all_reduce(tensor).wait()
            exact = np.sum([t.double().numpy() for t in each], axis=0)
            # n - 1 additions, each rounded by at most half an ulp of a partial sum of magnitudes.
            bound = backend.size * torch.finfo(dtype).eps * np.sum([t.double().abs().numpy() for t in each], axis=0)
            assert np.all(np.abs(tensor.double().numpy() - exact) <= bound), (dtype, k)
            everyone = blank(backend.size * k, dtype)
            backend.all_gather(everyone, tensor).wait()
            rows = as_bytes(everyone).reshape(backend.size, -1)
            assert np.array_equal(rows, np.broadcast_to(rows[0], rows.shape)), (dtype, k)


def check_zero_length_tensors_pass(backend: Backend) -> None:
    for dtype in DTYPES:
        empty, also_empty = torch.empty(2, 0, dtype=dtype)
        backend.all_to_all(also_empty, empty).wait()
        backend.all_gather(also_empty, empty).wait()
        if dtype in SUMMABLE:
            backend.all_reduce(empty).wait()
    work, received, _ = start_all_gather(backend, 3, torch.uint8)
    work.wait()
    assert np.array_equal(as_bytes(received), gathered(backend, 3, torch.uint8))


def check_several_in_flight_waited_out_of_order(backend: Backend) -> None:
    flights = []
    for k in (5, 30_000, 1, 900):
        flights.append((*start_all_to_all(backend, k, torch.uint8), exchanged(backend, k, torch.uint8)))
        flights.append((*start_all_gather(backend, k, torch.float32), gathered(backend, k, torch.float32)))
        total = torch.full((k,), backend.rank + 1)
        expected = np.full(k, backend.size * (backend.size + 1) // 2)
        flights.append((backend.all_reduce(total), total, total, expected.view(np.uint8)))
    for work, received, _, expected in [*flights[1::2], *reversed(flights[::2])]:
        work.wait()
        work.wait()  # a second wait is allowed and does nothing
        assert np.array_equal(as_bytes(received), expected)


def check_traffic_equals_the_formula(backend: Backend) -> None:
    n, k = backend.size, 1000
    sent = {
        "all_to_all": (n - 1) * k * 4,
        "all_gather": (n - 1) * k * 4,
        "all_reduce": 2 * (n - 1) * k * 4 // n,
        "barrier": 0,
    }
    backend.traffic.reset()
    start_all_to_all(backend, k, torch.float32)[0].wait()
    assert backend.traffic.wire_bytes == sent["all_to_all"]
    start_all_gather(backend, k, torch.float32)[0].wait()
    backend.all_reduce(torch.zeros(k)).wait()
    backend.barrier()
    assert backend.traffic.wire_bytes == sum(sent.values())
    assert backend.traffic.collectives == 3
    backend.traffic.reset()
    assert (backend.traffic.wire_bytes, backend.traffic.collectives) == (0, 0)


def check_barrier_waits_for_the_last(backend: Backend) -> None:
    times = torch.zeros(2, dtype=torch.float64)
    time.sleep(0.03 * backend.rank)
    times[0] = time.monotonic()
    backend.barrier()
    times[1] = time.monotonic()
    everyone = torch.zeros(2 * backend.size, dtype=torch.float64)
    backend.all_gather(everyone, times).wait()
    entered, left = everyone.view(-1, 2).T
    assert left.min() >= entered.max()


def check_wrong_arguments_are_refused_and_nothing_is_sent(backend: Backend) -> None:
    n = backend.size
    good = torch.zeros(2 * n)
    backend.traffic.reset()
    wrong: list[Callable[[], Work]] = [
        lambda: backend.all_to_all(torch.zeros(2 * n + 2), good),
        lambda: backend.all_to_all(torch.zeros(2 * n, dtype=torch.int32), good),
        lambda: backend.all_to_all(torch.zeros(n, 2), torch.zeros(n, 2)),
        lambda: backend.all_to_all(torch.zeros(4 * n)[::2], good),
        lambda: backend.all_gather(torch.zeros(2 * n + 1), torch.zeros(2)),
        lambda: backend.all_reduce(torch.zeros(3, 3)),
        lambda: backend.all_reduce(torch.zeros(3, dtype=torch.bool)),
        lambda: backend.all_reduce(torch.zeros(3, dtype=torch.complex64)),
    ]
    if n > 1:
        wrong.append(lambda: backend.all_to_all(torch.zeros(2 * n + 1), torch.zeros(2 * n + 1)))
    if backend.device_type is not None:
        wrong.append(lambda: backend.all_reduce(torch.zeros(3, device="meta")))
    for call in wrong:
        with pytest.raises(BackendError, match=f"rank {backend.rank}: all_"):
            call()
    assert backend.traffic.collectives == 0
    backend.barrier()


def check_prepared_collectives_start_again_and_again(backend: Backend) -> None:
    k = 1000
    received, everyone = torch.zeros(2, backend.size * k)
    sent, mine = torch.zeros(backend.size * k), torch.zeros(k)
    backend.traffic.reset()
    exchange, gather = backend.prepare_all_to_all(received, sent), backend.prepare_all_gather(everyone, mine)
    with pytest.raises(BackendError, match=f"rank {backend.rank}: all_gather of {k} elements"):
        backend.prepare_all_gather(everyone[1:], mine)
    assert backend.traffic.collectives == 0
    for call in range(3):
        for in_line in (False, True):
            sent.fill_(10.0 * call + backend.rank)
            exchange.start(in_line=in_line).wait()
            mine.copy_(received.view(backend.size, k).sum(0))
            gather.start(in_line=in_line).wait()
            ranks = torch.arange(backend.size, dtype=torch.float32)
            assert torch.equal(received, (10.0 * call + ranks).repeat_interleave(k))
            assert torch.equal(everyone, (10.0 * call + ranks).sum().repeat(backend.size * k))
    assert backend.traffic.collectives == 12
    assert backend.traffic.wire_bytes == 6 * 2 * 4 * k * (backend.size - 1)


EVERYWHERE = [
    check_all_to_all_moves_every_byte,
    check_all_gather_moves_every_byte,
    check_large_pieces_arrive,
    check_all_reduce_sums_integers_exactly,
    check_all_reduce_gives_every_rank_the_same_bits_of_a_good_sum,
    check_zero_length_tensors_pass,
    check_several_in_flight_waited_out_of_order,
    check_traffic_equals_the_formula,
    check_barrier_waits_for_the_last,
    check_prepared_collectives_start_again_and_again,
    check_wrong_arguments_are_refused_and_nothing_is_sent,
]


def exercise(backend: Backend) -> None:
    """The collectives that a sub-group must carry as well as the whole."""
    check_several_in_flight_waited_out_of_order(backend)
    check_traffic_equals_the_formula(backend)
    check_barrier_waits_for_the_last(backend)


def check_gloo_sub_groups(backend: Backend) -> None:
    for members in ([0], list(range(1, backend.size)), list(range(backend.size))):
        group = dist.new_group(members)
        if backend.rank in members:
            own = make_backend(group, timeout=backend.timeout)
            assert (own.name, own.rank, own.size) == ("gloo", members.index(backend.rank), len(members))
            exercise(own)
        else:
            with pytest.raises(BackendError, match=f"rank {backend.rank} is no member"):
                make_backend(group)


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


CHECKS = {
    "threads": EVERYWHERE,
    "gloo": [*EVERYWHERE, check_gloo_sub_groups],
    "mpi": [
        *EVERYWHERE,
        check_mpi_is_found_by_name_and_by_communicator,
        check_mpi_sub_communicators,
        check_mpi_messages_of_the_user_do_not_collide_with_ours,
        check_mpi_second_backend_of_a_communicator_costs_no_second_duplicate,
        check_mpi_counts_beyond_its_limit,
        check_mpi_staged_tensors,
    ],
}


@functools.cache
def failures_on(kind: str, world_size: int) -> list[Failures]:
    """All checks in one launch, for starting processes costs more than what they do."""
    results: list[Failures] = run_ranks(kind, world_size, failures_of, CHECKS[kind], timeout=90.0)
    return results


def report(kind: str, world_size: int, check: Check) -> None:
    assert_passed(failures_on(kind, world_size), check.__name__)


@pytest.mark.parametrize("check", EVERYWHERE, ids=short)
@pytest.mark.parametrize(("kind", "world_size"), RANKS)
def test_transport(kind: str, world_size: int, check: Check) -> None:
    report(kind, world_size, check)


@pytest.mark.parametrize(("kind", "world_size"), GLOO)
def test_gloo_sub_groups(kind: str, world_size: int) -> None:
    report(kind, world_size, check_gloo_sub_groups)


@pytest.mark.parametrize("check", [check for check in CHECKS["mpi"] if check not in EVERYWHERE], ids=short)
@pytest.mark.parametrize(("kind", "world_size"), MPI)
def test_mpi(kind: str, world_size: int, check: Check) -> None:
    report(kind, world_size, check)


@pytest.mark.parametrize(
    ("library", "supported"),
    [
        ({}, False),
        ({"MPIX_Query_cuda_support": lambda: 0}, False),
        ({"MPIX_Query_cuda_support": lambda: 1}, True),
        ({"MPIX_GPU_query_support": lambda kind, answer: answer_with(answer, int(kind == 0))}, True),
        ({"MPIX_GPU_query_support": lambda kind, answer: answer_with(answer, 0)}, False),
        ({"MPIX_GPU_query_support": lambda kind, answer: answer_with(answer, 1, status=16)}, False),
        (None, False),
    ],
    ids=[
        "cannot tell",
        "Open MPI without",
        "Open MPI with",
        "MPICH with",
        "MPICH without",
        "MPICH fails",
        "no library",
    ],
)
def test_the_mpi_library_itself_is_asked_for_cuda_support(
    monkeypatch: pytest.MonkeyPatch, library: dict[str, Callable[..., int]] | None, supported: bool
) -> None:
    def load(path: str) -> SimpleNamespace:
        assert path == "the mpi4py module"
        if library is None:
            raise OSError("no such file")
        return SimpleNamespace(**library)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert mpi_backend.query_cuda_support(SimpleNamespace(__file__="the mpi4py module")) is supported


def answer_with(answer: Any, value: int, status: int = 0) -> int:
    answer._obj.value = value  # what byref() was given
    return status


@pytest.mark.parametrize("check", EVERYWHERE, ids=short)
def test_single(check: Check) -> None:
    check(make_backend("single"))
