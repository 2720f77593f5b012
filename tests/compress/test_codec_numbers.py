"""Zeros of both signs, numbers halfway between two of a dtype and one number alone, in all implementations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from onebit.compress import SignCodec, pack_signs
from onebit.compress.kernels import DTYPES
from tests.compress import samples
from tests.compress.samples import assert_same_numbers


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
