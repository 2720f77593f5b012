"""The compressed average: right by a float64 oracle, the same bits on every rank and transport, safe from bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebit.comm import (
    Backend,
    CompressedAllreduce,
    InputError,
    Part,
    Residual,
    TransportError,
    compressed_allreduce,
    run_threads,
)
from onebit.compress import SignCodec
from tests.comm import oracle
from tests.comm.launcher import GLOO, MPI
from tests.comm.samples import (
    CODECS,
    NUMELS,
    SMALL_BUCKET,
    SPECS,
    Trace,
    arrays,
    bits,
    normal,
    recorded,
    residual_bits,
    samples,
    server_parts,
    state_bits,
    trace,
    traces,
    worker_parts,
)

SIZES = (1, 2, 3, 4, 5, 7, 8)
CALLS = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# The longest sum is of a block of 1024, in rows of 128: 8 + 7 roundings. With what comes before and after it, encode
# and reduce_encode together round fewer than 32 + n times, and a call may carry an old error on twice: in c and in the
# scale that is taken from it. Errors do not conspire that far, so twice of what one call adds is allowed per call made.
# A wrong sign, element or residual is off by a whole scale, thousands of times more.
def tolerance(world_size: int, call: int, largest: float) -> float:
    return 2 * (call + 1) * (32 + world_size) * oracle.UNIT * largest


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute error of a rounding to `dtype`: twice half a unit, for what is rounded is off as well."""
    return torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("world_size", SIZES)
def test_means_and_error_feedback_follow_the_float64_oracle_call_after_call(world_size: int, codec: SignCodec) -> None:
    per_rank = run_threads(world_size, trace, codec, CALLS)
    expected = oracle.CompressedMean(world_size, NUMELS, codec.block_size, codec.scale)
    largest = np.zeros(len(NUMELS))
    for call in range(CALLS):
        given = [arrays(samples(rank, call)) for rank in range(world_size)]
        means = expected(given)
        for t, (mean, (_, dtype, _)) in enumerate(zip(means, SPECS, strict=True)):
            held = [*(x[t] for x in given), *(worker[t] for worker in expected.worker), expected.server[t]]
            largest[t] = max([largest[t], *(float(np.abs(part).max(initial=0)) for part in held)])
            slack = tolerance(world_size, call, largest[t])
            relative, absolute = (0.0, 0.0) if dtype == torch.float32 else rounding(dtype)
            for seen in per_rank:
                error = np.abs(arrays(seen.outputs[call])[t] - mean)
                assert np.all(error <= slack + relative * np.abs(mean) + absolute), (call, t, expected.closest)
            if world_size > 1:
                for rank, seen in enumerate(per_rank):
                    error = np.abs(worker_parts(seen.states[call])[t] - expected.worker[rank][t])
                    assert np.all(error <= slack), (call, t, rank, expected.closest)
                error = np.abs(server_parts([seen.states[call] for seen in per_rank])[t] - expected.server[t])
                assert np.all(error <= slack), (call, t, expected.closest)


@pytest.mark.parametrize("bucket_mb", [16.0, SMALL_BUCKET])
@pytest.mark.parametrize("world_size", SIZES)
def test_every_rank_gets_the_same_bits(world_size: int, bucket_mb: float) -> None:
    first, *others = run_threads(world_size, trace, SignCodec(block_size=64), 3, bucket_mb)
    for seen in others:
        assert [bits(out) for out in seen.outputs] == [bits(out) for out in first.outputs]


@pytest.mark.parametrize(("kind", "world_size"), [*GLOO, *MPI])
def test_processes_exchange_the_same_bytes_as_threads_and_end_with_the_same_bits(
    process_traces: Callable[[str, int], list[dict[str, Trace]]], kind: str, world_size: int
) -> None:
    per_rank = process_traces(kind, world_size)
    for seen, expected in zip(per_rank, run_threads(world_size, traces), strict=True):
        for name, reference in expected.items():
            assert seen[name].sent == reference.sent, f"payloads, {name}"
            assert list(map(bits, seen[name].outputs)) == list(map(bits, reference.outputs)), f"means, {name}"
            assert state_bits(seen[name].states) == state_bits(reference.states), f"residuals, {name}"


