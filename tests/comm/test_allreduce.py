"""The compressed average: right by a float64 oracle, the same bits on every rank and transport, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.compress import SignCodec
from tests.comm import oracle
from tests.comm.launcher import GLOO, MPI
from tests.comm.oracle import tolerance
from tests.comm.samples import (
    CODECS,
    DTYPES,
    NUMELS,
    SMALL_BUCKET,
    SPECS,
    Trace,
    arrays,
    bits,
    normal,
    samples,
    server_parts,
    state_bits,
    trace,
    traces,
    worker_parts,
)

SIZES = (1, 2, 3, 4, 5, 7, 8)
CALLS = 5


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


def test_the_samples_have_the_strides_that_they_claim() -> None:
    for (_, _, strides), t in zip(SPECS, samples(0, 0), strict=True):
        assert t.is_contiguous() == (strides not in ("channels_last", "transposed", "every other") or t.numel() == 1)
