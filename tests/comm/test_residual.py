"""Error feedback as an object: saved, loaded, scaled, forgotten and dealt to other ranks, and never lost unsaid."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import (
    Backend,
    CompressedAllreduce,
    InputError,
    MismatchError,
    Residual,
    compressed_allreduce,
    run_threads,
)
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

State = dict[str, Any]


def through_a_file(state: Mapping[str, Any]) -> State:
    """Saved, and loaded as an untrusted file is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


def states_after(world_size: int, calls: int = 2, codec: SignCodec = CODECS["64 mean"]) -> list[State]:
    """Every rank's state after a few averages of the samples."""
    return [seen.states[-1] for seen in run_threads(world_size, trace, codec, calls)]


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("when", ["before", "constructor", "after"])
def test_a_saved_run_goes_on_bit_for_bit(when: str, world_size: int, codec: SignCodec) -> None:
    uninterrupted = run_threads(world_size, trace, codec, 4, SMALL_BUCKET)

    def resume(backend: Backend) -> None:
        state = through_a_file(uninterrupted[backend.rank].states[1])
        residual = Residual()
        if when == "constructor":
            residual.load_state_dict(state)
        reduce = CompressedAllreduce(samples(0, 0), backend, codec, bucket_mb=SMALL_BUCKET, residual=residual)
        if when == "after":  # what it has heard since must leave no trace
            reduce(samples(backend.rank, 77))
        if when != "constructor":
            reduce.load_state_dict(state)
        for call in (2, 3):
            tensors = samples(backend.rank, call)
            reduce(tensors)
            expected = uninterrupted[backend.rank]
            assert bits(tensors) == bits(expected.outputs[call])
            assert residual_bits(reduce.residual) == state_bits(expected.states[call])

    run_threads(world_size, resume)


def test_a_state_holds_real_elements_only_and_is_the_same_for_every_bucket_size() -> None:
    one = run_threads(3, trace, CODECS["64 mean"], 2)
    many = run_threads(3, trace, CODECS["64 mean"], 2, SMALL_BUCKET)
    for seen, other in zip(one, many, strict=True):
        state = seen.states[-1]
        assert state["worker"].dtype == state["server"].dtype == torch.float32
        assert state["numels"] == NUMELS
        assert state["worker"].numel() == sum(NUMELS)
        assert bits(state["worker"]) == bits(other.states[-1]["worker"])
        assert (state["rank"], state["world_size"]) == (seen.states[0]["rank"], 3)
    assert sum(seen.states[-1]["server"].numel() for seen in one) == sum(NUMELS)
    for a, b in zip(server_parts([s.states[-1] for s in one]), server_parts([s.states[-1] for s in many]), strict=True):
        assert np.array_equal(a, b)


def test_a_state_is_a_copy_that_later_averages_do_not_change() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend)
        reduce(samples(backend.rank, 0))
        state = reduce.state_dict()
        before = state_bits(state)
        reduce(samples(backend.rank, 1))
        assert state_bits(state) == before != residual_bits(reduce.residual)
        reduce.load_state_dict(state)
        reduce(samples(backend.rank, 1))
        assert state_bits(state) == before

    run_threads(2, check)


def test_a_state_before_the_first_use_says_that_there_is_no_feedback() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend)
        reduce(samples(backend.rank, 0))
        reduce.load_state_dict(through_a_file(Residual().state_dict()))
        assert float(reduce.residual.norm()) == 0.0

    run_threads(2, check)


def test_a_loaded_state_that_was_not_used_yet_is_saved_again_as_it_is() -> None:
    for state in states_after(2):
        residual = Residual()
        residual.load_state_dict(state)
        assert residual_bits(residual) == state_bits(state)
        assert float(residual.norm()) == pytest.approx(norm_of(state), rel=1e-6)
        residual.load_state_dict({"version": state["version"]})
        assert residual_bits(residual) == {"version": state["version"]}


def norm_of(state: State) -> float:
    return math.sqrt(sum(float((part.double() ** 2).sum()) for part in (state["worker"], state["server"])))


def test_norm_is_that_of_all_real_elements_on_both_sides() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend)
        assert float(reduce.residual.norm()) == 0.0
        reduce(samples(backend.rank, 0))
        norm = reduce.residual.norm()
        assert (norm.dtype, norm.dim()) == (torch.float32, 0)
        # Padding is zero, so it cannot show; fp32 sums of squares of some thousand elements, all positive.
        assert float(norm) == pytest.approx(norm_of(reduce.state_dict()), rel=1e-5)

    run_threads(2, check)


# --- scaled and forgotten