@settings(max_examples=40)
@given(
    world_size=st.sampled_from((2, 3, 4, 5, 7, 8)),
    codec=st.sampled_from(list(CODECS.values())),
    numels=st.lists(st.sampled_from((0, 1, 2, 63, 64, 65, 1023, 1025)) | st.integers(0, 2500), min_size=1, max_size=6),
    data=st.data(),
)
def test_bucket_size_neighbours_and_order_change_no_bit(
    world_size: int, codec: SignCodec, numels: list[int], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(numels))))
    kept = data.draw(st.integers(1, len(numels)))
    bucket_mb = data.draw(st.sampled_from((2.0**-14, 2.0**-10, 2.0**-8, 1.0)))
    masked = data.draw(st.booleans())
    assume(any(numels[i] for i in order[:kept]))

    def average(backend: Backend, indices: Sequence[int], bucket_mb: float) -> Trace:
        seen = Trace()

        def inputs(call: int) -> list[Tensor]:
            return [normal(i, backend.rank, call, numel=numels[i]).to(DTYPES[i % 3]) for i in indices]

        reduce = CompressedAllreduce(inputs(0), backend, codec, bucket_mb=bucket_mb)
        reduce.set_mask([normal(i, numel=numels[i]) < -0.5 for i in indices] if masked else None)
        for call in range(2):
            tensors = inputs(call)
            reduce(tensors)
            seen.outputs.append(tensors)
        seen.states.append(reduce.state_dict())
        return seen

    all_in_one = run_threads(world_size, average, range(len(numels)), 16.0)
    otherwise = run_threads(world_size, average, order[:kept], bucket_mb)
    servers = [server_parts([seen.states[0] for seen in side]) for side in (all_in_one, otherwise)]
    for place, index in enumerate(order[:kept]):
        assert np.array_equal(servers[0][index], servers[1][place])
        for one, other in zip(all_in_one, otherwise, strict=True):
            assert np.array_equal(worker_parts(one.states[0])[index], worker_parts(other.states[0])[place])
            for call in range(2):
                assert bits(one.outputs[call][index]) == bits(other.outputs[call][place])


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_what_is_not_said_is_kept_so_that_nothing_is_lost(world_size: int, codec: SignCodec) -> None:
    def inputs(rank: int, call: int) -> list[Tensor]:
        return [normal(rank, call), normal(rank, call, 1, numel=1), normal(rank, call, 2, numel=77) * 1e-3]

    seen = run_threads(world_size, trace, codec, 4, 16.0, inputs)
    workers, server = [[np.zeros(n) for n in (3000, 1, 77)]] * world_size, [np.zeros(n) for n in (3000, 1, 77)]
    for call in range(4):
        given = [arrays(inputs(rank, call)) for rank in range(world_size)]
        outputs = arrays(seen[0].outputs[call])
        new_workers = [worker_parts(one.states[call]) for one in seen]
        new_server = server_parts([one.states[call] for one in seen])
        for t in range(3):
            before = np.mean([x[t] + w[t] for x, w in zip(given, workers, strict=True)], axis=0) + server[t]
            after = outputs[t] + np.mean([w[t] for w in new_workers], axis=0) + new_server[t]
            held = [
                *(x[t] for x in given),
                *(w[t] for w in (*workers, *new_workers)),
                outputs[t],
                server[t],
                new_server[t],
            ]
            # Per rank c and its new residual are rounded; on the server n shares, their sum, c and the new residual.
            bound = (2 + 2 * world_size + 2) * oracle.UNIT * 2 * max(np.abs(part).max() for part in held)
            assert np.abs(before - after).max() <= bound
        workers, server = new_workers, new_server


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


def test_a_parameter_that_requires_grad_is_averaged_in_place() -> None:
    def average(backend: Backend) -> bytes:
        parameter = torch.nn.Parameter(normal(backend.rank))
        CompressedAllreduce(parameter, backend)(parameter)
        assert parameter.grad_fn is None
        return bits(parameter)[0]

    averaged = run_threads(2, average)
    assert averaged[0] == averaged[1] != bits(normal(0))[0]


