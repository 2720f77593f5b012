"""What an average costs: bytes by the formula, two collectives, no waiting in vain, the same buffers every time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.compress import SignCodec
from tests.comm import oracle
from tests.comm.samples import SMALL_BUCKET, bits, normal, recorded, samples


def count_traffic(backend: Backend, numels: Sequence[int], block_size: int) -> tuple[int, int, int, int]:
    tensors = [normal(i, numel=n) for i, n in enumerate(numels)]
    reduce = CompressedAllreduce(tensors, backend, SignCodec(block_size=block_size))
    backend.traffic.reset()
    for _ in range(3):
        with recorded(backend) as sent:
            reduce(tensors)
        exchanged, gathered = map(len, sent)  # one rank's piece of the first stays where it is
        assert backend.traffic.wire_bytes % (exchanged - exchanged // backend.size + gathered * (backend.size - 1)) == 0
    stats = reduce.stats
    assert (stats.calls, stats.wire_bytes, stats.collectives) == (
        3,
        backend.traffic.wire_bytes,
        backend.traffic.collectives,
    )
    assert stats.dense_bytes == 3 * (2 * (backend.size - 1) * 4 * sum(numels) // backend.size)
    return stats.wire_bytes // 3, stats.collectives // 3, stats.wire_bytes % 3, stats.collectives % 3


@pytest.mark.parametrize("block_size", [64, 1024])
@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_wire_bytes_equal_the_formula_and_collectives_do_not_grow_with_the_number_of_tensors(
    world_size: int, block_size: int
) -> None:
    for numels in ([9000], [1], [5, 0, 3000, 1024, 2049], [7] * 100):
        per_rank = run_threads(world_size, count_traffic, numels, block_size)
        assert per_rank == [(oracle.wire_bytes(world_size, numels, block_size), 2, 0, 0)] * world_size


def test_31_times_fewer_bytes_than_fp32_are_sent_for_large_tensors() -> None:
    def sent(backend: Backend) -> float:
        reduce = CompressedAllreduce(torch.empty(1 << 18), backend)
        reduce(torch.zeros(1 << 18))
        return reduce.stats.dense_bytes / reduce.stats.wire_bytes

    # 4 bytes against 1/8 + 4/1024.
    assert run_threads(2, sent) == [pytest.approx(4 / (1 / 8 + 4 / 1024), rel=1e-9)] * 2


def test_one_rank_alone_gets_its_tensors_back_and_sends_nothing() -> None:
    def alone(backend: Backend) -> None:
        tensors, expected = samples(0, 0), bits(samples(0, 0))
        reduce = CompressedAllreduce(tensors, backend)
        for _ in range(2):
            work = reduce.start(tensors)
            assert bool(reduce.start(tensors).all_finite())  # nothing is in flight, so nothing can be disturbed
            work.wait()
            assert bits(tensors) == expected
        assert backend.traffic.wire_bytes == reduce.stats.wire_bytes == 0
        tensors[3][5] = math.nan
        assert not reduce.start(tensors).all_finite()

    run_threads(1, alone)


def test_buffers_keep_their_addresses_from_call_to_call() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend)
        handed: list[list[int]] = []
        original = type(backend)._all_to_all

        def note(output: Tensor, input: Tensor) -> object:
            handed[-1] += [output.data_ptr(), input.data_ptr()]
            return original(backend, output, input)

        backend._all_to_all = note  # type: ignore[method-assign]
        for call in range(3):
            handed.append([])
            reduce(samples(backend.rank, call))
        assert all(one == other for one, other in itertools.pairwise(handed))

    run_threads(2, check)


@pytest.mark.parametrize(
    ("bucket_mb", "overlap", "in_line"),
    [(16.0, False, ["all_to_all", "all_gather"]), (16.0, True, ["all_gather"]), (SMALL_BUCKET, False, [])],
    ids=["one bucket, waited for", "one bucket, overlapped", "several buckets"],
)
def test_a_collective_is_in_line_only_where_nothing_can_run_beside_it(
    monkeypatch: pytest.MonkeyPatch, bucket_mb: float, overlap: bool, in_line: list[str]
) -> None:
    def check(backend: Backend) -> list[str]:
        seen: list[str] = []
        for name in ("all_to_all", "all_gather"):

            def start(output: Tensor, input: Tensor, name: str = name) -> Any:
                seen.append(name)
                return getattr(backend, f"_{name}")(output, input)

            monkeypatch.setattr(backend, f"_{name}_in_line", start)
        reduce = CompressedAllreduce(normal(0), backend, bucket_mb=bucket_mb)
        reduce.start(normal(backend.rank), overlap=overlap).wait()
        return seen

    assert run_threads(2, check) == [in_line] * 2
