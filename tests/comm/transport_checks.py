"""What a rank asks of any transport, over threads, processes and alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from onebit.comm.backend import SUMMABLE, Backend, Work
from onebit.comm.errors import BackendError
from onebit.comm.torch_backend import SMALL_GATHER
from tests.comm.known_bytes import (
    DTYPES,
    as_bytes,
    blank,
    bytes_of,
    exchanged,
    gathered,
    start_all_gather,
    start_all_to_all,
)

# Elements in one piece: one, odd, and more bytes than what transports send eagerly.
PIECES = (1, 7, 12_001)
LARGE = SMALL_GATHER // 2 + 1  # bytes that two ranks cannot gather by Gloo's way for little ones


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
    cpu = torch.device("cpu")
    buffers: list[Callable[[], object]] = [lambda: backend.buffer(-1, cpu), lambda: backend.buffer(2.0, cpu)]  # type: ignore[arg-type]
    if backend.device_type is not None:
        buffers.append(lambda: backend.buffer(16, torch.device("meta")))
    for call in buffers:
        with pytest.raises(BackendError, match=f"rank {backend.rank}: buffer "):
            call()
    assert backend.traffic.collectives == 0
    backend.barrier()


def check_prepared_collectives_start_again_and_again(backend: Backend) -> None:
    k = 1000
    received, everyone = torch.zeros(2, backend.size * k)
    sent, mine = torch.zeros(backend.size * k), torch.zeros(k)
    backend.traffic.reset()
    exchange, gather = backend.prepare_all_to_all(received, sent), backend.prepare_all_gather(everyone, mine)
    lent = backend.buffer(5, sent.device)
    assert (lent.dtype, lent.device, lent.tolist()) == (torch.uint8, sent.device, [0] * 5)
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