def test_lists_without_elements_are_averaged_and_saved() -> None:
    def average(backend: Backend, tensors: list[Tensor]) -> None:
        reduce = CompressedAllreduce(tensors, backend)
        reduce.load_state_dict(reduce.state_dict())
        reduce(tensors)
        work = reduce.start(tensors)
        work.finish()
        assert bool(work.all_finite())
        work.undo()
        assert float(reduce.residual.norm()) == 0.0
        state = reduce.state_dict()
        reduce.load_state_dict(state)
        CompressedAllreduce(tensors, backend).load_state_dict(state)

    for tensors in ([], [torch.empty(0)], [torch.empty(0, 3), torch.empty(0, dtype=torch.float16)]):
        run_threads(2, average, tensors)


# --- started and not yet waited for


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


def test_other_tensors_than_it_was_made_for_are_refused_and_nothing_changes() -> None:
    def check(backend: Backend) -> None:
        like = [torch.zeros(5), torch.zeros(2, 3)]
        reduce = CompressedAllreduce(like, backend)
        wrong: list[tuple[list[Tensor], str]] = [
            ([torch.ones(5)], "made for 2 tensors, called with 1"),
            ([torch.ones(5), torch.ones(6)], r"tensor 1 was float32 \(2, 3\).*is float32 \(6,\)"),
            ([torch.ones(5).half(), torch.ones(2, 3)], r"tensor 0 was float32 \(5,\).*is float16 \(5,\)"),
        ]
        for tensors, message in wrong:
            with pytest.raises(InputError, match=f"rank {backend.rank}: {message}"):
                reduce(tensors)
            assert all(bool((t == 1).all()) for t in tensors)
        with pytest.raises(InputError, match="expected a tensor or a list of tensors, got str at position 1"):
            reduce([torch.ones(5), "x"])  # type: ignore[list-item]
        assert reduce.stats.calls == 0
        assert float(reduce.residual.norm()) == 0.0

    run_threads(2, check)


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


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("operation", ["_all_to_all", "_all_gather"])
def test_a_transport_that_fails_leaves_tensors_as_they_are_and_puts_feedback_back(
    operation: str, codec: SignCodec
) -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend, codec)
        reduce(samples(backend.rank, 0))
        before = reduce.state_dict()
        tensors = samples(backend.rank, 1)
        setattr(backend, operation, lambda output, input: 1 / 0)
        with pytest.raises(TransportError, match=f"rank {backend.rank}: {operation[1:]} did not complete"):
            reduce(tensors)
        delattr(backend, operation)
        assert bits(tensors) == bits(samples(backend.rank, 1))
        after = reduce.state_dict()
        for part in ("worker", "server"):  # the bound of the test of undo, over all tensors
            largest = 2 * max(float(state[part].abs().max()) if state[part].numel() else 0 for state in (before, after))
            largest += max(float(t.float().abs().max()) for t in tensors if t.numel())
            assert torch.allclose(after[part], before[part], rtol=0, atol=20 * oracle.UNIT * largest)
        with pytest.raises(TransportError, match=f"an earlier {operation[1:]} of this group failed"):
            reduce(tensors)
        assert bits(tensors) == bits(samples(backend.rank, 1))

    run_threads(2, check)


def test_a_rank_that_ends_fails_the_others_calls_and_their_feedback_is_put_back() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend, bucket_mb=SMALL_BUCKET)
        reduce(samples(backend.rank, 0))
        if backend.rank == 1:
            return
        before = reduce.state_dict()
        tensors = samples(backend.rank, 1)
        for _ in range(2):
            with pytest.raises(TransportError, match=f"rank {backend.rank}: .* did not complete"):
                reduce(tensors)
            assert bits(tensors) == bits(samples(backend.rank, 1))
        largest = 2 * float(before["worker"].abs().max()) + max(float(t.abs().max()) for t in tensors if t.numel())
        assert torch.allclose(reduce.state_dict()["worker"], before["worker"], rtol=0, atol=20 * oracle.UNIT * largest)

    run_threads(3, check)


# --- numbers that are not finite


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
        for part in ("worker", "server"):  # the bound of the test of undo, over all tensors
            assert float((after[part] - before[part]).abs().max()) <= 40 * oracle.UNIT * largest
        clean = samples(backend.rank, 2)
        reduce(clean)
        assert all(bool(t.isfinite().all()) for t in clean)
        return bits(clean)

    averaged = run_threads(3, check)
    assert averaged[0] == averaged[1] == averaged[2]