@pytest.mark.parametrize("loaded", [False, True], ids=["in use", "loaded and not yet used"])
@pytest.mark.parametrize("factor", [2.0**-7, 4])
def test_rescaling_with_the_input_by_a_power_of_two_scales_every_later_result_exactly(
    factor: float, loaded: bool
) -> None:
    def inputs(rank: int, call: int) -> list[Tensor]:
        return [normal(rank, call), normal(rank, call, 1, numel=1)]

    def check(backend: Backend) -> None:
        plain, scaled = (CompressedAllreduce(inputs(0, 0), backend) for _ in range(2))
        for reduce in (plain, scaled):
            reduce(inputs(backend.rank, 0))
        if loaded:
            residual = Residual()
            residual.load_state_dict(scaled.state_dict())
            residual.rescale(factor)
            scaled = CompressedAllreduce(inputs(0, 0), backend, residual=residual)
        else:
            scaled.residual.rescale(factor)
        for call in (1, 2):
            expected, tensors = inputs(backend.rank, call), [x * factor for x in inputs(backend.rank, call)]
            plain(expected)
            scaled(tensors)
            assert bits(tensors) == bits([x * factor for x in expected])

    run_threads(3, check)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_factor_that_is_not_finite_is_refused_and_scales_nothing(factor: float) -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend)
        reduce(samples(backend.rank, 0))
        before = residual_bits(reduce.residual)
        with pytest.raises(InputError, match=f"rescale: the factor must be finite, got {factor}"):
            reduce.residual.rescale(factor)
        assert residual_bits(reduce.residual) == before

    run_threads(2, check)


def test_after_reset_an_average_in_use_is_as_new() -> None:
    fresh = run_threads(3, trace, CODECS["64 mean"], 2)

    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend, CODECS["64 mean"])
        reduce(samples(backend.rank, 55))
        reduce.residual.reset()
        assert float(reduce.residual.norm()) == 0.0
        for call in range(2):
            tensors = samples(backend.rank, call)
            reduce(tensors)
            assert bits(tensors) == bits(fresh[backend.rank].outputs[call])
            assert residual_bits(reduce.residual) == state_bits(fresh[backend.rank].states[call])

    run_threads(3, check)


def test_reset_forgets_a_loaded_state_that_was_not_used_yet() -> None:
    residual = Residual()
    residual.load_state_dict(states_after(2)[0])
    residual.reset()
    assert residual_bits(residual) == residual_bits(Residual())


# --- states that do not fit


def broken(state: State, **changes: Any) -> State:
    return {**state, **changes}


def without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


WRONG: dict[str, tuple[Callable[[State], State], str]] = {
    "of another version": (lambda s: broken(s, version=2), "has version 1, got 2"),
    "something else": (lambda s: {"weight": s["worker"]}, "has version 1, got None; was it made by state_dict"),
    "without its server part": (lambda s: without(s, "server"), "lacks server"),
    "without its rank": (lambda s: without(s, "rank"), "lacks rank"),
    "with too few elements": (lambda s: broken(s, worker=s["worker"][1:]), "holds a worker residual of"),
    "with too few on the server": (lambda s: broken(s, server=s["server"][1:]), "holds a server residual of"),
    "of other tensors": (lambda s: broken(s, numels=[*s["numels"], 0]), "has numels"),
    "of another rank": (lambda s: broken(s, rank=1 - s["rank"]), r"has rank \d.*Residual\.reshard"),
    "of another world size": (lambda s: broken(s, world_size=4), r"has world_size 4, here it is 2.*Residual\.reshard"),
    "of another bucket size": (lambda s: elsewhere(s), "another bucket size, block size or local_group"),
}


def elsewhere(state: State) -> State:
    """As if the other rank had looked after this rank's elements."""
    other = next(s for s in states_after(2) if s["rank"] != state["rank"])
    return broken(state, server=other["server"], server_spans=other["server_spans"])


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(
    spoil: Callable[[State], State], message: str
) -> None:
    states = states_after(2)

    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(samples(0, 0), backend, CODECS["64 mean"])
        reduce(samples(backend.rank, 0))
        before = residual_bits(reduce.residual)
        with pytest.raises(InputError, match=message):
            reduce.load_state_dict(spoil(states[backend.rank]))
        assert residual_bits(reduce.residual) == before

    run_threads(2, check)


@pytest.mark.parametrize(
    "name", ["of other tensors", "of another rank", "of another world size", "of another bucket size"]
)
def test_one_rank_with_a_state_that_does_not_fit_stops_all_ranks_before_anything_moves(name: str) -> None:
    spoil, message = WRONG[name]
    states = states_after(2)

    def check(backend: Backend) -> None:
        residual = Residual()
        residual.load_state_dict(spoil(states[1]) if backend.rank == 1 else states[0])
        before = residual_bits(residual)
        for _ in range(2):  # a second try must not find the state gone and start from nothing
            with pytest.raises(InputError if backend.rank == 1 else MismatchError, match=message):
                CompressedAllreduce(samples(0, 0), backend, CODECS["64 mean"], residual=residual)
            assert residual_bits(residual) == before

    run_threads(2, check)


def test_a_single_rank_refuses_feedback_that_it_would_never_use() -> None:
    state = states_after(2)[0]

    def check(backend: Backend) -> None:
        residual = Residual()
        residual.load_state_dict(state)
        for given in (residual, Residual()):
            with pytest.raises(InputError, match="rank 0 of 2, and a single rank compresses nothing"):
                CompressedAllreduce(samples(0, 0), backend, residual=given).load_state_dict(state)
        assert residual_bits(residual) == state_bits(state)

    run_threads(1, check)


