"""Two levels fail as one: all ranks see a bad number or a lost rank, and error feedback is put back."""

from __future__ import annotations

import math

import pytest
import torch

from onebit.comm import Backend, CompressedAllreduce, InputError, TransportError, run_threads
from tests.comm import oracle
from tests.comm.nodes import CODEC, SHARED
from tests.comm.samples import SMALL_BUCKET, bits, normal


def test_a_number_that_is_not_finite_makes_all_ranks_see_nan_and_undo_puts_feedback_back(transport: str) -> None:
    def average(backend: Backend, bucket_mb: float) -> None:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2, bucket_mb=bucket_mb)
        for call in range(2):
            reduce(normal(backend.rank, call))
        before = reduce.state_dict()
        bad = normal(backend.rank, 2)
        if backend.rank == 3:
            bad[7] = math.nan
        work = reduce.start(bad)
        work.finish()
        assert not work.all_finite()
        work.undo()
        after = reduce.state_dict()
        for side in ("worker", "server"):
            # Recomputed from what was said: a sum and a difference of numbers below 8 are rounded.
            torch.testing.assert_close(after[side], before[side], rtol=0, atol=4 * 8 * oracle.UNIT)
        reduce(bad)
        assert bool(bad[:64].isnan().all())
        assert bool(bad[64:].isfinite().all())

    for bucket_mb in (16.0, SMALL_BUCKET):
        run_threads(4, average, bucket_mb)


def test_spoiled_and_staged_parts_work_as_on_one_level(transport: str) -> None:
    def average(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET)
        x, expected = normal(backend.rank), normal(backend.rank)
        CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2)(expected)
        assert len(reduce.parts) > 2
        work = reduce.start_with(*reduce.encoding([x]), send=False)
        work.send(0)
        for index in range(1, len(reduce.parts)):
            if backend.rank == 2:
                work.spoil(index)
            else:
                work.send(index)
            work.pass_on(index - 1)
        work.finish()
        assert not work.all_finite()
        work.undo()
        # Back to zero: a sum and a difference of numbers below 8 were rounded.
        assert all(float(part.abs().max()) <= 2 * 8 * oracle.UNIT for part in reduce.residual.worker)
        reduce.residual.reset()
        work = reduce.start_with(*reduce.encoding([x]), send=False)
        work.finish()
        assert bool(work.all_finite())
        work.decode([x])
        assert bits(x) == bits(expected)
        with pytest.raises(
            InputError, match="start_with\\(\\) with local_group= takes an encode that calls the one of"
        ):
            reduce.start_with(lambda part: None)

    run_threads(4, average)


def test_feedback_of_what_is_overwritten_is_put_back_from_a_mean_that_is_kept_and_else_forgotten(
    transport: str,
) -> None:
    def average(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2)
        reduce(normal(backend.rank, 0))
        before, rows = reduce.state_dict(), [normal(backend.rank, 1)]
        work = reduce.start_with(*reduce.encoding(rows), send=False)
        work.send(0)
        work.pass_on(0)
        rows[0].fill_(7.0)
        work.forget(0)
        work.finish()
        work.undo()
        after = reduce.state_dict()
        if transport == SHARED:  # the mean that was encoded was never written
            before["worker"].zero_()
        for side in ("worker", "server"):  # rounded as above
            torch.testing.assert_close(after[side], before[side], rtol=0, atol=4 * 8 * oracle.UNIT)

    run_threads(4, average)


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_rank_is_an_error_on_all_others_that_leaves_feedback_as_before(lost: int, transport: str) -> None:
    def lose(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET)
        reduce(normal(backend.rank))
        before = reduce.state_dict()
        if backend.rank == lost:
            return
        with pytest.raises(TransportError):
            reduce(normal(backend.rank, 1))
        after = reduce.state_dict()
        for side in ("worker", "server"):
            torch.testing.assert_close(after[side], before[side], rtol=0, atol=4 * 8 * oracle.UNIT)
        with pytest.raises(TransportError, match=r"an earlier .* of this group failed"):
            reduce(normal(backend.rank, 1))
        assert not backend.sound

    run_threads(4, lose, timeout=10.0)