# --- masks


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_masked_elements_count_for_nothing_and_become_zero(world_size: int, codec: SignCodec) -> None:
    masks = [normal(5) < 0.0, torch.ones(100, dtype=torch.bool), torch.zeros(70, dtype=torch.bool)]
    numels = [m.numel() for m in masks]

    def inputs(rank: int, call: int) -> list[Tensor]:
        tensors = [normal(rank, call, i, numel=n) for i, n in enumerate(numels)]
        tensors[0][masks[0]] = 1e30  # would drown every scale
        return tensors

    def check(backend: Backend) -> list[Tensor]:
        reduce = CompressedAllreduce(inputs(0, 0), backend, codec)
        reduce.set_mask(masks)
        outputs = []
        for call in range(3):
            tensors = inputs(backend.rank, call)
            reduce(tensors)
            outputs += tensors
        if world_size > 1:
            worker = torch.split(reduce.state_dict()["worker"], numels)
            assert all(bool((w[m] == 0).all()) for w, m in zip(worker, masks, strict=True))
        reduce.set_mask(None)
        tensors = inputs(backend.rank, 3)
        reduce(tensors)
        assert bool((tensors[1] != 0).all())
        return outputs

    per_rank = run_threads(world_size, check)
    expected = oracle.CompressedMean(world_size, numels, codec.block_size, codec.scale, [m.numpy() for m in masks])
    for call in range(3):
        means = expected([arrays(inputs(rank, call)) for rank in range(world_size)])
        for outputs in per_rank:
            for mean, mask, out in zip(means, masks, outputs[3 * call :], strict=False):
                assert bool((out[mask] == 0).all())
                assert np.abs(arrays([out])[0] - mean).max() <= tolerance(world_size, call, 10.0)  # no |c| is above 10


def test_wrong_masks_are_refused_and_the_average_goes_on_without() -> None:
    def check(backend: Backend) -> list[bytes]:
        reduce = CompressedAllreduce([torch.empty(3000), torch.empty(7)], backend)
        wrong: list[tuple[list[Tensor], str]] = [
            ([torch.zeros(3000, dtype=torch.bool)], "expected 2 masks"),
            ([torch.ones(3000), torch.ones(7)], "bool"),
            ([torch.ones(3000, dtype=torch.bool), torch.ones(6, dtype=torch.bool)], "6 elements"),
        ]
        for masks, message in wrong:
            with pytest.raises(InputError, match=message):
                reduce.set_mask(masks)
        tensors = [normal(backend.rank), normal(backend.rank, numel=7)]
        reduce(tensors)
        return bits(tensors)

    def plain(backend: Backend) -> list[bytes]:
        tensors = [normal(backend.rank), normal(backend.rank, numel=7)]
        CompressedAllreduce(tensors, backend)(tensors)
        return bits(tensors)

    assert run_threads(2, check) == run_threads(2, plain)


# --- the function


def test_the_function_with_a_residual_is_the_object_called_again_and_again() -> None:
    def by_function(backend: Backend) -> list[list[bytes]]:
        residual = Residual()
        outputs = []
        for call in range(3):
            tensors = samples(backend.rank, call)
            assert compressed_allreduce(tensors, residual, backend=backend, codec=CODECS["64 mean"]) is tensors
            outputs.append(bits(tensors))
        assert float(residual.norm()) > 0
        return outputs

    for world_size in (1, 2, 3):
        expected = run_threads(world_size, trace, CODECS["64 mean"], 3)
        if world_size > 1:
            assert run_threads(world_size, by_function) == [list(map(bits, seen.outputs)) for seen in expected]


def test_the_function_without_a_residual_forgets_its_error() -> None:
    def twice(backend: Backend) -> None:
        first, second, alone = normal(backend.rank), normal(backend.rank), normal(backend.rank)
        compressed_allreduce(first)  # inside run_threads None is the thread's own backend
        compressed_allreduce(second, backend="threads")
        compressed_allreduce([alone], backend=backend)
        assert bits(first) == bits(second) == bits(alone)

    run_threads(2, twice)


