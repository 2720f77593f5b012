"""An average that was started: its tensors change at wait and not before, and undo puts everything back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onebit.comm import Backend, CompressedAllreduce, InputError, run_threads
from onebit.compress import SignCodec
from tests.comm import oracle
from tests.comm.samples import (
    CODECS,
    NUMELS,
    SMALL_BUCKET,
    arrays,
    bits,
    normal,
    residual_bits,
    samples,
    server_parts,
    state_bits,
    trace,
    worker_parts,
)


def test_tensors_change_at_wait_and_not_before() -> None:
    def check(backend: Backend) -> list[bytes]:
        reduce = CompressedAllreduce(samples(0, 0), backend, CODECS["64 mean"], bucket_mb=SMALL_BUCKET)
        tensors = samples(backend.rank, 0)
        given = bits(tensors)
        work = reduce.start(tensors)
        assert bits(tensors) == given
        work.wait()
        return bits(tensors)

    expected = run_threads(3, trace, CODECS["64 mean"], 1)
    assert run_threads(3, check) == [bits(seen.outputs[0]) for seen in expected]


def test_a_second_start_before_wait_is_refused_and_disturbs_nothing() -> None:
    def check(backend: Backend) -> list[bytes]:
        reduce = CompressedAllreduce(samples(0, 0), backend, CODECS["64 mean"])
        tensors, others = samples(backend.rank, 0), samples(backend.rank, 1)
        work = reduce.start(tensors)
        with pytest.raises(InputError, match=rf"rank {backend.rank}: start\(\) again before the last work's wait"):
            reduce.start(others)
        work.wait()
        assert bits(others) == bits(samples(backend.rank, 1))
        reduce(others)
        return bits(tensors) + bits(others)

    expected = run_threads(2, trace, CODECS["64 mean"], 2)
    assert run_threads(2, check) == [bits(seen.outputs[0]) + bits(seen.outputs[1]) for seen in expected]


def test_finish_decode_writes_to_other_tensors_and_leaves_the_given_ones() -> None:
    def check(backend: Backend) -> list[bytes]:
        reduce = CompressedAllreduce(samples(0, 0), backend, CODECS["64 mean"], bucket_mb=SMALL_BUCKET)
        tensors = samples(backend.rank, 0)
        out = [torch.full_like(t, 7.0) for t in tensors]
        work = reduce.start(tensors)
        work.finish()
        assert bool(work.all_finite())
        assert bits(tensors) == bits(samples(backend.rank, 0))
        assert all(bool((t == 7.0).all()) for t in out)
        with pytest.raises(InputError, match=f"rank {backend.rank}: made for"):
            work.decode(out[:1])
        work.decode(out)
        assert bits(tensors) == bits(samples(backend.rank, 0))
        later = samples(backend.rank, 1)
        reduce(later)
        return bits(out) + bits(later)

    expected = run_threads(3, trace, CODECS["64 mean"], 2)
    assert run_threads(3, check) == [bits(seen.outputs[0]) + bits(seen.outputs[1]) for seen in expected]


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_undo_puts_the_error_feedback_back_and_leaves_the_tensors(
    world_size: int, masked: bool, codec: SignCodec
) -> None:
    masks = [t.float() < -0.5 for t in samples(99, 99)] if masked else None

    def check(backend: Backend) -> list[dict[str, Any]]:
        reduce = CompressedAllreduce(samples(0, 0), backend, codec, bucket_mb=SMALL_BUCKET)
        reduce.set_mask(masks)
        reduce(samples(backend.rank, 0))
        before = reduce.state_dict()
        tensors = samples(backend.rank, 1)
        work = reduce.start(tensors)
        work.finish()
        during = reduce.state_dict()
        work.undo()
        after = reduce.state_dict()
        assert bits(tensors) == bits(samples(backend.rank, 1))
        work.undo()
        assert state_bits(reduce.state_dict()) == state_bits(after)
        reduce(samples(backend.rank, 1))
        return [before, during, after]

    per_rank = run_threads(world_size, check)
    inputs = [arrays(samples(rank, 1)) for rank in range(world_size)]
    workers = [[worker_parts(states[time]) for states in per_rank] for time in range(3)]
    servers = [server_parts([states[time] for states in per_rank]) for time in range(3)]
    for t, numel in enumerate(NUMELS):
        parts = [
            *(x[t] for x in inputs),
            *(w[t] for moment in workers for w in moment),
            *(server[t] for server in servers),
        ]
        largest = max(np.abs(part).max(initial=0) for part in parts)
        # Forth: c and the new residual; back: two sums. All of at most two numbers that are no larger than `largest`,
        # as is what they differ by, the scale. On the server come n shares and their sum, formed both ways.
        bound = oracle.UNIT * 2 * largest
        for rank in range(world_size):
            assert np.all(np.abs(workers[2][rank][t] - workers[0][rank][t]) <= 4 * bound), (t, rank)
        assert np.all(np.abs(servers[2][t] - servers[0][t]) <= (4 + 4 * world_size) * bound), t
        if numel > 2:
            assert np.abs(workers[1][0][t] - workers[0][0][t]).max() > 1e3 * bound


def test_undo_after_a_wait_that_is_over_changes_nothing() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(torch.empty(3000), backend)
        work = reduce.start(normal(backend.rank))
        work.wait()
        state = residual_bits(reduce.residual)
        work.undo()
        assert residual_bits(reduce.residual) == state

    run_threads(2, check)


def test_results_do_not_depend_on_which_of_two_averages_is_waited_for_first() -> None:
    def both(backend: Backend, swapped: bool) -> list[bytes]:
        pair = [CompressedAllreduce(torch.empty(3000), backend) for _ in range(2)]
        tensors = [normal(backend.rank, i) for i in range(2)]
        works = [reduce.start(t) for reduce, t in zip(pair, tensors, strict=True)]
        for work in reversed(works) if swapped else works:
            work.wait()
        return bits(tensors)

    assert run_threads(3, both, False) == run_threads(3, both, True)
