"""The uncompressed average: a mean within fp32's rounding, the same bits however it is carried."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, DenseAllreduce, InputError, run_threads
from tests.comm import oracle
from tests.comm.launcher import GLOO, MPI
from tests.comm.samples import DTYPES, NUMELS, SMALL_BUCKET, SPECS, Trace, arrays, bits, dense_trace, normal, samples

SIZES = (1, 2, 3, 4, 5, 7, 8)


@pytest.mark.parametrize("world_size", SIZES)
def test_the_mean_is_that_of_float64_to_within_rounding_and_the_same_on_all_ranks(world_size: int) -> None:
    per_rank = run_threads(world_size, dense_trace)
    for call in range(2):
        given = [arrays(samples(rank, call)) for rank in range(world_size)]
        slack = oracle.dense_slack(given)
        for t, mean in enumerate(oracle.dense_mean(given)):
            out = per_rank[0].outputs[call][t]
            # Half a unit of the tensor's dtype comes on top, at least half of its smallest number.
            unit = torch.finfo(out.dtype).eps / 2
            rounding = unit * (np.abs(mean) + slack[t]) + unit * torch.finfo(out.dtype).smallest_normal
            assert np.all(np.abs(arrays([out])[0] - mean) <= slack[t] + rounding), t
        for seen in per_rank:
            assert bits(seen.outputs[call]) == bits(per_rank[0].outputs[call])


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("bucket_mb", [1e-9, 2.0**-12, SMALL_BUCKET])
def test_the_bucket_size_changes_no_bit(world_size: int, bucket_mb: float) -> None:
    numels = [3, 0, 1, 67] if bucket_mb < 2.0**-18 else NUMELS  # one element a bucket is slow

    def average(backend: Backend, bucket_mb: float) -> list[bytes]:
        tensors = [normal(backend.rank, i, numel=n).to(DTYPES[i % 3]) for i, n in enumerate(numels)]
        DenseAllreduce(tensors, backend, bucket_mb=bucket_mb)(tensors)
        return bits(tensors)

    assert run_threads(world_size, average, bucket_mb) == run_threads(world_size, average, 16.0)


@pytest.mark.parametrize(("kind", "world_size"), [*GLOO, *MPI])
def test_processes_send_the_same_bytes_as_threads_and_end_with_the_same_bits(
    process_traces: Callable[[str, int], list[dict[str, Trace]]], kind: str, world_size: int
) -> None:
    per_rank = process_traces(kind, world_size)
    for name, bucket_mb in (("dense", 16.0), ("dense, small buckets", SMALL_BUCKET)):
        for seen, expected in zip(per_rank, run_threads(world_size, dense_trace, bucket_mb), strict=True):
            assert seen[name].sent == expected.sent
            assert list(map(bits, seen[name].outputs)) == list(map(bits, expected.outputs))
            source = world_size - 1
            assert bits(seen[name].outputs[2]) == bits(samples(source, 2)), "broadcast"


@pytest.mark.parametrize("world_size", [2, 3])
def test_half_precision_is_summed_in_fp32_where_its_own_sum_would_overflow(world_size: int) -> None:
    def average(backend: Backend) -> list[float]:
        x = torch.full((3,), 60000.0, dtype=torch.float16)
        DenseAllreduce(x, backend)(x)
        return [float(v) for v in x]

    assert run_threads(world_size, average) == [[60000.0] * 3] * world_size


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_spoils_its_own_element_on_all_ranks_and_nothing_else(bad: float) -> None:
    def average(backend: Backend) -> Tensor:
        x = normal(backend.rank)
        if backend.rank == 1:
            x[1234] = bad
        DenseAllreduce(x, backend)(x)
        return x

    for x in run_threads(3, average):
        assert not x[1234].isfinite()
        assert int(x.isfinite().sum()) == 2999


def test_out_takes_the_mean_and_the_given_tensors_stay() -> None:
    def average(backend: Backend) -> list[bytes]:
        reduce = DenseAllreduce(samples(0, 0), backend)
        tensors, out = samples(backend.rank, 0), samples(99, 0)
        reduce(tensors, out)
        assert bits(tensors) == bits(samples(backend.rank, 0))
        with pytest.raises(InputError, match=f"rank {backend.rank}: made for {len(SPECS)} tensors, called with 1"):
            reduce.start(tensors[:1])
        work = reduce.start(tensors)
        for t in tensors:
            t.zero_()  # they were read before start returned
        with pytest.raises(InputError, match=rf"rank {backend.rank}: start\(\) again before the last work's wait"):
            reduce.start(tensors)
        with pytest.raises(InputError, match="made for"):
            work.wait(out[:1])
        work.wait()
        assert bits(tensors) == bits(out)
        return bits(out)

    for world_size in (1, 2, 3):
        if world_size > 1:
            expected = run_threads(world_size, dense_trace)
            assert run_threads(world_size, average) == [bits(seen.outputs[0]) for seen in expected]


def test_one_rank_alone_keeps_its_bits_and_sends_nothing() -> None:
    def average(backend: Backend) -> None:
        tensors, out = samples(0, 0), samples(1, 0)
        reduce = DenseAllreduce(tensors, backend)
        reduce(tensors)
        assert bits(tensors) == bits(samples(0, 0))
        reduce(tensors, out)
        assert bits(out) == bits(tensors)
        assert (backend.traffic.wire_bytes, reduce.stats.wire_bytes, reduce.stats.dense_bytes) == (0, 0, 0)

    run_threads(1, average)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_it_sends_what_a_bandwidth_optimal_allreduce_sends_in_two_collectives_a_bucket(world_size: int) -> None:
    def average(backend: Backend, numels: list[int], bucket_mb: float) -> tuple[int, int, int]:
        tensors = [torch.zeros(n) for n in numels]
        reduce = DenseAllreduce(tensors, backend, bucket_mb=bucket_mb)
        backend.traffic.reset()
        reduce(tensors)
        assert backend.traffic.wire_bytes == reduce.stats.wire_bytes
        return reduce.stats.wire_bytes, reduce.stats.dense_bytes, reduce.stats.collectives

    # 2(n - 1)/n of 4 bytes an element; each bucket is filled up to a multiple of the number of ranks.
    each = 2 * (world_size - 1) * 4
    for numels in ([10_000], [7] * 300, [0, 1, 0]):
        total = sum(numels)
        exact = each * total // world_size
        whole = (each * math.ceil(total / world_size), exact, 2)
        assert run_threads(world_size, average, numels, 16.0) == [whole] * world_size
        parts = [min(512, total - start) for start in range(0, total, 512)]
        cut = (sum(each * math.ceil(part / world_size) for part in parts), exact, 2 * len(parts))
        assert run_threads(world_size, average, numels, SMALL_BUCKET) == [cut] * world_size


def test_lists_without_elements_are_averaged() -> None:
    def average(backend: Backend, tensors: list[Tensor]) -> None:
        DenseAllreduce(tensors, backend)(tensors)

    for tensors in ([], [torch.empty(0)], [torch.empty(0, 3), torch.empty(0, dtype=torch.float16)]):
        run_threads(2, average, tensors)