def test_error_feedback_makes_the_mean_of_many_calls_right_where_one_call_is_far_off() -> None:
    calls = 200
    tensors = [normal(rank, 1) for rank in range(2)]
    exact = torch.stack(tensors).mean(0)

    def repeat(backend: Backend, residual: Residual | None) -> float:
        total = torch.zeros(3000)
        for _ in range(calls):
            x = tensors[backend.rank].clone()
            total += compressed_allreduce(x, residual, backend=backend)
        return float(torch.linalg.vector_norm(total / calls - exact) / torch.linalg.vector_norm(exact))

    with_feedback = run_threads(2, lambda backend: repeat(backend, Residual()))[0]
    without = run_threads(2, repeat, None)[0]
    # What is left is the last residual, some ten times an input that never changes, over the number of calls.
    assert with_feedback < 0.1
    assert without > 0.5


def test_results_do_not_depend_on_which_of_two_averages_is_waited_for_first() -> None:
    def both(backend: Backend, swapped: bool) -> list[bytes]:
        pair = [CompressedAllreduce(torch.empty(3000), backend) for _ in range(2)]
        tensors = [normal(backend.rank, i) for i in range(2)]
        works = [reduce.start(t) for reduce, t in zip(pair, tensors, strict=True)]
        for work in reversed(works) if swapped else works:
            work.wait()
        return bits(tensors)

    assert run_threads(3, both, False) == run_threads(3, both, True)


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


def test_the_samples_have_the_strides_that_they_claim() -> None:
    for (_, _, strides), t in zip(SPECS, samples(0, 0), strict=True):
        assert t.is_contiguous() == (strides not in ("channels_last", "transposed", "every other") or t.numel() == 1)


# --- encoded and decoded by the caller


def encoded_by_caller(reduce: CompressedAllreduce, tensors: list[Tensor]) -> Callable[[Part], None]:
    """What an optimizer does with kernels of its own, here by the codec's public methods."""
    rows = [t.contiguous() for t in tensors]

    def encode(part: Part) -> None:
        assert part.squared == (reduce.codec.scale == "rms")
        used = [rows[i] for i in part.used]
        reduce.codec.encode(used, part.residual, layout=part.layout, mask=part.mask, out=part.sent)

    return encode


def decoded_by_caller(reduce: CompressedAllreduce, like: list[Tensor]) -> list[Tensor]:
    rows = [torch.full_like(t, 7.0, memory_format=torch.contiguous_format) for t in like]
    for part in reduce.parts:
        used = [rows[i] for i in part.used]
        reduce.codec.decode(part.gathered, used, layout=part.layout, mask=part.mask)
    return rows


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_caller_that_encodes_and_decodes_the_parts_itself_gets_the_same_bits(masked: bool, codec: SignCodec) -> None:
    masks = [t.float() < -0.5 for t in samples(99, 99)] if masked else None

    def check(backend: Backend) -> None:
        plain, parts = (CompressedAllreduce(samples(0, 0), backend, codec, bucket_mb=SMALL_BUCKET) for _ in range(2))
        for reduce in (plain, parts):
            reduce.set_mask(masks)
        addresses = [part.sent.data_ptr() for part in parts.parts]
        for call in range(3):
            tensors = samples(backend.rank, call)
            work = parts.start_with(encoded_by_caller(parts, tensors))
            work.finish()
            assert bool(work.all_finite())
            with pytest.raises(InputError, match=f"rank {backend.rank}: start"):
                parts.start_with(encoded_by_caller(parts, tensors))
            out = decoded_by_caller(parts, tensors)
            work.accept()
            plain(tensors)
            filled = [(o, t) for o, t in zip(out, tensors, strict=True) if t.numel()]
            assert all(bits(o) == bits(t.contiguous()) for o, t in filled)
            assert residual_bits(parts.residual) == residual_bits(plain.residual)
            work.undo(samples(backend.rank, call))  # it is over, so nothing is put back
            assert residual_bits(parts.residual) == residual_bits(plain.residual)
        assert [part.sent.data_ptr() for part in parts.parts] == addresses
        assert parts.stats.wire_bytes == plain.stats.wire_bytes
        assert parts.stats.calls == plain.stats.calls

    run_threads(3, check)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("how", ["as it was told", "from tensors", "settled"])
