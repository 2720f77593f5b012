"""The floor under a frozen variance: what it raises, and that small entries among large ones stay where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import InputError
from onebit.optim import OnebitAdam
from onebit.optim.floor import raise_small_variances
from tests.comm.samples import bits


def expected(v: Tensor, fraction: float, size: int) -> Tensor:
    flat = v.double().reshape(-1).numpy().copy()
    for start in range(0, flat.size, size):
        block = flat[start : start + size]
        if (block > 0).any():
            least = (fraction * np.sqrt(block[block > 0]).mean()) ** 2
            block[block > 0] = np.maximum(block[block > 0], least)
    return torch.from_numpy(flat).view(v.shape)


@pytest.mark.parametrize("numel", [0, 1, 31, 1024, 1025, (1 << 22) + 700])
def test_roots_are_raised_to_a_share_of_their_blocks_mean(numel: int) -> None:
    v = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).pow(6)
    v[::7] = 0.0
    wanted = expected(v, 0.3, 1024)
    raise_small_variances([v], 0.3, 1024)
    # A few roundings of the mean and of its square.
    torch.testing.assert_close(v.double(), wanted, rtol=1e-6, atol=0)
    assert (v[::7] == 0).all()


def test_blocks_follow_row_major_order_whatever_the_strides() -> None:
    v = torch.rand(2, 96, 5, 4).pow(4)
    strided = v.clone(memory_format=torch.channels_last)
    raise_small_variances([v], 0.5, 1024)
    raise_small_variances([strided], 0.5, 1024)
    assert torch.equal(v, strided)
    assert strided.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("block_size", [64, 1024, None])
def test_with_a_fraction_of_0_nothing_changes(block_size: int | None) -> None:
    v = torch.rand(3000).pow(8)
    before = bits(v)
    raise_small_variances([v], 0.0, block_size)
    assert bits(v) == before


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan"), "much", True])
def test_other_fractions_are_refused(fraction: object) -> None:
    with pytest.raises(InputError, match="variance_floor"):
        OnebitAdam([Parameter(torch.ones(2))], freeze_step=2, variance_floor=fraction)  # type: ignore[arg-type]


def wander(backend: Backend, floor: float) -> tuple[float, float]:
    """How far small and large entries of one block are from 0 at worst, pulled there by noisy gradients."""
    size = torch.ones(1024)
    size[:512] = 1e-3
    p = Parameter(torch.zeros(1024))
    optimizer = OnebitAdam(
        [p], betas=(0.9, 0.95), weight_decay=0.0, freeze_step=50, variance_floor=floor, backend=backend
    )
    noise = torch.Generator().manual_seed(backend.rank)
    worst = torch.zeros(2)
    for _ in range(250):
        p.grad = (torch.randn(1024, generator=noise) + 0.5 * p.detach()) * size
        optimizer.step()
        worst = worst.maximum(p.detach().abs().view(2, 512).mean(1))
    return float(worst[0]), float(worst[1])


def test_an_entry_far_below_its_neighbours_does_not_wander_further_than_they_do() -> None:
    small, large = run_threads(2, wander, 0.1)[0]
    assert small < large
    small, large = run_threads(2, wander, 0.0)[0]
    assert small > 3 * large, "the published algorithm throws it about; without that the floor would be of no use"


def test_one_rank_compresses_nothing_and_needs_no_floor() -> None:
    p = Parameter(torch.ones(1024))
    optimizer = OnebitAdam([p], freeze_step=1, variance_floor=0.5)
    g = torch.rand(1024).pow(8)
    p.grad = g
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], g * g * 1e-3)
