"""Every refusal says what was expected and what came, and leaves every buffer as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from onebit.compress import InputError, OnebitError, SignCodec, pack_signs, unpack_signs
from onebit.compress.layout import plan
from tests.compress import samples

N = 100
TAKES = "float32, bfloat16 or float16"
UNKNOWN = ["'quick'", "'reference'", "'cpu'"]
META = "meta"  # a device that every machine has, to be the wrong one


def state() -> SimpleNamespace:
    """Right arguments for every operator; a case replaces one of them."""
    codec = SignCodec(block_size=64)
    (layout,) = codec.plan([N, 10], 2)
    s = SimpleNamespace(
        codec=codec,
        layout=layout,
        x=torch.randn(N),
        xs=[torch.randn(N), torch.randn(10)],
        residual=torch.randn(128),
        server=torch.randn(layout.chunk_numel),
        payload=codec.encode(torch.randn(N)),
        mask=torch.zeros(16, dtype=torch.uint8),
        bits=torch.zeros(13, dtype=torch.uint8),
        out=torch.randn(N),
    )
    s.target = torch.full_like(s.payload, 7)
    s.payloads = codec.encode(s.xs, layout=layout).view(2, -1)
    return s


Call = Callable[[SimpleNamespace], object]
CASES: dict[str, tuple[Call, list[str]]] = {
    # Options of the codec.
    "block_size not a multiple of 32": (lambda s: SignCodec(block_size=33), ["multiple of 32", "33"]),
    "block_size zero": (lambda s: SignCodec(block_size=0), ["positive", "got 0"]),
    "block_size negative": (lambda s: SignCodec(block_size=-32), ["positive", "-32"]),
    "block_size a float": (lambda s: SignCodec(block_size=1024.0), ["multiple of 32", "1024.0"]),
    "block_size a bool": (lambda s: SignCodec(block_size=True), ["multiple of 32", "True"]),
    "block_size a string": (lambda s: SignCodec(block_size="1024"), ["multiple of 32", "'1024'"]),
    "scale unknown": (lambda s: SignCodec(scale="max"), ["'mean' or 'rms'", "'max'"]),
    "kernels unknown": (
        lambda s: SignCodec(kernels="quick").encode(s.x, s.residual),
        UNKNOWN,
    ),
    "kernels unknown, packing": (
        lambda s: pack_signs(s.x, s.bits, kernels="quick"),
        UNKNOWN,
    ),
    "kernels of another device": (
        lambda s: SignCodec(kernels="cpu").encode(s.x.to(META)),
        ["'cpu' kernels run on cpu tensors", META],
    ),
    # Plans.
    "no chunks": (lambda s: s.codec.plan([N], 0), ["chunks must be at least 1", "0"]),
    "bucket_numel zero": (lambda s: s.codec.plan([N], 1, 0), ["bucket_numel must be at least 1", "0"]),
    "negative size": (lambda s: s.codec.plan([N, -3]), ["must not be negative", "-3"]),
    # What is encoded.
    "encode integers": (
        lambda s: s.codec.encode(s.x.long(), s.residual),
        [TAKES, "int64", "(100,)"],
    ),
    "encode float64": (lambda s: s.codec.encode(s.x.double(), s.residual), [TAKES, "float64"]),
    "encode complex": (
        lambda s: s.codec.encode(s.x.cfloat(), s.residual),
        [TAKES, "complex64"],
    ),
    "encode two dtypes": (
        lambda s: s.codec.encode([s.x, s.x.half()], s.residual),
        ["share a dtype", "float32", "float16"],
    ),
    "encode a strided tensor": (
        lambda s: s.codec.encode(s.x.view(10, 10).t(), s.residual),
        ["contiguous", "(10, 10)", "(1, 10)", ".contiguous()"],
    ),
    "encode on two devices": (lambda s: s.codec.encode([s.x, s.x.to(META)]), ["cpu", META, "one device"]),
    # The layout.
    "encode with a layout of another block size": (
        lambda s: SignCodec(block_size=32).encode(s.xs, layout=s.layout),
        ["planned with another block_size", "32"],
    ),
    "encode with a layout of a scale per block": (
        lambda s: SignCodec(block_size=None).encode(s.xs, layout=s.layout),
        ["planned with another block_size", "None"],
    ),
    "encode with a layout of a scale per tensor": (
        lambda s: s.codec.encode(s.xs, layout=SignCodec(block_size=None).plan(s.xs)[0]),
        ["planned with another block_size", "64"],
    ),
    "encode too few tensors": (
        lambda s: s.codec.encode(s.xs[:1], s.server, layout=s.layout),
        ["10 elements in tensor 1", "no such tensor", "plan again"],
    ),
    "encode a tensor that has shrunk": (
        lambda s: s.codec.encode([s.xs[0], s.xs[1][:9]], layout=s.layout),
        ["at least 10 elements in tensor 1", "got 9"],
    ),
    "decode into a tensor that has shrunk": (
        lambda s: s.codec.decode(s.payloads, [s.out[:99], s.xs[1]], layout=s.layout),
        ["at least 100 elements in tensor 0", "got 99"],
    ),
    # The residual.
    "residual in bf16": (
        lambda s: s.codec.encode(s.x, s.residual.bfloat16()),
        ["contiguous float32", "bfloat16"],
    ),
    "residual strided": (lambda s: s.codec.encode(s.x, s.residual.repeat(2)[::2]), ["contiguous float32", "strided"]),
    "residual elsewhere": (lambda s: s.codec.encode(s.x, s.residual.to(META)), ["on cpu", META]),
    "residual short": (lambda s: s.codec.encode(s.x, s.residual[:99]), ["from 100 to 128", "99"]),
    "residual long": (lambda s: s.codec.encode(s.x, s.residual.repeat(2)), ["from 100 to 128", "256"]),
    "server residual short": (
        lambda s: s.codec.reduce_encode(s.payloads[:1], s.server[:64], layout=s.layout),
        ["from 100 to 128", "64"],
    ),
    "server residual of the whole layout": (
        lambda s: s.codec.reduce_encode(s.payloads[:1], torch.zeros(s.layout.padded_numel), layout=s.layout, chunk=1),
        ["from 10 to 128", "256"],
    ),
    # The mask.
    "mask of bools": (
        lambda s: s.codec.encode(s.x, s.residual, mask=torch.zeros(N, dtype=torch.bool)),
        ["uint8", "bool"],
    ),
    "mask short": (lambda s: s.codec.encode(s.x, s.residual, mask=s.mask[:12]), ["from 13 to 16 bytes", "12"]),
    "mask long": (lambda s: s.codec.encode(s.x, s.residual, mask=s.mask.repeat(2)), ["from 13 to 16 bytes", "32"]),
    "mask strided": (lambda s: s.codec.encode(s.x, s.residual, mask=s.mask.repeat(2)[::2]), ["contiguous uint8"]),
    "mask elsewhere": (lambda s: s.codec.encode(s.x, s.residual, mask=s.mask.to(META)), ["on cpu", META]),
    "mask short, reducing": (
        lambda s: s.codec.reduce_encode(s.payload, s.residual, numel=N, mask=s.mask[:12]),
        ["from 13 to 16 bytes", "12"],
    ),
    "mask long, decoding": (
        lambda s: s.codec.decode(s.payload, s.out, mask=s.mask.repeat(2)),
        ["from 13 to 16 bytes", "32"],
    ),
    # Where the payload goes.
    "out of floats": (lambda s: s.codec.encode(s.x, s.residual, out=s.target.float()), ["uint8", "float32"]),
    "out short": (lambda s: s.codec.encode(s.x, s.residual, out=s.target[:-16]), ["32 bytes", "16"]),
    "out long": (lambda s: s.codec.encode(s.x, s.residual, out=s.target.repeat(2)), ["32 bytes", "64"]),
    "out strided": (lambda s: s.codec.encode(s.x, s.residual, out=s.target.repeat(2)[::2]), ["contiguous uint8"]),
    "out elsewhere": (lambda s: s.codec.encode(s.x, s.residual, out=s.target.to(META)), ["on cpu", META]),
    "out not on 16 bytes": (
        lambda s: s.codec.encode(s.x, s.residual, out=samples.unaligned(s.target)),
        ["multiple of 16 bytes", "1 bytes past", "clone()"],
    ),
    "out short, reducing": (
        lambda s: s.codec.reduce_encode(s.payload, s.residual, numel=N, out=s.target[:-16]),
        ["32 bytes", "16"],
    ),
    # Payloads.
    "reduce floats": (lambda s: s.codec.reduce_encode(s.payload.float(), s.residual, numel=N), ["uint8", "float32"]),
    "reduce part of a payload": (
        lambda s: s.codec.reduce_encode(s.payload[:-16], s.residual, numel=N, out=s.target),
        ["payloads of 32 bytes", "16"],
    ),
    "reduce no payload": (
        lambda s: s.codec.reduce_encode(s.payload[:0], s.residual, numel=N),
        ["payloads of 32 bytes", "0 bytes"],
    ),
    "reduce strided payloads": (
        lambda s: s.codec.reduce_encode(s.payload.repeat(2)[::2], s.residual, numel=N),
        ["contiguous uint8"],
    ),
    "reduce payloads that are not on 16 bytes": (
        lambda s: s.codec.reduce_encode(samples.unaligned(s.payload), s.residual, numel=N),
        ["multiple of 16 bytes", "1 bytes past", "clone()"],
    ),
    "reduce without a size": (lambda s: s.codec.reduce_encode(s.payload, s.residual), ["numel=", "layout="]),
    "reduce a negative size": (
        lambda s: s.codec.reduce_encode(s.payload, s.residual, numel=-5),
        ["not be negative", "-5"],
    ),
    "reduce a chunk beyond the last": (
        lambda s: s.codec.reduce_encode(s.payloads, s.server, layout=s.layout, chunk=2),
        ["[0, 2)", "got 2"],
    ),
    "reduce a negative chunk": (
        lambda s: s.codec.reduce_encode(s.payloads, s.server, layout=s.layout, chunk=-1),
        ["[0, 2)", "got -1"],
    ),
    "decode without a size": (lambda s: s.codec.decode(s.payload), ["out=", "numel="]),
    "decode a negative size": (lambda s: s.codec.decode(s.payload, numel=-5), ["not be negative", "-5"]),
    "decode into integers": (
        lambda s: s.codec.decode(s.payload, s.out.long()),
        [TAKES, "int64"],
    ),
    "decode into a strided tensor": (
        lambda s: s.codec.decode(s.payload, s.out.view(10, 10).t()),
        ["contiguous", "(1, 10)"],
    ),
    "decode to another device": (lambda s: s.codec.decode(s.payload, s.out.to(META)), ["cpu", META, "one device"]),
    "decode floats": (lambda s: s.codec.decode(s.payload.float(), s.out), ["uint8", "float32"]),
    "decode part of a payload": (lambda s: s.codec.decode(s.payload[:-16], s.out), ["payloads of 32 bytes", "16"]),
    "decode too many payloads": (
        lambda s: s.codec.decode(s.payload.repeat(3), s.out),
        ["expected 1 payloads", "got 3"],
    ),
    "decode too few payloads": (
        lambda s: s.codec.decode(s.payloads[0], [s.out, s.xs[1]], layout=s.layout),
        ["expected 2 payloads", "got 1"],
    ),
    "decode payloads that are not on 16 bytes": (
        lambda s: s.codec.decode(samples.unaligned(s.payload), s.out),
        ["multiple of 16 bytes", "1 bytes past"],
    ),
    "decode bytes into nothing": (lambda s: s.codec.decode(s.payload, numel=0), ["payloads of 0 bytes", "32 bytes"]),
    # Signs alone.
    "pack integers": (lambda s: pack_signs(s.x.int(), s.bits), [TAKES, "int32"]),
    "pack a strided tensor": (lambda s: pack_signs(s.x[::2]), ["contiguous", "(2,)"]),
    "pack into too few bytes": (lambda s: pack_signs(s.x, s.bits[:12]), ["13 bytes", "12"]),
    "pack into floats": (lambda s: pack_signs(s.x, s.bits.float()), ["uint8", "float32"]),
    "pack to another device": (lambda s: pack_signs(s.x, s.bits.to(META)), ["on cpu", META]),
    "unpack floats": (lambda s: unpack_signs(s.bits.float(), s.out), ["uint8", "float32"]),
    "unpack too few bytes": (lambda s: unpack_signs(s.bits[:12], s.out), ["100 elements need 13 bytes", "12"]),
    "unpack too many bytes": (lambda s: unpack_signs(s.bits.repeat(2), s.out), ["100 elements need 13 bytes", "26"]),
    "unpack into integers": (lambda s: unpack_signs(s.bits, s.out.int()), [TAKES, "int32"]),
    "unpack into a strided tensor": (lambda s: unpack_signs(s.bits, s.out.view(10, 10).t()), ["contiguous", "(1, 10)"]),
    "unpack to another device": (lambda s: unpack_signs(s.bits, s.out.to(META)), ["cpu", META, "one device"]),
    "unpack a negative size": (lambda s: unpack_signs(s.bits, numel=-1), ["not be negative", "-1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_argument_is_refused_and_changes_nothing(case: str) -> None:
    call, words = CASES[case]
    s = state()
    buffers = [s.x, *s.xs, s.residual, s.server, s.payload, s.payloads, s.mask, s.bits, s.out, s.target]
    before = [b.clone() for b in buffers]
    with pytest.raises(InputError) as refused:
        call(s)
    for word in words:
        assert word in str(refused.value)
    assert all(map(samples.same_bytes, buffers, before))


def test_an_input_error_is_an_onebit_error_and_a_value_error() -> None:
    assert issubclass(InputError, OnebitError)
    assert issubclass(InputError, ValueError)


def test_a_plan_refuses_what_a_codec_would() -> None:
    with pytest.raises(InputError, match="at least 1"):
        plan([N], 64, chunks=0)
