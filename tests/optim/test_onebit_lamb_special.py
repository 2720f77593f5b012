"""Entries that are dead, tensors that are frozen, unused, empty or 0, and empty groups are safe with OnebitLamb."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitLamb
from tests.comm.samples import bits
from tests.optim.lamb_runs import PUBLISHED, of_threads
from tests.optim.samples import Gradients, contents, gradients, step, values


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("factor", [{}, PUBLISHED], ids=["no factor", "factor"])
def test_dead_entries_stay_as_they_are_and_the_living_do_not_notice(
    world_size: int, weight_decay: float, factor: dict[str, float]
) -> None:
    # The dead lie where they share no block with the living, and are 0, so that norms and scales do not tell either.
    def whole() -> list[Parameter]:
        x = values(0, shape=(2048,))
        x[1024:] = 0
        return [Parameter(x)]

    def half() -> list[Parameter]:
        return [Parameter(values(0, shape=(2048,))[:1024].clone())]

    def living(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        g = torch.zeros_like(params[0])
        g[:1024] = 100.0**-number * values(number, rank, shape=(1024,))  # so that the ratio of the living is below 1
        return [g]

    options = {"freeze_step": 3, "lr": 1e-2, "weight_decay": weight_decay, **factor}

    def seen(optimizer: OnebitLamb) -> Any:
        p = optimizer.param_groups[0]["params"][0]
        assert not p.detach()[1024:].any()
        assert not optimizer.state_dict()["state"][0]["exp_avg"][1024:].any()
        return bits([p.detach()[:1024]]), bits(list(optimizer.lamb_coefficients().values()))

    expected = of_threads(world_size, 40, seen, given=living, start=half, **options)
    assert of_threads(world_size, 40, seen, given=living, start=whole, **options) == expected


@pytest.mark.parametrize("factor", [{}, PUBLISHED], ids=["no factor", "factor"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_frozen_unused_empty_and_zero_tensors_and_zero_gradients_are_safe(
    world_size: int, factor: dict[str, float]
) -> None:
    def special() -> list[Parameter]:
        made = [values(0, shape=(40,)), torch.zeros(30), values(2, shape=(20,)), values(3, shape=(9,)), torch.empty(0)]
        return [Parameter(x, requires_grad=i != 3) for i, x in enumerate(made)]

    def given(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(params, rank, number)
        assert made[2] is not None
        made[2].zero_()  # no momentum, ever
        made[3] = None  # frozen
        return made

    def seen(optimizer: OnebitLamb) -> Any:
        params = optimizer.param_groups[0]["params"]
        assert all(bool(p.isfinite().all()) for p in params)
        assert bits(params[2:4]) == bits(special()[2:4])
        assert optimizer.state.get(params[3], {}) == {}
        told = optimizer.lamb_coefficients()
        assert told["coeff"][2:4].tolist() == [1.0, 1.0]
        assert all(bool(row.isfinite().all()) for row in told.values())
        return contents(optimizer)

    options = {"freeze_step": 3, "lr": 0.1, "weight_decay": 0.0, **factor}
    first, *others = of_threads(world_size, 12, seen, given=given, start=special, **options)
    assert all(other == first for other in others)
    assert first[-1][1] != bits(torch.zeros(30)), "a tensor that starts at 0 learns"


def test_a_group_without_parameters_or_without_gradients_does_nothing() -> None:
    def train_nothing(backend: Backend) -> None:
        p = Parameter(values(0, shape=(10,)))
        optimizer = OnebitLamb([{"params": []}, {"params": [p]}], freeze_step=2, backend=backend)
        for _ in range(4):
            step(optimizer, [None])
        assert bits(p) == bits(values(0, shape=(10,)))
        assert [row.numel() for row in optimizer.lamb_coefficients(0).values()] == [0, 0]

    run_threads(2, train_nothing)
