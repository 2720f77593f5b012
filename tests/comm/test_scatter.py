"""The two phases alone are the average together, each element belongs to one rank, and failures lose no feedback."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import (
    Backend,
    CompressedAllGather,
    CompressedAllreduce,
    CompressedReduceScatter,
    InputError,
    MismatchError,
    Residual,
    TransportError,
    compressed_all_gather,
    compressed_reduce_scatter,
    run_threads,
)
from onebit.compress import Int8Codec, SignCodec
from onebit.compress.codec import Codec
from tests.comm import oracle
from tests.comm.launcher import needs_mpi, run_ranks
from tests.comm.samples import CODECS, NUMELS, SMALL_BUCKET, SPECS, arrays, bits, normal, samples, state_bits

CALLS = 3
Objects = tuple[CompressedReduceScatter, CompressedAllGather]


def both(backend: Backend, like: list[Tensor], codec: Codec | None = None, bucket_mb: float = 16.0) -> Objects:
    scatter = CompressedReduceScatter(like, backend, codec, bucket_mb=bucket_mb)
    return scatter, CompressedAllGather(like, backend, codec, bucket_mb=bucket_mb, residual=scatter.residual)


def one_after_the_other(backend: Backend, codec: Codec, bucket_mb: float, masked: bool) -> None:
    like = samples(backend.rank, 0)
    reduce = CompressedAllreduce(like, backend, codec, bucket_mb=bucket_mb)
    scatter, gather = both(backend, like, codec, bucket_mb)
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.3 for shape, _, _ in SPECS]
    for average in (reduce, scatter, gather):
        average.set_mask(masks if masked else None)
    for call in range(CALLS):
        expected, given, out = samples(backend.rank, call), samples(backend.rank, call), samples(backend.rank, 99)
        reduce(expected)
        if call == 1:
            work = scatter.start(given)
            sent = gather.start(work.wait())
            sent.wait(out)
        else:
            gather(scatter(given), out)
        assert bits(out) == bits(expected)
        assert bits(given) == bits(samples(backend.rank, call))
        assert state_bits(gather.state_dict()) == state_bits(scatter.state_dict()) == state_bits(reduce.state_dict())
    phases = scatter.stats, gather.stats
    assert sum(s.wire_bytes for s in phases) == reduce.stats.wire_bytes
    assert sum(s.collectives for s in phases) == reduce.stats.collectives
    assert sum(s.dense_bytes for s in phases) == pytest.approx(reduce.stats.dense_bytes, abs=2 * CALLS)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_reduce_scatter_then_all_gather_is_the_average_bit_for_bit(world_size: int, codec: SignCodec) -> None:
    for bucket_mb, masked in ((16.0, False), (SMALL_BUCKET, True)):
        run_threads(world_size, one_after_the_other, codec, bucket_mb, masked)


@pytest.mark.parametrize("kind", ["gloo", pytest.param("mpi", marks=[pytest.mark.mpi, needs_mpi])])
def test_processes_do_the_same(kind: str) -> None:
    run_ranks(kind, 3, one_after_the_other, CODECS["64 mean"], SMALL_BUCKET, True)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_are_the_mean_of_what_ranks_have_said_and_spans_tell_which_elements(world_size: int) -> None:
    def scatter(backend: Backend) -> tuple[list[tuple[int, int, int]], Tensor, dict[str, Any]]:
        reduce_scatter = CompressedReduceScatter(samples(0, 0), backend, CODECS["64 mean"], bucket_mb=SMALL_BUCKET)
        shard = reduce_scatter(samples(backend.rank, 0))
        assert shard.shape == (reduce_scatter.shard_numel,)
        return list(reduce_scatter.spans), shard, reduce_scatter.state_dict()

    per_rank = run_threads(world_size, scatter)
    mean = [np.full(n, np.nan) for n in NUMELS]
    for spans, shard, _ in per_rank:
        for (tensor, offset, numel), piece in zip(spans, torch.split(shard, [s[2] for s in spans]), strict=True):
            assert np.isnan(mean[tensor][offset : offset + numel]).all(), "two ranks have one element"
            mean[tensor][offset : offset + numel] = piece.numpy()
    given = [arrays(samples(rank, 0)) for rank in range(world_size)]
    for t in range(len(NUMELS)):
        held = [np.zeros(NUMELS[t])] * world_size
        if world_size > 1:
            starts = np.cumsum([0, *NUMELS])
            held = [state["worker"].double().numpy()[starts[t] : starts[t + 1]] for _, _, state in per_rank]
        exact = np.mean([x[t] - unsaid for x, unsaid in zip(given, held, strict=True)], axis=0)
        largest = max([1e-30, *(np.abs(part).max(initial=0) for part in (*held, *(x[t] for x in given)))])
        # Residuals and shares are rounded once on each rank, and so are their sums.
        assert np.abs(mean[t] - exact).max(initial=0) <= 4 * world_size * oracle.UNIT * largest


def test_a_single_tensor_is_cut_into_equal_runs_of_blocks() -> None:
    def spans(backend: Backend) -> list[tuple[int, int, int]]:
        assert compressed_reduce_scatter(torch.zeros(5000), backend=backend).numel() in (2048, 904)
        return list(CompressedReduceScatter(torch.zeros(5000), backend).spans)

    assert run_threads(3, spans) == [[(0, 0, 2048)], [(0, 2048, 2048)], [(0, 4096, 904)]]


def test_the_functions_keep_error_feedback_in_one_object_and_forget_it_without() -> None:
    def average(backend: Backend) -> None:
        residual, reduce = Residual(), CompressedAllreduce(normal(0), backend)
        for call in range(2):
            x, out = normal(backend.rank, call), torch.empty(3000)
            shard = compressed_reduce_scatter(x, residual, backend=backend)
            assert compressed_all_gather(shard, out, residual, backend=backend) is out
            reduce(x)
            assert bits(out) == bits(x)
        first = compressed_reduce_scatter(normal(backend.rank), backend=backend)
        assert bits(first) == bits(compressed_reduce_scatter(normal(backend.rank), backend=backend))

    run_threads(2, average)


def test_lists_without_elements_and_more_ranks_than_blocks() -> None:
    def average(backend: Backend, like: list[Tensor]) -> None:
        for codec in (SignCodec(), Int8Codec()):
            scatter, gather = both(backend, like, codec)
            out = [torch.full_like(t, 7.0) for t in like]
            gather(scatter(like), out)
            assert all(bool((t == 0).all()) for t in out)

    for like in ([], [torch.empty(0)], [torch.zeros(5)], [torch.zeros(()), torch.zeros(0, 3)]):
        for world_size in (1, 3):
            run_threads(world_size, average, like)


def test_a_number_that_is_not_finite_makes_its_block_nan_and_keeps_its_feedback() -> None:
    def average(backend: Backend) -> None:
        like = [torch.zeros(3000)]
        scatter, gather = both(backend, like)
        out = [torch.zeros(3000)]
        gather(scatter([normal(backend.rank)]), out)
        before = state_bits(scatter.state_dict())
        bad = normal(backend.rank, 1)
        bad[:] = math.inf if backend.rank == 1 else bad
        shard = scatter([bad])
        assert bool(shard.isnan().all())
        gather(shard, out)
        assert bool(out[0].isnan().all())
        after = state_bits(scatter.state_dict())
        assert after["server"] == before["server"]
        assert (after["worker"] == before["worker"]) == (backend.rank == 1)

    run_threads(3, average)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    def refuse(backend: Backend) -> None:
        scatter, gather = both(backend, [torch.zeros(3000)])
        where = f"rank {backend.rank}: "
        numel = gather.shard_numel
        for shard in (torch.zeros(numel + 1), torch.zeros(numel, dtype=torch.float64), torch.zeros(1, numel), 3.0):
            with pytest.raises(InputError, match=rf"{where}the shard must be float32 \({numel},\) on cpu, .*, got "):
                gather.start(shard)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="when this average was made"):
            scatter.start(torch.zeros(2999))
        work = scatter.start(normal(backend.rank))
        with pytest.raises(InputError, match=where + "start\\(\\) again before the last work's wait"):
            scatter.start(normal(backend.rank))
        sent = gather.start(work.wait())
        with pytest.raises(InputError, match="when this average was made"):
            sent.wait(torch.zeros(2999))
        sent.wait(torch.zeros(3000))
        with pytest.raises(InputError, match="this Residual holds the error feedback of 1 tensors with 3000 elements"):
            CompressedAllGather(torch.zeros(99), backend, residual=scatter.residual)
        with pytest.raises(MismatchError, match="do not agree on the number of tensors"):
            CompressedReduceScatter([torch.zeros(3)] * (1 + backend.rank), backend)

    run_threads(2, refuse)


@pytest.mark.parametrize("phase", ["scatter", "gather"])
def test_after_a_lost_rank_error_feedback_is_as_before(phase: str) -> None:
    def lose(backend: Backend) -> None:
        scatter, gather = both(backend, [torch.zeros(3000)])
        shard = scatter([normal(backend.rank)])
        gather(shard, [torch.zeros(3000)])
        before = scatter.state_dict()
        if backend.rank == 2:
            return
        work = scatter.start([normal(backend.rank, 1)]) if phase == "scatter" else gather.start(shard)
        with pytest.raises(TransportError, match="rank 2 has returned"):
            work.wait() if phase == "scatter" else work.wait([torch.zeros(3000)])
        after = scatter.state_dict()
        for side in ("worker", "server"):
            # A sum and a difference of numbers below 8 are rounded.
            torch.testing.assert_close(after[side], before[side], rtol=0, atol=2 * 8 * oracle.UNIT)
        with pytest.raises(TransportError, match="an earlier"):
            scatter([normal(backend.rank)])

    run_threads(3, lose)
