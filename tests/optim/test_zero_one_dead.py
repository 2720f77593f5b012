"""Entries and parameters without gradients: ZeroOneAdam leaves them alone until a variance step finds one for them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import ZeroOneAdam
from tests.comm.samples import bits
from tests.optim.samples import Gradients, contents, gradients, parameters, step, through_a_file, values
from tests.optim.zero_one_runs import KINDS, SOON, run, saved


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("late", [False, True], ids=["zero for good", "with gradients after the freeze"])
def test_dead_entries_stay_bit_equal_to_their_start_and_hold_nothing(world_size: int, late: bool) -> None:
    dead = values(1, shape=(3000,)) < 0

    def train(backend: Backend) -> None:
        p = Parameter(values(0, shape=(3000,)))
        start = bits(p[dead])
        optimizer = ZeroOneAdam([p], weight_decay=0.0, backend=backend, **{**SOON, "lr": 0.1})
        for number in range(60):
            g = values(number, backend.rank, shape=(3000,))
            if number < 8 or not late:
                g[dead] = 0.0
            elif number == 21 and backend.rank == 0:
                g[dead] = math.inf  # in a local step
            step(optimizer, [g])
            assert bits(p[dead]) == start
            for key in ("exp_avg", "exp_avg_sq", "interval_mean"):
                held = saved(optimizer)[0].get(key)
                assert held is None or not held[dead].any()
        assert optimizer.left_out_steps == 0
        if world_size > 1:
            assert not optimizer.state_dict()["onebit"]["residuals"][0]["worker"][dead].any()
        assert bool((p[~dead] != values(0, shape=(3000,))[~dead]).all())

    run_threads(world_size, train)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_entry_that_was_dead_comes_alive_at_the_next_variance_step(world_size: int) -> None:
    def train(backend: Backend) -> list[Any]:
        p = Parameter(torch.ones(100))
        optimizer = ZeroOneAdam([p], weight_decay=0.0, backend=backend, **SOON)
        seen = []
        for number in range(len(KINDS)):
            g = torch.ones(100)
            g[:50] = float(number >= 3)  # step 4 is no variance step, step 5 is one
            step(optimizer, [g])
            assert bool((p[:50] == 1).all()) == (number < 4)
            seen.append(bits(p))
        assert bool((p[:50] < 1).all())
        return seen

    run_threads(world_size, train)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_parameter_is_updated_from_the_first_variance_step_that_finds_a_gradient_for_it(world_size: int) -> None:
    def late(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(params, rank, number)
        if number < 5 or rank > 0:
            made[3] = None
        return made

    first, *others = run_threads(world_size, run, len(KINDS), contents, late)
    untouched = (bits(parameters()[3]), {})
    for seen in others:
        assert all(seen[n] == first[n] for n, kind in enumerate(KINDS) if kind != "local")
    assert [state[3] == untouched for state in first] == [number < 6 for number in range(len(KINDS))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_parameter_without_gradients_in_variance_steps_is_left_alone_and_told_once(
    world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    def late(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(params, rank, number)
        if number < 8 or rank > 0:
            made[3] = None
        return made

    with caplog.at_level(logging.WARNING, "onebit"):
        seen = run_threads(world_size, run, len(KINDS), contents, late)
    assert seen[0][-1][3] == (bits(parameters()[3]), {})
    (record,) = caplog.records
    assert "rank 0: parameters [3] have their first gradient after the freeze" in record.getMessage()


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_without_any_gradient_and_groups_without_parameters_change_nothing(world_size: int) -> None:
    def train(backend: Backend) -> None:
        params, empty = parameters(), [Parameter(torch.empty(0))]
        optimizer = ZeroOneAdam([{"params": params}, {"params": empty}, {"params": []}], backend=backend, **SOON)
        for _ in range(len(KINDS)):
            step(optimizer, [None] * len(params) + [torch.empty(0)])
            optimizer.synchronize()
        assert bits(params) == bits(parameters())
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        step(optimizer, [None] * len(params) + [torch.empty(0)])

    run_threads(world_size, train)
