"""A payload has the bytes of the formula, which no padding and nothing that was in its buffer changes."""

from __future__ import annotations

import pytest
import torch

from onebit.compress import SignCodec
from tests.compress import oracle, samples
from tests.compress.samples import LEFT_OVER
from tests.compress.samples import same_bytes as same_bits


@pytest.mark.parametrize("block_size", samples.BLOCK_SIZES)
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_payload_has_the_bytes_of_the_formula_in_16_byte_sections(block_size: int | None, chunks: int) -> None:
    codec = SignCodec(block_size=block_size)
    for numel in (1, 1000, 1024, 1025, 40_000):
        (layout,) = codec.plan([numel], chunks)
        shape = oracle.geometry([numel], block_size, chunks)
        assert layout.payload_bytes == shape.payload_bytes
        assert layout.payload_bytes % 16 == 0
        assert shape.scales_start % 16 == 0
        payload = codec.encode(torch.ones(numel), layout=layout)
        assert payload.dtype == torch.uint8
        assert payload.numel() == chunks * shape.payload_bytes
        assert payload.data_ptr() % 16 == 0


def test_a_number_costs_an_eighth_of_a_byte_and_4_bytes_per_1024() -> None:
    numel = 1 << 20
    n_bytes = SignCodec().encode(torch.zeros(numel)).numel()
    assert n_bytes == numel // 8 + 4 * numel // 1024
    assert 4 * numel / n_bytes == pytest.approx(31.03, abs=0.01)


@pytest.mark.parametrize("block_size", [32, 96])
def test_bytes_between_the_sections_do_not_depend_on_what_the_buffer_held(block_size: int) -> None:
    codec, x = SignCodec(block_size=block_size), torch.ones(100)
    fresh = codec.encode(x)
    used = torch.full_like(fresh, LEFT_OVER)
    assert same_bits(codec.encode(x, out=used), fresh)
    assert same_bits(
        codec.reduce_encode(fresh, numel=100, out=torch.full_like(fresh, LEFT_OVER)),
        codec.reduce_encode(fresh, numel=100),
    )


@pytest.mark.parametrize("kernels", samples.KERNELS)
@pytest.mark.parametrize("operation", ["encode", "reduce_encode"])
def test_padding_is_neither_counted_nor_written(kernels: str, operation: str) -> None:
    codec = SignCodec(block_size=64, kernels=kernels)
    numels = [65, 1, 64]  # 4 blocks on 3 chunks: two whole blocks of padding, too
    (layout,) = codec.plan(numels, 3)
    real = torch.zeros(layout.padded_numel, dtype=torch.bool)
    for s in layout.segments:
        real[layout.residual_span(s)] = True
    residual = torch.where(real, 0.0, torch.nan)
    if operation == "encode":
        payloads = codec.encode([torch.full((n,), -2.0) for n in numels], residual, layout=layout)
    else:
        sent = codec.encode([torch.full((n,), -2.0) for n in numels], layout=layout).view(3, -1)
        parts = residual.view(3, -1)
        payloads = torch.cat(
            [codec.reduce_encode(torch.stack([sent[k]] * 2), parts[k], layout=layout, chunk=k) for k in range(3)]
        )
    bits, scales = oracle.parse(payloads.numpy(), oracle.geometry(numels, 64, 3), 3)
    assert scales.tolist() == [2.0] * 4 + [0.0] * 2
    assert not bits.any()
    assert not residual[real].any()
    assert residual[~real].isnan().all()


@pytest.mark.parametrize("kernels", samples.KERNELS)
@pytest.mark.parametrize("block_size", [32, 1024, None])
def test_a_residual_may_end_with_the_last_real_element(kernels: str, block_size: int | None) -> None:
    codec = SignCodec(block_size=block_size, kernels=kernels)
    x = torch.randn(1500)
    (layout,) = codec.plan([x])
    whole, short = torch.full((layout.padded_numel,), 0.5), torch.full((1500 + 64,), 0.5)
    payload = codec.encode(x, whole)
    assert same_bits(payload, codec.encode(x, short[:1500]))
    assert same_bits(whole[:1500], short[:1500])
    assert (short[1500:] == 0.5).all(), "written past its end"
    payloads = torch.stack([payload] * 3)
    assert same_bits(
        codec.reduce_encode(payloads, whole, numel=1500), codec.reduce_encode(payloads, short[:1500], numel=1500)
    )
    assert same_bits(whole[:1500], short[:1500])
    assert (short[1500:] == 0.5).all(), "written past its end"


def test_codecs_that_send_the_same_bytes_are_equal_whatever_kernels_they_use() -> None:
    assert SignCodec(kernels="cpu") == SignCodec(kernels="reference")
    assert SignCodec(scale="rms") != SignCodec()
    assert hash(SignCodec(kernels="cpu")) == hash(SignCodec())
    assert SignCodec().kernels_on("cpu") == "cpu"
    assert SignCodec(kernels="reference").kernels_on("cpu") == "reference"
