"""A number that is not finite: ZeroOneAdam's ranks skip a step at which they meet; one leaves its local step out."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import ZeroOneAdam
from tests.comm.samples import arrays, bits
from tests.optim import zero_one_oracle as oracle
from tests.optim.samples import contents, gradients, parameters, step, through_a_file
from tests.optim.zero_one_runs import KINDS, SOON, saved, spoiled


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_rank_leaves_its_bad_local_steps_out_and_the_schedule_goes_on(bad: float) -> None:
    local = [15, 17, 19, 20]  # the first and the last of an interval, and two that follow each other
    assert {KINDS[number] for number in local} == {"local"}

    def train(backend: Backend) -> tuple[list[list[Any]], int, int]:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        seen = []
        for number in range(len(KINDS)):
            momenta = [bits(state["exp_avg"]) for state in saved(optimizer)] if number else []
            step(optimizer, spoiled(params, backend.rank, number, bad, local))
            if backend.rank == 1 and number in local:
                assert [bits(state["exp_avg"]) for state in saved(optimizer)] == momenta
            seen.append(arrays(params))
        assert optimizer.param_groups[0]["step"] == len(KINDS)
        return seen, optimizer.left_out_steps, optimizer.skipped_steps

    per_rank = run_threads(3, train)
    assert [left_out for _, left_out, _ in per_rank] == [0, len(local), 0]
    assert [skipped for _, _, skipped in per_rank] == [0, 0, 0]
    start = parameters()
    expected = oracle.ZeroOneAdam([p.detach().double().numpy() for p in start], 3, oracle.Options(**SOON))
    for number in range(len(KINDS)):
        given: list[Any] = [[g.double().numpy() for g in gradients(start, rank, number)] for rank in range(3)]
        if number in local:
            given[1] = None
        expected.step(given)
        for rank, (seen, _, _) in enumerate(per_rank):
            for i, x in enumerate(seen[number]):
                # 23 steps of at most a few lr, each rounded a few times.
                assert np.abs(x - expected.x[rank][i].reshape(-1)).max(initial=0) <= 2e-6, f"step {number + 1}"


@pytest.mark.parametrize("number", [number for number, kind in enumerate(KINDS) if kind != "local"][::2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bad_step_at_which_ranks_meet_is_skipped_by_all_and_made_next_time(world_size: int, number: int) -> None:
    def train(backend: Backend) -> list[Any]:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        for i in range(number):
            step(optimizer, gradients(params, backend.rank, i))
        before = contents(optimizer)
        given = gradients(params, backend.rank, 99)
        if backend.rank == world_size - 1:
            given[3][5] = math.nan
        step(optimizer, given)
        assert contents(optimizer) == before
        assert (optimizer.skipped_steps, optimizer.left_out_steps) == (1, 0)
        assert (optimizer.phase(), optimizer.param_groups[0]["step"]) == (KINDS[number], number)
        step(optimizer, gradients(params, backend.rank, number))
        return contents(optimizer)

    first, *others = run_threads(world_size, train)
    assert all(seen == first for seen in others)


def test_a_bad_step_of_one_rank_alone_is_skipped_whatever_it_would_have_been_on_more() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        for number in range(len(KINDS)):
            before = contents(optimizer)
            given = gradients(params, 0, number)
            given[0][0, 0] = math.inf
            step(optimizer, given)
            assert contents(optimizer) == before
            step(optimizer, gradients(params, 0, number))
        assert (optimizer.skipped_steps, optimizer.left_out_steps) == (len(KINDS), 0)

    run_threads(1, train)


def test_a_gradient_scaler_hears_of_a_local_step_that_was_left_out() -> None:
    def train(backend: Backend) -> list[float]:
        p = Parameter(torch.zeros(8))
        optimizer = ZeroOneAdam([p], backend=backend, **{**SOON, "var_freeze_step": 1, "local_step_scaler": 1})
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        scales = []
        for number in range(3):
            assert optimizer.phase() == ["variance", "sync", "local"][number]
            p.grad = None
            scaler.scale((p * (math.inf if number == 2 and backend.rank else 1.0)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    assert run_threads(2, train) == [[4.0, 4.0, 4.0], [4.0, 4.0, 2.0]]


def test_what_was_left_out_is_told_and_saved(caplog: pytest.LogCaptureFixture) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        for number in range(17):
            step(optimizer, spoiled(params, backend.rank, number, math.nan, [15]))
        other = ZeroOneAdam(parameters(), backend=backend, **SOON)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        assert other.left_out_steps == optimizer.left_out_steps == backend.rank

    with caplog.at_level(logging.WARNING, "onebit"):
        run_threads(2, train)
    (record,) = caplog.records
    assert "rank 1: it leaves its own contribution to a local step out" in record.getMessage()
