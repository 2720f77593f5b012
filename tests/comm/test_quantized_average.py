"""Averages with the quantizing codecs: the specification over ranks, for any bucket size, with feedback and without."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
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
from onebit.comm.tuning import tune
from onebit.compress import Fp8Codec, Int4Codec, Int8Codec, SignCodec
from onebit.compress.quantized import QuantizedCodec
from tests.comm.launcher import run_ranks
from tests.comm.samples import Trace, bits, normal, server_parts, state_bits, trace, worker_parts
from tests.compress import quantized_oracle as oracle

CODECS: dict[str, QuantizedCodec] = {
    "int8": Int8Codec(block_size=64),
    "int8 alone": Int8Codec(error_feedback=False),
    "int4": Int4Codec(block_size=128, rounding="stochastic", rotate=True, seed=5),
    "fp8": Fp8Codec(block_size=64),
    "fp8 alone": Fp8Codec(block_size=96, error_feedback=False),
}
NUMELS = (1000, 0, 1, 64, 333)
CALLS = 3


def inputs(rank: int, call: int) -> list[Tensor]:
    return [normal(rank, call, i, numel=n) * 10.0 ** (i - 2) for i, n in enumerate(NUMELS)]


class Mean:
    """The average of one tensor, block by block, with the feedback of every rank and of the server."""

    def __init__(self, codec: QuantizedCodec, world_size: int, numel: int) -> None:
        how, size = codec.quantizer, codec.block_size
        self.spec = oracle.Spec(how.format, size, how.stochastic, how.rotate, how.seed)
        self.numel, self.kept = numel, codec.error_feedback
        blocks = -(-numel // size)
        self.real = (np.arange(blocks * size) < numel).reshape(blocks, size)
        zeros = np.zeros((blocks, size), np.float32)
        self.worker = [zeros] * world_size
        self.server = zeros

    def __call__(self, xs: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.float32]]:
        said = [self._encode(self._blocks(x), held) for x, held in zip(xs, self.worker, strict=True)]
        mean = oracle.mean(np.stack([s.codes for s in said]), np.stack([s.scales for s in said]), self.spec)
        whole = self._encode(mean, self.server)
        if self.kept:
            self.worker, self.server = [s.residual for s in said], whole.residual
        return oracle.decode(whole.codes, whole.scales, self.spec).reshape(-1)[: self.numel]

    def _encode(self, x: oracle.Floats, held: oracle.Floats) -> oracle.Encoded:
        return oracle.encode(x, held if self.kept else None, self.real, self.real, self.spec)

    def _blocks(self, x: Tensor) -> oracle.Floats:
        return np.pad(x.numpy(), (0, self.real.size - self.numel)).reshape(self.real.shape)


@pytest.mark.parametrize("bucket_mb", [16.0, 2.0**-10])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CODECS)
def test_means_and_feedback_are_the_specification_bit_for_bit_call_after_call(
    name: str, world_size: int, bucket_mb: float
) -> None:
    codec = CODECS[name]
    per_rank = run_threads(world_size, trace, codec, CALLS, bucket_mb, inputs)
    expected = [Mean(codec, world_size, n) for n in NUMELS]
    for call in range(CALLS):
        given = [inputs(rank, call) for rank in range(world_size)]
        for i in range(len(NUMELS)):
            mean = expected[i]([xs[i] for xs in given])
            for seen in per_rank:
                assert np.array_equal(seen.outputs[call][i].numpy(), mean), (call, i)
        states = [seen.states[call] for seen in per_rank]
        if not codec.error_feedback:
            assert states == [{"version": 1}] * world_size
            continue
        for i, n in enumerate(NUMELS):
            assert np.array_equal(server_parts(states)[i], expected[i].server.reshape(-1)[:n])
            for rank, state in enumerate(states):
                assert np.array_equal(worker_parts(state)[i], expected[i].worker[rank].reshape(-1)[:n])


@pytest.mark.parametrize("name", ["int8 alone", "int4"])
def test_processes_exchange_the_same_bytes_as_threads(name: str) -> None:
    for seen, expected in zip(
        run_ranks("gloo", 2, trace, CODECS[name], CALLS, 2.0**-10, inputs),
        run_threads(2, trace, CODECS[name], CALLS, 2.0**-10, inputs),
        strict=True,
    ):
        assert seen.sent == expected.sent
        assert list(map(bits, seen.outputs)) == list(map(bits, expected.outputs))
        assert state_bits(seen.states) == state_bits(expected.states)


@pytest.mark.parametrize("name", CODECS)
def test_neighbours_and_order_change_no_bit(name: str) -> None:
    def some(order: Sequence[int]) -> list[Trace]:
        return run_threads(2, trace, CODECS[name], 2, 2.0**-10, lambda r, c: [inputs(r, c)[i] for i in order])

    whole, part = some(range(len(NUMELS))), some([4, 0])
    for one, other in zip(whole, part, strict=True):
        for call in range(2):
            assert bits(one.outputs[call][4]) == bits(other.outputs[call][0])
            assert bits(one.outputs[call][0]) == bits(other.outputs[call][1])


@pytest.mark.parametrize("name", CODECS)
def test_wire_bytes_are_those_of_the_formula(name: str) -> None:
    codec, n, ranks = CODECS[name], 100_000, 2

    def sent(backend: Backend) -> int:
        reduce = CompressedAllreduce(torch.zeros(n), backend, codec)
        reduce(torch.zeros(n))
        return int(reduce.stats.wire_bytes)

    blocks = math.ceil(math.ceil(n / codec.block_size) / ranks)  # of a rank's chunk
    payload = 16 * (math.ceil(blocks * codec.block_size * codec.bits / 128) + math.ceil(blocks / 4))
    assert run_threads(ranks, sent) == [2 * payload] * ranks  # one to the other rank in each phase


@pytest.mark.parametrize("name", CODECS)
def test_an_average_that_is_undone_leaves_the_feedback_as_it_was(name: str) -> None:
    def undone(backend: Backend) -> tuple[list[Tensor], list[Tensor]]:
        reduce = CompressedAllreduce(inputs(0, 0), backend, CODECS[name])
        reduce(inputs(backend.rank, 0))
        before = [t.clone() for t in (*reduce.residual.worker, *reduce.residual.server)]
        xs = inputs(backend.rank, 1)
        work = reduce.start(xs)
        work.finish()
        work.undo()
        return before, [*reduce.residual.worker, *reduce.residual.server]

    for before, after in run_threads(2, undone):
        assert len(before) == len(after) == (2 if CODECS[name].error_feedback else 0)
        for old, new in zip(before, after, strict=True):
            # Elements up to 400 and what a transform makes of them, added and subtracted a few times.
            torch.testing.assert_close(new, old, rtol=0, atol=1e-3)


def test_one_number_that_is_not_finite_is_seen_on_every_rank() -> None:
    def finite(backend: Backend) -> bool:
        x = torch.ones(300)
        x[7] = torch.inf if backend.rank else 1.0
        work = CompressedAllreduce(x, backend, Int8Codec(error_feedback=False)).start(x)
        work.finish()
        all_finite = bool(work.all_finite())
        work.undo()
        return all_finite

    assert run_threads(2, finite) == [False, False]


def test_feedback_of_one_codec_is_carried_on_by_another_of_the_same_blocks() -> None:
    def carried(backend: Backend) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        first = CompressedAllreduce(inputs(0, 0), backend, SignCodec(block_size=64))
        first(inputs(backend.rank, 0))
        second = CompressedAllreduce(inputs(0, 0), backend, Int8Codec(block_size=64))
        second.load_state_dict(first.state_dict())
        return first.state_dict(), second.state_dict()

    for saved, loaded in run_threads(2, carried):
        assert state_bits(saved) == state_bits(loaded)


@pytest.mark.parametrize("bound", [False, True])
def test_feedback_that_a_codec_does_not_keep_is_dropped_and_that_is_said(
    bound: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def dropped(backend: Backend) -> Mapping[str, Any]:
        keeping = CompressedAllreduce(inputs(0, 0), backend, Int8Codec())
        keeping(inputs(backend.rank, 0))
        residual = Residual()
        if not bound:
            residual.load_state_dict(keeping.state_dict())
        reduce = CompressedAllreduce(inputs(0, 0), backend, Int8Codec(error_feedback=False), residual=residual)
        if bound:
            reduce.load_state_dict(keeping.state_dict())
        reduce(inputs(backend.rank, 1))
        assert float(reduce.residual.norm()) == 0
        return reduce.state_dict()

    with caplog.at_level(logging.WARNING):
        assert run_threads(2, dropped) == [{"version": 1}] * 2
    assert caplog.text.count("keeps no error feedback, so that of 1398 elements which was loaded is dropped") == 2


def test_no_feedback_starts_a_codec_that_keeps_it_from_zero() -> None:
    def start(backend: Backend) -> float:
        reduce = CompressedAllreduce(inputs(0, 0), backend, Int8Codec())
        reduce(inputs(backend.rank, 0))
        reduce.load_state_dict({"version": 1})
        return float(reduce.residual.norm())

    assert run_threads(2, start) == [0.0, 0.0]


def test_ranks_with_other_codecs_are_told_which() -> None:
    def average(backend: Backend) -> str:
        with pytest.raises(MismatchError) as error:
            CompressedAllreduce(torch.ones(9), backend, Int8Codec(seed=backend.rank))
        return str(error.value)

    for message in run_threads(2, average):
        assert "do not agree on codec" in message
        assert "seed=0" in message
        assert "seed=1" in message


def test_a_residual_is_not_used_by_two_codecs_at_once() -> None:
    def reused(backend: Backend) -> None:
        residual, x = Residual(), torch.ones(100)
        compressed_allreduce(x, residual, backend=backend, codec=Int8Codec())
        with pytest.raises(InputError, match="another codec"):
            compressed_allreduce(x, residual, backend=backend, codec=Int4Codec())

    run_threads(2, reused)


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_a_bucket_may_travel_plain_with_any_codec(mode: str) -> None:
    def average(backend: Backend) -> float:
        reduce = CompressedAllreduce(torch.ones(64), backend, Int8Codec(error_feedback=False), mode=mode)  # type: ignore[arg-type]
        x = torch.full((64,), float(backend.rank))
        reduce(x)
        assert tune(backend, codec=SignCodec()) is not None
        return float(x.sum())

    assert run_threads(2, average) == [32.0, 32.0]


def test_what_is_no_codec_is_refused() -> None:
    with pytest.raises(InputError, match="must be a Codec, such as SignCodec"):
        CompressedAllreduce(torch.ones(3), codec="int8")  # type: ignore[arg-type]
