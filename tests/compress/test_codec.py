"""Every operator, in every implementation, gives what the oracle says, and all implementations give the same bytes."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from onebit.compress import SignCodec, pack_signs, unpack_signs
from onebit.compress.kernels import DTYPES, IMPLEMENTATIONS, OPERATORS
from tests.compress import oracle, samples
from tests.compress.samples import LEFT_OVER, assert_same_numbers
from tests.compress.samples import same_bytes as same_bits


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


def test_the_table_covers_every_operator_and_implementation() -> None:
    assert set(COLUMNS) == set(OPERATORS)
    assert {case.kernels for case in table(tuple(IMPLEMENTATIONS))} == set(IMPLEMENTATIONS)
    assert set(samples.KERNELS) | {"gpu"} == set(
        IMPLEMENTATIONS
    )  # tests/gpu has the table of the one that needs a device


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
