"""The numbers per tensor of OnebitLamb: norms are accurate, coefficients bounded, factors there where asked for."""

from __future__ import annotations

import pytest
import torch

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitLamb, lamb
from tests.comm.oracle import UNIT
from tests.optim.lamb_runs import PUBLISHED, SOON
from tests.optim.samples import gradients, parameters, step, values


def test_a_factor_that_is_asked_for_later_starts_at_1_and_one_that_is_given_up_is_forgotten() -> None:
    def train_on(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitLamb(params, backend=backend, **SOON)
        [group] = optimizer.param_groups
        for number in range(16):
            if number == 8:
                group.update(PUBLISHED)
            if number == 12:
                group.update(factor_min=1.0, factor_max=1.0)
            step(optimizer, gradients(params, backend.rank, number))
            factors = set(optimizer.lamb_coefficients()["factor"].tolist())
            has_factor = 8 <= number < 12
            assert (factors != {1.0}) == has_factor
            assert any("exp_avg_sq_fresh" in state for state in optimizer.state.values()) == has_factor
            assert max(factors) <= 1.1 ** max(0, number - 7) * (1 + 1e-6)

    for world_size in (1, 2):
        run_threads(world_size, train_on)


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, 3_000_017])
def test_norms_are_accurate_and_independent_of_threads_and_strides(numel: int) -> None:
    x = values(numel, shape=(numel,))
    exact = float(x.double().norm())
    before = torch.get_num_threads()
    try:
        made = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.add(float(lamb.norms([x])))
            made.add(float(lamb.norms([torch.stack([x, x], -1)[:, 0]])))
    finally:
        torch.set_num_threads(before)
    (norm,) = made
    # At most 64 squares in a lane and as many lanes, three times over, all positive: relative, and half in the root.
    assert norm == pytest.approx(exact, rel=100 * UNIT)


def test_coefficients_are_bounded_and_factors_move_by_a_tenth_at_most() -> None:
    group = {"min_coeff": 0.01, "max_coeff": 0.3, "factor_min": 0.5, "factor_max": 4.0, "factor_threshold": 0.1}
    x, u = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([5.0, 1e-3, 1e9, 1.0, 0.0])
    assert lamb.trust(x, u, group).tolist() == pytest.approx([0.2, 0.3, 0.01, 1.0, 1.0])
    last = torch.ones(3)
    assert lamb.limited(torch.tensor([3.0, 0.0, 1.05]), last, group).tolist() == pytest.approx([1.1, 0.9, 1.05])
    for wanted, end in ((100.0, 4.0), (0.0, 0.5)):
        r = torch.ones(1)
        for _ in range(40):
            r = lamb.limited(torch.full((1,), wanted), r, group)
        assert float(r) == end
    assert lamb.damped(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.0])).tolist() == [2.0]
