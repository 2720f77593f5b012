"""Every operator, in every implementation, gives what the oracle says, and all implementations give the same bytes."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onebit.compress import Layout, SignCodec, pack_signs, reference, set_num_threads, unpack_signs
from onebit.compress.kernels import DTYPES, IMPLEMENTATIONS, OPERATORS
from tests.compress import oracle, samples

LEFT_OVER = 0xA5  # what a buffer held before it was written


class Case(NamedTuple):
    """One line of the table; what an operator does not depend on is fixed."""

    operator: str
    kernels: str
    dtype: torch.dtype = torch.float32
    block_size: int | None = 1024
    scale: str = "mean"
    masked: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        block = self.block_size or "tensor"
        return "-".join(
            map(str, (self.operator, self.kernels, dtype, block, self.scale, "masked" if self.masked else "all"))
        )

    def codec(self, kernels: str | None = None) -> SignCodec:
        return SignCodec(block_size=self.block_size, scale=self.scale, kernels=kernels or self.kernels)


# Operator: which columns of the table matter to it.
COLUMNS = {
    "encode": ("dtype", "block_size", "scale", "masked"),
    "reduce_encode": ("block_size", "scale", "masked"),
    "decode": ("dtype", "block_size", "masked"),
    "pack_signs": ("dtype",),
    "unpack_signs": ("dtype",),
}
CHOICES = {
    "dtype": DTYPES,
    "block_size": samples.BLOCK_SIZES,
    "scale": ("mean", "rms"),
    "masked": (False, True),
}


def table(implementations: tuple[str, ...]) -> list[Case]:
    return [
        Case(operator, kernels, **dict(zip(COLUMNS[operator], chosen, strict=True)))
        for operator, kernels in itertools.product(OPERATORS, implementations)
        for chosen in itertools.product(*(CHOICES[column] for column in COLUMNS[operator]))
    ]


@pytest.mark.parametrize("case", table(samples.KERNELS), ids=str)
def test_an_operator_gives_what_the_oracle_says(case: Case) -> None:
    {
        "encode": check_encode,
        "reduce_encode": check_reduce_encode,
        "decode": check_decode,
        "pack_signs": check_pack_signs,
        "unpack_signs": check_unpack_signs,
    }[case.operator](case)


def check_encode(case: Case) -> None:
    for chunks, seed in ((1, 0), (3, 1), (2, 2)):
        codec, xs = case.codec(), samples.tensors(samples.NUMELS, case.dtype, seed)
        (layout,) = codec.plan(xs, chunks)
        shape = oracle.geometry(samples.NUMELS, case.block_size, chunks)
        residual = samples.residual_of(layout, seed) if seed < 2 else None
        mask = samples.mask_of(layout, seed) if case.masked else None
        expected = oracle.encode(
            samples.arrays(xs),
            None if residual is None else samples.blocks(residual, shape),
            samples.mask_blocks(mask, shape),
            shape,
            case.scale,
        )
        payload = codec.encode(xs, residual, layout=layout, mask=mask)
        assert payload.numel() == chunks * shape.payload_bytes
        bits, scales = oracle.parse(payload.numpy(), shape, chunks)
        expected.check_payload(bits, scales)
        if residual is not None:
            expected.check_residual(samples.blocks(residual, shape), scales)


def check_reduce_encode(case: Case) -> None:
    chunks = 2
    codec = case.codec()
    (layout,) = codec.plan(samples.NUMELS, chunks)
    shape = oracle.geometry(samples.NUMELS, case.block_size, chunks)
    for ranks, chunk in zip(range(1, 9), itertools.cycle(range(chunks)), strict=False):
        payloads = samples.random_payloads(codec, layout, ranks, seed=ranks)
        residual = samples.residual_of(layout, ranks)[: layout.chunk_numel].clone() if ranks != 2 else None
        mask = samples.mask_of(layout, ranks) if case.masked else None
        dead = samples.mask_blocks(mask, shape)
        expected = oracle.reduce_encode(
            list(payloads.numpy()),
            None if residual is None else samples.blocks(residual, shape),
            None if dead is None else dead[chunk * layout.chunk_blocks : (chunk + 1) * layout.chunk_blocks],
            shape,
            chunk,
            case.scale,
        )
        payload = codec.reduce_encode(payloads, residual, layout=layout, chunk=chunk, mask=mask)
        assert payload.numel() == shape.payload_bytes
        bits, scales = oracle.parse(payload.numpy(), shape, 1)
        expected.check_payload(bits, scales)
        if residual is not None:
            expected.check_residual(samples.blocks(residual, shape), scales)


def check_decode(case: Case) -> None:
    for chunks in (1, 3):
        codec = case.codec()
        (layout,) = codec.plan(samples.NUMELS, chunks)
        shape = oracle.geometry(samples.NUMELS, case.block_size, chunks)
        payloads = samples.random_payloads(codec, layout, chunks, seed=chunks)
        mask = samples.mask_of(layout) if case.masked else None
        expected = oracle.decode(payloads.numpy(), samples.mask_blocks(mask, shape), shape, samples.NUMELS)
        outs = [torch.full((n,), 77.0, dtype=case.dtype) for n in samples.NUMELS]
        assert codec.decode(payloads, outs, layout=layout, mask=mask) is outs
        for out, values in zip(outs, expected, strict=True):
            assert_same_numbers(out, torch.from_numpy(values).to(case.dtype))


def check_pack_signs(case: Case) -> None:
    for numel in (*range(1, 70), 1000, 4097):
        x = samples.tensors([numel], case.dtype, seed=numel)[0]
        packed = pack_signs(x, kernels=case.kernels).numpy()
        signs = np.unpackbits(packed, bitorder="little")
        np.testing.assert_array_equal(signs[:numel], samples.arrays([x])[0] >= 0)
        assert packed.size == -(-numel // 8)
        assert not signs[numel:].any(), "spare bits"


def check_unpack_signs(case: Case) -> None:
    for numel in (*range(1, 70), 1000, 4097):
        bits = np.random.default_rng(numel).integers(0, 256, -(-numel // 8), np.uint8)  # spare bits are anything
        out = unpack_signs(torch.from_numpy(bits), torch.empty(numel, dtype=case.dtype), kernels=case.kernels)
        expected = 2.0 * np.unpackbits(bits, bitorder="little")[:numel] - 1
        np.testing.assert_array_equal(samples.arrays([out])[0], expected)


def assert_same_numbers(a: Tensor, b: Tensor) -> None:
    """Bit for bit, -0.0 apart from 0.0, but one NaN is as good as another."""
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    words = torch.int32 if a.dtype == torch.float32 else torch.int16
    zero = torch.zeros((), dtype=words)
    assert torch.equal(torch.where(a.isnan(), zero, a.view(words)), torch.where(b.isnan(), zero, b.view(words)))


def run(case: Case, kernels: str, aligned: bool) -> list[bytes]:
    """Every byte that a case writes, with chunks, several tensors and payloads, from the same input for all kernels."""
    codec, place = case.codec(kernels), (lambda t: t.clone()) if aligned else samples.unaligned
    xs = [place(x) for x in samples.tensors(samples.NUMELS, case.dtype)]
    (layout,) = codec.plan(xs, 3)
    mask = samples.mask_of(layout) if case.masked else None
    residual = place(samples.residual_of(layout))
    if case.operator == "encode":
        out = torch.full((3 * layout.payload_bytes,), LEFT_OVER, dtype=torch.uint8)
        return [
            samples.as_bytes(codec.encode(xs, residual, layout=layout, mask=mask, out=out)),
            samples.as_bytes(residual),
        ]
    if case.operator == "reduce_encode":
        residual, out = (
            residual[: layout.chunk_numel],
            torch.full((layout.payload_bytes,), LEFT_OVER, dtype=torch.uint8),
        )
        payloads = samples.random_payloads(codec, layout, 5)
        codec.reduce_encode(payloads, residual, layout=layout, chunk=1, mask=mask, out=out)
        return [samples.as_bytes(out), samples.as_bytes(residual)]
    if case.operator == "decode":
        codec.decode(samples.random_payloads(codec, layout, 3), xs, layout=layout, mask=mask)
        return [samples.as_bytes(x) for x in xs]
    if case.operator == "pack_signs":
        return [samples.as_bytes(pack_signs(x, kernels=kernels)) for x in xs]
    return [samples.as_bytes(unpack_signs(pack_signs(x), x, kernels=kernels)) for x in xs]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("case", table(("reference",)), ids=str)
def test_all_implementations_write_the_same_bytes(case: Case, aligned: bool) -> None:
    expected = run(case, "reference", True)
    for kernels in samples.KERNELS:
        assert run(case, kernels, aligned) == expected, kernels


def everything(codec: SignCodec, x: Tensor, residual: Tensor, ranks: int) -> list[bytes]:
    """Encode, average with other ranks' payloads, decode: all bytes that come of it."""
    (layout,) = codec.plan([x])
    sent = codec.encode(x, residual)
    others = samples.random_payloads(codec, layout, ranks - 1) if ranks > 1 else sent.new_empty((0, sent.numel()))
    server = torch.zeros(x.numel())
    mean = codec.reduce_encode(torch.cat([sent.view(1, -1), others]), server, layout=layout)
    back = codec.decode(mean, torch.empty_like(x))
    assert isinstance(back, Tensor)
    return [samples.as_bytes(t) for t in (sent, residual, mean, server, back)]


