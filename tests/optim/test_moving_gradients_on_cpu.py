"""Two optimizers in one process, one's gradients elsewhere at every step, as the shards of `fully_shard` are.

The CUDA sources run on the CPU, and the device decides about steps.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam
from tests.comm.samples import bits
from tests.optim.samples import contents, feedback, values
from tests.optim.settling_on_cpu import settle_by_cuda_sources
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu

__all__ = ["kernels_on_cpu"]

SHAPES = ((33, 64), (33,), (32, 65), (32,), (1,), (64, 48))
SPOILT = (6, 9)  # steps in which a rank has a number that is not finite
pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no g++"), pytest.mark.usefixtures("kernels_on_cpu")]


def in_one(tensors: list[Tensor], lead: int) -> list[Tensor]:
    """Copies, as views of one buffer whose first `lead` elements are nobody's."""
    flat = torch.cat([torch.full((lead,), math.nan), *(t.reshape(-1) for t in tensors)])
    pieces = torch.split(flat[lead:], [t.numel() for t in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


def gradients(rank: int, number: int) -> list[Tensor]:
    made = [values(i, number, rank, shape=shape) for i, shape in enumerate(SHAPES)]
    if number in SPOILT and rank == 1:
        made[2][3, 4] = math.inf
    return made


def train(backend: Backend, options: dict[str, Any]) -> list[Any]:
    """The state after each step; the other optimizer's memory is worthless as soon as its step has returned."""
    start = [values(i, shape=shape) for i, shape in enumerate(SHAPES)]
    moved = [Parameter(t) for t in in_one(start, 3)]
    still = [Parameter(t.clone()) for t in start]
    optimizers = [OnebitAdam(p, lr=1e-2, freeze_step=2, backend=backend, **options) for p in (moved, still)]
    kept: list[Tensor] = []
    seen = []
    for number in range(12):
        given = gradients(backend.rank, number)
        elsewhere = in_one(given, number % 5)
        for p, q, g, h in zip(moved, still, elsewhere, given, strict=True):
            p.grad, q.grad = g, h
        kept.append(elsewhere[0])  # so that no memory is used again at once
        for optimizer in optimizers:
            optimizer.step()
        for p in moved:
            assert p.grad is not None
            p.grad.fill_(math.nan)
        assert bits(moved) == bits(still), number
        if number % 4 == 3:  # reading a state is a use of kernels, too
            assert contents(optimizers[0]) == contents(optimizers[1])
            assert feedback(optimizers[0]) == feedback(optimizers[1])
        seen.append(bits(still))
    assert [o.skipped_steps for o in optimizers] == [len(SPOILT)] * 2
    return seen


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "adamw_mode": False, "bucket_mb": 0.004}])
def test_where_gradients_lie_changes_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_threads(2, train, options)
    settling = settle_by_cuda_sources(monkeypatch)
    assert run_threads(2, train, options) == expected
    assert settling == {"gpu"}
