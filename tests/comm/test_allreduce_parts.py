"""A caller that encodes and decodes the parts itself gets the same bits, and puts back what it encoded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, InputError, Part, TransportError, run_threads
from onebit.compress import SignCodec
from tests.comm.samples import CODECS, SMALL_BUCKET, bits, normal, residual_bits, samples


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


def test_one_rank_has_no_parts_and_encodes_nothing() -> None:
    def check(backend: Backend) -> None:
        reduce = CompressedAllreduce(normal(0), backend)
        work = reduce.start_with(lambda part: pytest.fail("there are no parts"))
        work.finish()
        assert not reduce.parts
        assert bool(work.all_finite())
        work.accept()

    run_threads(1, check)