@pytest.mark.parametrize("codec", [SignCodec(), SignCodec(block_size=None)], ids=["blocks", "tensor"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_nothing(codec: SignCodec, threads: int) -> None:
    x = torch.randn(700_001, generator=torch.Generator().manual_seed(1))  # enough for 10 threads

    def bytes_with(count: int) -> list[bytes]:
        set_num_threads(count)
        try:
            return everything(codec, x, torch.zeros_like(x), ranks=3)
        finally:
            set_num_threads(None)

    assert bytes_with(threads) == bytes_with(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_large_outputs_that_are_written_past_the_cache_are_right(dtype: torch.dtype, aligned: bool) -> None:
    numel = 2_100_000  # 4.2 MB of 16-bit elements; the kernels stream from 4 MiB on
    signs = torch.randn(numel, generator=torch.Generator().manual_seed(2)) >= 0
    codec = SignCodec()
    payload = codec.encode(torch.where(signs, 3.0, -3.0))
    out = torch.full((numel,), 77.0, dtype=dtype)
    out = out if aligned else samples.unaligned(out)
    codec.decode(payload, out)
    assert torch.equal(out, torch.where(signs, 3.0, -3.0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_decode_rounds_to_the_nearest_number_and_ties_to_the_even_one(kernels: str, dtype: torch.dtype) -> None:
    ties = [1 + odd * 2.0**-bits for odd in (1, 3) for bits in (8, 11)]  # halfway between two of bf16, of fp16
    edges = [65519.0, 65520.0, 3.3895314e38, 3.4e38, 2.0**-25, 1.5 * 2.0**-24, 2.0**-134, 1e-45, torch.nan]
    scales = torch.tensor([*ties, *edges])
    codec = SignCodec(block_size=64, kernels=kernels)
    # 40 elements of each: a whole word and part of one. The mean of one element is exact, so the others are masked.
    xs = [torch.full((40,), float(scale)) for scale in scales]
    (layout,) = codec.plan(xs)
    mask = torch.full((layout.padded_numel // 8,), 0xFF, dtype=torch.uint8)
    mask[::8] = 0xFE
    outs = [torch.empty(40, dtype=dtype) for _ in xs]
    codec.decode(codec.encode(xs, layout=layout, mask=mask), outs, layout=layout)
    signs = torch.where(torch.arange(40) == 0, 1.0, -1.0)  # masked elements were sent as -
    expected = [torch.where(torch.isnan(x), x, x * signs) for x in xs]
    assert_same_numbers(torch.cat(outs), torch.cat(expected).to(dtype))


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_a_tensor_of_one_element_comes_back_exactly(kernels: str) -> None:
    for block_size, scale in itertools.product(samples.BLOCK_SIZES, ("mean", "rms")):
        codec, residual = SignCodec(block_size=block_size, scale=scale, kernels=kernels), torch.zeros(1)
        back = codec.decode(codec.encode(torch.tensor([1.0]), residual), numel=1)
        assert isinstance(back, Tensor)
        assert back.tolist() == [1.0], "padding was counted"
        assert residual.tolist() == [0.0]


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_zero_and_minus_zero_are_plus_and_nan_is_minus(kernels: str) -> None:
    x = torch.tensor([0.0, -0.0, torch.nan, -torch.nan, 1.0, -1.0, torch.inf, -torch.inf])
    assert pack_signs(x, kernels=kernels).tolist() == [0b01010011]
    payload = SignCodec(kernels=kernels).encode(x)
    assert payload[0].item() == 0b01010011


@pytest.mark.parametrize("numel", [64, 40])
def test_a_mean_of_minus_zeros_is_minus_zero_in_all_implementations(numel: int) -> None:
    def residual_after(kernels: str) -> bytes:
        codec, residual = SignCodec(block_size=32, kernels=kernels), torch.full((numel,), -0.0)
        (layout,) = codec.plan([numel])
        nothing = torch.zeros(2, layout.payload_bytes, dtype=torch.uint8)  # scale 0 and sign -, twice
        assert codec.reduce_encode(nothing, residual, layout=layout)[0] == 0xFF, "-0.0 is +"
        return samples.as_bytes(residual)

    assert {residual_after(kernels) for kernels in samples.KERNELS} == {samples.as_bytes(torch.full((numel,), -0.0))}


@pytest.mark.parametrize("kernels", samples.KERNELS)
@pytest.mark.parametrize("poison", samples.NON_FINITE)
@pytest.mark.parametrize("scale", ["mean", "rms"])
def test_a_non_finite_element_spoils_its_block_and_no_other(kernels: str, poison: float, scale: str) -> None:
    codec = SignCodec(block_size=64, scale=scale, kernels=kernels)
    x, residual = torch.randn(200), torch.randn(200)
    x[70] = poison
    before = residual.clone()
    back = codec.decode(codec.encode(x, residual), numel=200)
    assert isinstance(back, Tensor)
    assert back.isnan().nonzero().view(-1).tolist() == list(range(64, 128))
    assert same_bits(residual[64:128], before[64:128])
    assert not torch.equal(residual[:64], before[:64])
    assert not torch.equal(residual[128:], before[128:])


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_with_a_scale_per_tensor_a_non_finite_element_spoils_its_tensor_and_no_other(kernels: str) -> None:
    codec = SignCodec(block_size=None, kernels=kernels)
    xs = [torch.randn(3000), torch.randn(3000)]
    (layout,) = codec.plan(xs, 2)
    residual = samples.residual_of(layout)
    xs[0][2999] = torch.nan
    before = residual.clone()
    outs = [torch.zeros(3000), torch.zeros(3000)]
    codec.decode(codec.encode(xs, residual, layout=layout), outs, layout=layout)
    assert outs[0].isnan().all()
    assert outs[1].isfinite().all()
    for s in layout.segments:
        unchanged = same_bits(residual[layout.residual_span(s)], before[layout.residual_span(s)])
        assert unchanged == (s.tensor == 0)


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_a_nan_in_the_residual_or_in_one_ranks_scale_reaches_everybody(kernels: str) -> None:
    codec = SignCodec(kernels=kernels)
    residual = torch.zeros(2000)
    residual[1500] = torch.nan
    poisoned = codec.encode(torch.ones(2000), residual)
    clean = codec.encode(torch.ones(2000))
    server = torch.zeros(2000)
    mean = codec.reduce_encode(torch.stack([clean, poisoned, clean]), server, numel=2000)
    back = codec.decode(mean, numel=2000)
    assert isinstance(back, Tensor)
    assert torch.equal(back.isnan(), torch.arange(2000) >= 1024)
    assert not server.any()


@pytest.mark.parametrize("kernels", samples.KERNELS)
@pytest.mark.parametrize("scale", ["mean", "rms"])
@pytest.mark.parametrize("block_size", [1024, None])
def test_huge_values_whose_sum_overflows_have_a_finite_scale(kernels: str, scale: str, block_size: int | None) -> None:
    largest = torch.finfo(torch.float32).max
    codec = SignCodec(block_size=block_size, scale=scale, kernels=kernels)
    residual = torch.zeros(5000)
    back = codec.decode(codec.encode(torch.full((5000,), -largest), residual), numel=5000)
    assert isinstance(back, Tensor)
    # Each of at most 23 roundings may lose half a unit in the last place; up, the scale stops at the largest number.
    assert torch.allclose(back, torch.full((5000,), -largest), rtol=23 * oracle.UNIT, atol=0)
    assert residual.isfinite().all()


@pytest.mark.parametrize("squared", [False, True], ids=["mean", "rms"])
def test_a_scale_at_the_top_of_the_range_stops_there_however_its_sum_was_rounded(squared: bool) -> None:
    """2²⁴ + 1 elements count as 2²⁴ in fp32: their sum over that is too large."""
    largest, count = torch.finfo(torch.float32).max, 2**24 + 1
    term = (largest * reference.RESCUE) ** (2 if squared else 1)
    rescued = torch.tensor([term * (count + 1)])
    scales = reference.scales_from_sums(torch.tensor([torch.inf]), rescued, torch.tensor([count]), squared)
    assert scales.tolist() == [largest]


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_a_sum_of_finite_values_that_overflows_counts_as_non_finite(kernels: str) -> None:
    largest = torch.finfo(torch.float32).max
    residual = torch.full((3,), largest)
    back = SignCodec(kernels=kernels).decode(SignCodec(kernels=kernels).encode(residual.clone(), residual), numel=3)
    assert isinstance(back, Tensor)
    assert back.isnan().all()
    assert residual.tolist() == [largest] * 3


@pytest.mark.parametrize("kernels", samples.KERNELS)
@pytest.mark.parametrize("poison", samples.NON_FINITE)
def test_what_is_masked_counts_for_nothing_even_if_it_is_not_finite(kernels: str, poison: float) -> None:
    codec = SignCodec(block_size=32, kernels=kernels)
    x, residual = torch.ones(96), torch.ones(96)
    mask = torch.from_numpy(np.packbits(np.arange(96) % 3 == 0, bitorder="little"))
    mask[4:8] = 0xFF  # the second block, whole
    dead = torch.from_numpy(oracle.unpack(mask.numpy()))
    x[dead] = poison
    residual[dead] = poison
    payload = codec.encode(x, residual, mask=mask)
    assert oracle.parse(payload.numpy(), oracle.geometry([96], 32), 1)[1].tolist() == [2.0, 0.0, 2.0]
    back = codec.decode(payload, numel=96, mask=mask)
    assert isinstance(back, Tensor)
    assert torch.equal(back, torch.where(dead, 0.0, 2.0))
    assert not residual.any(), "masked elements hold no residual, the others are said exactly"


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


def test_the_mean_scale_contracts_on_99_percent_zeros_and_the_root_mean_square_does_not() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1 << 20, generator=generator) * (torch.rand(1 << 20, generator=generator) < 0.01)

    def relative_error(scale: str) -> float:
        residual = torch.zeros_like(x)
        SignCodec(block_size=None, scale=scale).encode(x, residual)
        return float((residual.double().square().sum() / x.double().square().sum()).item())

    # Of normal numbers with probability p: mean |c| = p·√(2/π), mean square = p, so the error is 1 - 2p/π = 0.9936 for
    # the mean and 2 - 2·√(2p/π) = 1.840 for the root mean square; sampled, p is 0.01 to 1 %, its root to 0.5 %.
    assert relative_error("mean") == pytest.approx(0.9936, abs=2e-4)
    assert relative_error("rms") == pytest.approx(1.840, abs=3e-3)


@pytest.mark.parametrize("kernels", samples.KERNELS)
def test_a_parameter_is_encoded_and_decoded_without_autograd(kernels: str) -> None:
    codec, residual = SignCodec(kernels=kernels), torch.zeros(40)
    parameter = torch.nn.Parameter(torch.full((40,), 2.0))
    payload = codec.encode(parameter, residual)
    assert not residual.requires_grad
    codec.decode(payload, parameter)
    unpack_signs(pack_signs(parameter, kernels=kernels), parameter, kernels=kernels)
    assert parameter.grad_fn is None
    assert parameter.is_leaf
    assert parameter.tolist() == [1.0] * 40


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


def test_codecs_that_send_the_same_bytes_are_equal_whatever_kernels_they_use() -> None:
    assert SignCodec(kernels="cpu") == SignCodec(kernels="reference")
    assert SignCodec(scale="rms") != SignCodec()
    assert hash(SignCodec(kernels="cpu")) == hash(SignCodec())
    assert SignCodec().kernels_on("cpu") == "cpu"
    assert SignCodec(kernels="reference").kernels_on("cpu") == "reference"


def test_the_table_covers_every_operator_and_implementation() -> None:
    assert set(COLUMNS) == set(OPERATORS)
    assert {case.kernels for case in table(tuple(IMPLEMENTATIONS))} == set(IMPLEMENTATIONS)
    assert set(samples.KERNELS) | {"gpu"} == set(
        IMPLEMENTATIONS
    )  # tests/gpu has the table of the one that needs a device


def parts(layouts: tuple[Layout, ...], payloads: list[Tensor], residuals: list[Tensor]) -> dict[tuple[int, int], bytes]:
    """Bits, scale and residual of every block, by tensor and first element: wherever it lies."""
    found = {}
    for layout, payload, residual in zip(layouts, payloads, residuals, strict=True):
        shape = oracle.Geometry(layout.block_size, False, [[oracle.PADDING] * layout.chunk_blocks] * layout.chunks)
        bits, scales = oracle.parse(payload.numpy(), shape, layout.chunks)
        for s in layout.segments:
            for i in range(-(-s.numel // layout.block_size)):
                block = s.block + i
                held = residual[block * layout.block_size :][: min(layout.block_size, s.numel - i * layout.block_size)]
                found[s.tensor, s.offset + i * layout.block_size] = (
                    bits[block].tobytes() + scales[block].tobytes() + samples.as_bytes(held)
                )
    return found


@given(
    codec=samples.codecs(),
    numels=st.lists(samples.numels(), min_size=1, max_size=5),
    chunks=st.integers(1, 5),
    bucket_numel=st.none() | st.integers(1, 6000),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_bucket_size_neighbours_and_order_change_no_bit(
    codec: SignCodec, numels: list[int], chunks: int, bucket_numel: int | None, order: random.Random, seed: int
) -> None:
    xs = samples.tensors(numels, torch.float32, seed)
    old = [torch.randn(n, generator=torch.Generator().manual_seed(seed)) for n in numels]
    places = list(range(len(xs)))
    order.shuffle(places)

    def encoded(indices: list[int], chunks: int, bucket_numel: int | None) -> dict[tuple[int, int], bytes]:
        chosen = [xs[i] for i in indices]
        layouts = codec.plan(chosen, chunks, bucket_numel)
        residuals = [torch.zeros(layout.padded_numel) for layout in layouts]
        for layout, residual in zip(layouts, residuals, strict=True):
            for s in layout.segments:
                residual[layout.residual_span(s)] = old[indices[s.tensor]][s.offset : s.offset + s.numel]
        payloads = [codec.encode(chosen, r, layout=layout) for layout, r in zip(layouts, residuals, strict=True)]
        return {(indices[t], o): block for (t, o), block in parts(layouts, payloads, residuals).items()}

    alone: dict[tuple[int, int], bytes] = {}
    for i in range(len(xs)):
        alone |= encoded([i], 1, None)
    assert encoded(places, chunks, bucket_numel) == alone


@given(
    codec=samples.codecs(),
    numels=st.lists(samples.numels(), min_size=1, max_size=4),
    ranks=st.integers(1, 5),
    bucket_numel=st.none() | st.integers(1, 6000),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_the_mean_over_ranks_does_not_depend_on_buckets_neighbours_or_order(
    codec: SignCodec, numels: list[int], ranks: int, bucket_numel: int | None, order: random.Random, seed: int
) -> None:
    """For a given number of ranks: a scale per tensor is one of the part that a rank averages."""
    of_ranks = [samples.tensors(numels, torch.float32, seed + rank) for rank in range(ranks)]
    places = list(range(len(numels)))
    order.shuffle(places)

    def averaged(indices: list[int], bucket_numel: int | None) -> dict[int, bytes]:
        outs = [torch.zeros(numels[i]) for i in indices]
        for layout in codec.plan(outs, ranks, bucket_numel):
            sent = [codec.encode([xs[i] for i in indices], layout=layout).view(ranks, -1) for xs in of_ranks]
            means = [
                codec.reduce_encode(torch.stack([s[k] for s in sent]), layout=layout, chunk=k) for k in range(ranks)
            ]
            codec.decode(torch.cat(means), outs, layout=layout)
        return {i: samples.as_bytes(out) for i, out in zip(indices, outs, strict=True)}

    alone: dict[int, bytes] = {}
    for i in range(len(numels)):
        alone |= averaged([i], None)
    assert averaged(places, bucket_numel) == alone


def same_bits(a: Tensor, b: Tensor) -> bool:
    return samples.same_bytes(a, b)


def test_the_unchecked_operators_write_what_the_checked_ones_do() -> None:
    codec, xs = SignCodec(scale="rms"), samples.tensors(samples.NUMELS, torch.float32)
    (layout,) = codec.plan(xs, 3)
    mask, operators = samples.mask_of(layout), codec.unchecked(torch.device("cpu"))
    residual = samples.residual_of(layout)
    expected = codec.encode(xs, residual.clone(), layout=layout, mask=mask)
    payloads = torch.zeros_like(expected)
    operators.encode(xs, residual.clone(), mask, payloads, layout)
    assert same_bits(payloads, expected)
    rows, mean = payloads.view(3, -1), torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    operators.reduce_encode(rows, None, mask, mean, layout, 2)
    assert same_bits(mean, codec.reduce_encode(rows, layout=layout, chunk=2, mask=mask))
    outs, expected_outs = ([torch.zeros_like(x) for x in xs] for _ in range(2))
    operators.decode(rows, mask, outs, layout)
    codec.decode(payloads, expected_outs, layout=layout, mask=mask)
    assert all(map(same_bits, outs, expected_outs))
