"""Scales are finite wherever the numbers are, and that of the mean makes the error smaller on sparse tensors, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onebit.compress import SignCodec, reference
from tests.compress import oracle, samples


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
