"""Gradients that another has averaged, where averages_next_step() asks for it: the bits of steps that average."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, InputError, MismatchError, run_threads
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.optim.samples import contents, feedback, gradients, mean_of, parameters, patchy, step

STEPS = 12
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "OnebitAdam": lambda params, **o: OnebitAdam(params, lr=1e-2, freeze_step=4, variance_refresh=3, **o),
    "OnebitAdam, auto": lambda params, **o: OnebitAdam(params, lr=1e-2, betas=(0.5, 0.5), freeze_step="auto", **o),
    "ZeroOneAdam": lambda params, **o: ZeroOneAdam(params, lr=1e-2, var_freeze_step=7, var_update_scaler=2, **o),
    "OnebitLamb": lambda params, **o: OnebitLamb(params, lr=1e-2, freeze_step=4, **o),
}


def averaged_step(optimizer: Any, backend: Backend, number: int, given: Callable[..., Any]) -> bool:
    """A step whose gradients are averaged before it if the optimizer wants that; returns whether they were."""
    params = optimizer.param_groups[0]["params"]
    wanted = optimizer.averages_next_step()
    everybody = [given(params, rank, number) for rank in range(backend.size)]
    optimizer.gradients_averaged = wanted
    step(optimizer, mean_of(everybody) if wanted else everybody[backend.rank])
    assert not optimizer.gradients_averaged
    return bool(wanted)


@pytest.mark.parametrize("given", [gradients, patchy])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_averaged_gradients_have_the_bits_of_steps_that_average(
    name: str, world_size: int, given: Callable[..., Any]
) -> None:
    def train(backend: Backend) -> int:
        optimizer, plain = (OPTIMIZERS[name](parameters(), backend=backend) for _ in range(2))
        wanted = []
        for number in range(STEPS):
            wanted.append(averaged_step(optimizer, backend, number, given))
            step(plain, given(plain.param_groups[0]["params"], backend.rank, number))
            assert contents(optimizer) == contents(plain)
            assert feedback(optimizer) == feedback(plain)
            assert optimizer.param_groups[0]["step"] == plain.param_groups[0]["step"] == number + 1
        return sum(wanted)

    dense = run_threads(world_size, train)
    assert len(set(dense)) == 1
    assert 0 < dense[0] < STEPS or name == "OnebitAdam, auto"  # which may not come to its freeze so soon


def test_only_numbers_of_who_has_a_gradient_travel_in_an_averaged_step() -> None:
    def train(backend: Backend) -> list[int]:
        optimizer = OPTIMIZERS["OnebitAdam"](parameters(), backend=backend)
        sent = []
        for number in range(4):
            before = backend.traffic.wire_bytes
            averaged_step(optimizer, backend, number, gradients)
            sent.append(backend.traffic.wire_bytes - before)
        return sent[1:]  # in the first step ranks compare what they hold

    # 7 flags, filled up to 8, 4 bytes each, of which half leaves this rank and half comes back.
    assert run_threads(2, train) == [[32] * 3] * 2


def test_a_number_that_only_one_ranks_mean_has_makes_all_skip() -> None:
    def train(backend: Backend) -> None:
        optimizer = OPTIMIZERS["OnebitAdam"](parameters(), backend=backend)
        params = optimizer.param_groups[0]["params"]
        averaged_step(optimizer, backend, 0, gradients)
        before = contents(optimizer)
        given = mean_of([gradients(params, rank, 1) for rank in range(backend.size)])
        assert given[0] is not None
        if backend.rank == 1:
            given[0].view(-1)[3] = math.nan
        optimizer.gradients_averaged = True
        step(optimizer, given)
        assert contents(optimizer) == before
        assert optimizer.skipped_steps == 1
        averaged_step(optimizer, backend, 2, gradients)
        assert contents(optimizer) != before

    run_threads(3, train)


def test_a_mean_that_one_rank_has_lost_is_an_error_on_all() -> None:
    def train(backend: Backend) -> None:
        optimizer = OPTIMIZERS["OnebitAdam"](parameters(), backend=backend)
        params = optimizer.param_groups[0]["params"]
        before = contents(optimizer)
        given = mean_of([gradients(params, rank, 0) for rank in range(backend.size)])
        if backend.rank == 2:
            given[3] = None
        optimizer.gradients_averaged = True
        with pytest.raises(MismatchError, match="parameter 3 has an averaged gradient on 2 of 3 ranks"):
            step(optimizer, given)
        assert contents(optimizer) == before

    run_threads(3, train)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a group in warm-up"])
def test_averaged_gradients_are_refused_where_a_group_compresses(beside: bool) -> None:
    params = parameters()
    optimizer = OnebitAdam(params, freeze_step=1, backend="single")
    step(optimizer, gradients(params, 0, 0))
    if beside:
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "freeze_step": 9})
    assert not optimizer.averages_next_step()
    optimizer.gradients_averaged = True
    before = contents(optimizer)
    with pytest.raises(InputError, match="average only if averages_next_step"):
        optimizer.step()
    assert contents(optimizer) == before
