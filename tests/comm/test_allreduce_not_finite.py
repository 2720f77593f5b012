"""A number that is not finite is seen by every rank, in its block only, before anything changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.compress import SignCodec
from tests.comm import oracle
from tests.comm.samples import (
    CODECS,
    DTYPES,
    SMALL_BUCKET,
    arrays,
    bits,
    normal,
    samples,
    server_parts,
    trace,
    worker_parts,
)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_one_bad_number_on_one_rank_is_nan_on_all_ranks_in_its_block_only(
    world_size: int, dtype: torch.dtype, bad: float
) -> None:
    poisoned = slice(1024, 2048)
    guilty = world_size - 1

    def inputs(rank: int, call: int) -> list[Tensor]:
        tensors = [normal(rank, call).to(dtype), normal(rank, call, 1, numel=5).to(dtype)]
        if call == 1 and rank == guilty:
            tensors[0][1500] = bad
        return tensors

    seen = run_threads(world_size, trace, SignCodec(), 4, 16.0, inputs)
    clean = run_threads(world_size, trace, SignCodec(), 4, 16.0, lambda rank, call: [*map(_finite, inputs(rank, call))])
    expected = oracle.CompressedMean(world_size, [3000, 5])
    for call in range(4):
        means = expected([arrays(inputs(rank, call)) for rank in range(world_size)])
        for one in seen:
            output = one.outputs[call][0].clone()
            if call == 1:
                assert bool(output[poisoned].isnan().all())
                output[poisoned] = clean[0].outputs[call][0][poisoned]
            assert bool(output.isfinite().all())
            # The bad block's feedback takes another course from there; the others' must not notice.
            np.testing.assert_array_equal(np.isnan(means[0]), np.isnan(arrays(one.outputs[call])[0]))
            for part in (slice(0, 1024), slice(2048, 3000)):
                assert bits(output[part]) == bits(clean[0].outputs[call][0][part])
            assert bits(one.outputs[call][1]) == bits(clean[0].outputs[call][1])
            assert bits(one.outputs[call]) == bits(seen[0].outputs[call])
        assert not np.isnan(server_parts([one.states[call] for one in seen])[0]).any()
    held = worker_parts(seen[guilty].states[0])[0][poisoned]
    assert np.array_equal(worker_parts(seen[guilty].states[1])[0][poisoned], held)


def _finite(t: Tensor) -> Tensor:
    return torch.where(t.isfinite(), t, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_all_ranks_see_a_bad_number_before_anything_changes_and_can_undo(bad: float) -> None:
    def check(backend: Backend) -> list[bytes]:
        reduce = CompressedAllreduce(samples(0, 0), backend, CODECS["64 mean"], bucket_mb=SMALL_BUCKET)
        reduce(samples(backend.rank, 0))
        before = reduce.state_dict()
        tensors = samples(backend.rank, 1)
        if backend.rank == 1:
            tensors[5].view(-1)[900] = bad
        given = bits(tensors)
        work = reduce.start(tensors)
        work.finish()
        assert not work.all_finite()
        work.undo()
        assert bits(tensors) == given
        after = reduce.state_dict()
        largest = max(float(t.float().nan_to_num(0, 0, 0).abs().max()) for t in tensors if t.numel())
        for part in ("worker", "server"):  # the bound of the test of undo in test_allreduce_work, over all tensors
            assert float((after[part] - before[part]).abs().max()) <= 40 * oracle.UNIT * largest
        clean = samples(backend.rank, 2)
        reduce(clean)
        assert all(bool(t.isfinite().all()) for t in clean)
        return bits(clean)

    averaged = run_threads(3, check)
    assert averaged[0] == averaged[1] == averaged[2]