def test_what_a_caller_encoded_can_be_undone(how: str, codec: SignCodec) -> None:
    def check(backend: Backend) -> None:
        reduce, plain = (CompressedAllreduce(samples(0, 0), backend, codec, bucket_mb=SMALL_BUCKET) for _ in range(2))
        tensors = samples(backend.rank, 1)
        for one in (reduce, plain):
            one(samples(backend.rank, 0))
        before = {id(part): part.residual.clone() for part in reduce.parts}

        def put_back(part: Part) -> None:
            part.residual.copy_(before[id(part)])

        told, work = reduce.start_with(encoded_by_caller(reduce, tensors), put_back), plain.start(tensors)
        for started in (told, work):
            started.finish()
        work.undo()
        if how == "as it was told":
            told.undo()
        elif how == "from tensors":
            told.undo(tensors)
        else:
            told.settle_server(torch.tensor(False))
            for part in reduce.parts:
                put_back(part)
        expected = plain.residual if how == "from tensors" else None
        for k, part in enumerate(reduce.parts):
            assert part.residual.equal(before[id(part)] if expected is None else expected.worker[k])
            assert reduce.residual.server[k].equal(plain.residual.server[k])
        reduce(tensors)  # nothing is in flight any more

    run_threads(3, check)


def test_a_settled_average_that_is_finite_keeps_what_the_server_did_not_say() -> None:
    def check(backend: Backend) -> None:
        reduce, plain = (CompressedAllreduce(normal(0), backend) for _ in range(2))
        work = reduce.start_with(encoded_by_caller(reduce, [normal(backend.rank)]))
        work.finish()
        work.settle_server(torch.tensor(True))
        plain(normal(backend.rank))
        assert residual_bits(reduce.residual) == residual_bits(plain.residual)

    run_threads(2, check)


def test_undo_of_what_a_caller_encoded_asks_for_what_it_needs() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(normal(0), backend)
        work = reduce.start_with(encoded_by_caller(reduce, [normal(backend.rank)]))
        work.finish()
        during = residual_bits(reduce.residual)
        with pytest.raises(InputError, match=f"rank {backend.rank}: undo.. does not know what was encoded"):
            work.undo()
        with pytest.raises(InputError, match=f"rank {backend.rank}: made for 1 tensors"):
            work.undo([])
        with pytest.raises(InputError, match=f"rank {backend.rank}: wait.. has no tensors"):
            work.wait()
        assert residual_bits(reduce.residual) == during
        work.undo([normal(backend.rank)])

    run_threads(2, check)


@pytest.mark.parametrize("operation", ["_all_to_all", "_all_gather"])
def test_a_transport_that_fails_has_the_caller_put_back_each_part_that_it_encoded(operation: str) -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend, bucket_mb=SMALL_BUCKET)
        encoded: list[Part] = []
        put_back: list[Part] = []

        def encode(part: Part) -> None:
            encoded.append(part)
            encoded_by_caller(reduce, samples(backend.rank, 1))(part)

        setattr(backend, operation, lambda output, input: 1 / 0)
        with pytest.raises(TransportError, match=f"rank {backend.rank}: {operation[1:]} did not complete"):
            reduce.start_with(encode, put_back.append).finish()
        delattr(backend, operation)
        assert [id(part) for part in put_back] == [id(part) for part in encoded]
        assert len(encoded) == (1 if operation == "_all_to_all" else len(reduce.parts)) <= len(reduce.parts)
        for server in reduce.residual.server:
            assert float(server.abs().max()) < 1e-6 * max(float(t.abs().max()) for t in samples(0, 1) if t.numel())

    run_threads(2, check)


def test_an_encoder_that_raises_leaves_nothing_in_flight() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(normal(0), backend)
        with pytest.raises(ZeroDivisionError):
            reduce.start_with(lambda part: 1 / 0)  # type: ignore[arg-type, return-value]
        reduce(normal(backend.rank))

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


def test_one_rank_has_no_parts_and_encodes_nothing() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(normal(0), backend)
        work = reduce.start_with(lambda part: pytest.fail("there are no parts"))
        work.finish()
        assert not reduce.parts
        assert bool(work.all_finite())
        work.accept()

    run_threads(1, check)
