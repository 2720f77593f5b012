"""Error feedback never sees a loss scale: gradients are unscaled before, so a scale that changes needs no rescaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.amp import GradScaler

from onebit.comm import Backend, run_threads
from onebit.optim import CompressedOptimizer
from tests.faults.training import MAKERS, Moment
from tests.optim.samples import all_params, gradients, parameters

STEPS = 12


def train(backend: Backend, name: str, scales: Any) -> Moment:
    """Train with these loss scales, a function of step and rank; None: without a scaler."""
    optimizer: CompressedOptimizer = MAKERS[name](parameters(), lr=1e-2, backend=backend)
    scaler = GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    for number in range(STEPS):
        scale = 1.0 if scales is None else scales(number, backend.rank)
        scaler.scale(torch.ones(()))  # makes the scale
        scaler.update(new_scale=scale)
        given = gradients(all_params(optimizer), backend.rank, number)
        for p, g in zip(all_params(optimizer), given, strict=True):
            p.grad = None if g is None else g * scale
        if scales is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    return Moment.of(optimizer)


@pytest.mark.parametrize("name", MAKERS)
def test_scales_that_change_and_that_differ_by_rank_change_no_bit_of_feedback_or_parameters(name: str) -> None:
    plain = run_threads(2, train, name, None)
    # Powers of two, so that scaling itself rounds nothing.
    for scales in (lambda number, rank: 2.0 ** (16 - number), lambda number, rank: 2.0 ** (8 + number % 3 + 4 * rank)):
        for ours, expected in zip(run_threads(2, train, name, scales), plain, strict=True):
            assert ours.equals(expected)