def test_a_residual_serves_one_list_of_tensors_one_codec_and_one_bucket_size() -> None:
    def check(backend: Backend) -> None:
        residual = Residual()
        compressed_allreduce(normal(backend.rank), residual, backend=backend)
        before = residual_bits(residual)
        x = normal(backend.rank)
        for tensors, codec in (([x, x], None), (x[:2999], None), (x, SignCodec(block_size=64))):
            with pytest.raises(
                InputError, match=f"rank {backend.rank}: this Residual holds the error feedback of 1 tens"
            ):
                compressed_allreduce(tensors, residual, backend=backend, codec=codec)
        with pytest.raises(InputError, match="bucket size"):
            CompressedAllreduce(x, backend, bucket_mb=SMALL_BUCKET, residual=residual)
        assert residual_bits(residual) == before
        assert bits(x) == bits(normal(backend.rank))
        compressed_allreduce(x, residual, backend=backend)

    run_threads(2, check)


# --- another number of ranks


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 2), (3, 1), (2, 8), (3, 3)])
def test_reshard_conserves_what_the_feedback_adds_to_the_average(old: int, new: int) -> None:
    states = states_after(old)
    resharded = [through_a_file(state) for state in Residual.reshard(states[::-1], new)]
    assert [state["rank"] for state in resharded] == list(range(new))
    assert {state["world_size"] for state in resharded} == {new}
    means = oracle.dense_mean([worker_parts(state) for state in states])
    for state in resharded:
        for part, mean in zip(worker_parts(state), means, strict=True):
            # A float64 mean, rounded to fp32 once.
            assert np.all(np.abs(part - mean) <= 2 * oracle.UNIT * np.abs(mean))
        for part, held in zip(server_parts([state]), server_parts(states), strict=True):
            assert np.array_equal(part, held)


def test_resharding_what_was_resharded_and_not_used_changes_nothing_more() -> None:
    once = Residual.reshard(states_after(2), 3)
    again = Residual.reshard(Residual.reshard(once, 5), 3)
    assert state_bits(again) == state_bits(once)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 2), (5, 4)])
def test_after_reshard_the_average_goes_on_as_the_float64_oracle(old: int, new: int, codec: SignCodec) -> None:
    numels = [3000, 1, 70]

    def inputs(rank: int, call: int) -> list[Tensor]:
        return [normal(rank, call, i, numel=n) for i, n in enumerate(numels)]

    before = run_threads(old, trace, codec, 2, 16.0, inputs)
    states = Residual.reshard([seen.states[-1] for seen in before], new)

    def go_on(backend: Backend) -> list[list[Tensor]]:
        reduce = CompressedAllreduce(inputs(0, 0), backend, codec, bucket_mb=SMALL_BUCKET)
        reduce.load_state_dict(states[backend.rank])
        outputs = []
        for call in (2, 3):
            outputs.append(inputs(backend.rank, call))
            reduce(outputs[-1])
        return outputs

    expected = oracle.CompressedMean(old, numels, codec.block_size, codec.scale)
    for call in range(2):
        expected([arrays(inputs(rank, call)) for rank in range(old)])
    expected = expected.reshard(new)
    per_rank = run_threads(new, go_on)
    for call in range(2):
        means = expected([arrays(inputs(rank, call + 2)) for rank in range(new)])
        for outputs in per_rank:
            for out, mean in zip(outputs[call], means, strict=True):
                # As in oracle.tolerance: 2 (32 + n) roundings for each of four calls, of numbers below 10.
                assert np.abs(arrays([out])[0] - mean).max() <= 4 * 2 * (32 + 5) * oracle.UNIT * 10, expected.closest


def test_resharding_states_without_feedback_gives_states_without_feedback() -> None:
    empty = Residual().state_dict()
    assert Residual.reshard([empty, empty], 3) == [empty] * 3


def test_reshard_refuses_missing_doubled_and_foreign_states() -> None:
    two, three = states_after(2), states_after(3)
    other = [seen.states[-1] for seen in run_threads(2, trace, SignCodec(), 1, 16.0, lambda rank, call: [normal(rank)])]
    wrong: list[tuple[list[State], str]] = [
        ([], "expected one state of each of all ranks"),
        (two[:1], r"each of 2 ranks.* got 1, of ranks \[0\]"),
        ([two[0], two[0]], r"of ranks \[0, 0\]"),
        ([two[0], other[1]], r"\[0, 1\] with"),
        ([two[0], three[1]], r"of ranks \[0, 1\]"),
        ([two[0], Residual().state_dict()], r"got 2, of ranks \[0\]"),
    ]
    for states, message in wrong:
        with pytest.raises(InputError, match=message):
            Residual.reshard(states, 2)
    with pytest.raises(InputError, match="world_size must be at least 1, got 0"):
        Residual.reshard(two, 0)
    with pytest.raises(InputError, match="has version 1, got 9"):
        Residual.reshard([two[0], broken(two[1], version=9)], 2)
