"""variance_refresh=k: every k-th step after the freeze brings the variance up to date, and what was dead may live."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from tests.comm.oracle import UNIT
from tests.comm.samples import arrays, bits, server_parts, worker_parts
from tests.optim import oracle
from tests.optim.samples import contents, feedback, gradients, parameters, patchy, run, step, values

OPTIONS: dict[str, Any] = {"freeze_step": 5, "variance_refresh": 6, "lr": 1e-2, "betas": (0.9, 0.99)}
SLEEPING = values(1, shape=(3000,)) < 0
CODECS = [SignCodec(block_size=64), SignCodec(block_size=64, kernels="reference")]


def pair() -> list[Parameter]:
    return [Parameter(values(0, shape=(3000,))), Parameter(values(2, shape=(30, 7)))]


@pytest.mark.parametrize("codec", CODECS, ids=["fused", "by torch's operations"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("coupled", [False, True], ids=["adamw", "adam"])
def test_200_steps_with_refreshes_follow_the_float64_oracle(world_size: int, coupled: bool, codec: SignCodec) -> None:
    # Gradients do not depend on parameters and no sign is decided by rounding, see test_onebit_adam_algorithm.py.
    steps, every = 200, 25
    sleeping = SLEEPING[:200]
    options = {**OPTIONS, "freeze_step": 30, "variance_refresh": every, "adamw_mode": not coupled, "maximize": coupled}

    def few() -> list[Parameter]:
        return [Parameter(values(0, shape=(200,))), Parameter(values(2, shape=(5, 7)))]

    def awaking(params: Sequence[Tensor], rank: int, number: int) -> list[Tensor]:
        made = [g for g in gradients(params, rank, number) if g is not None]
        if number < 60 and not coupled:  # weight decay that is coupled wakes everything
            made[0][sleeping] = 0.0
        return made

    def train(backend: Backend) -> tuple[list[list[Any]], Any]:
        params = few()
        optimizer = OnebitAdam(params, backend=backend, codec=codec, **options)
        for number in range(steps):
            due = number >= 30 and (number + 1 - 30) % every == 0
            assert (optimizer.phase() == "refresh") == due
            step(optimizer, awaking(params, backend.rank, number))
        saved = optimizer.state_dict()
        moments = [arrays([s[key] for s in saved["state"].values()]) for key in ("exp_avg", "exp_avg_sq")]
        ages = [float(s["variance_step"]) for s in saved["state"].values()]
        assert ages == [30 + every * ((steps - 30) // every)] * 2
        return [arrays(params), *moments], saved["onebit"]["residuals"][0]

    start = few()
    expected = oracle.OnebitAdam(
        [p.detach().double().numpy() for p in start], world_size, oracle.Options(**options), codec.block_size
    )
    least = [np.full(x.shape, math.inf) for x in expected.x]
    largest = 0.0
    for number in range(steps):
        given = [[g.double().numpy() for g in awaking(start, rank, number)] for rank in range(world_size)]
        expected.step(given)
        largest = max(largest, *(float(np.abs(part).max()) for part in (*expected.m, *expected.x)))
        largest = max(largest, *(float(np.abs(g).max()) for of_rank in given for g in of_rank))
        least = [np.minimum(low, np.where(v > 0, v, math.inf)) for low, v in zip(least, expected.v, strict=True)]
    off = oracle.slack(steps, largest)
    closest = "" if expected.mean is None else f"the closest c was {expected.mean.closest} of its scale from 0"
    per_rank = run_threads(world_size, train)
    for rank, ((x, m, v), residual) in enumerate(per_rank):
        for i in range(2):
            np.testing.assert_allclose(m[i], expected.m[i].reshape(-1), rtol=0, atol=off, err_msg=closest)
            if coupled:  # weight decay brings the parameter's own roundings in, 0.01 of them
                np.testing.assert_allclose(v[i], expected.v[i].reshape(-1), rtol=1e-4)
            else:
                np.testing.assert_allclose(v[i], expected.v[i].reshape(-1), rtol=4 * steps * UNIT)
            moved = 1.5 * OPTIONS["lr"] * steps * off / np.sqrt(least[i].reshape(-1)) + 16 * math.sqrt(steps) * UNIT * 3
            assert np.all(np.abs(x[i] - expected.x[i].reshape(-1)) <= moved), (rank, i, closest)
        if world_size > 1:
            assert expected.mean is not None
            for i, held in enumerate(worker_parts(residual)):
                np.testing.assert_allclose(held, expected.mean.worker[rank][i], rtol=0, atol=off)
    if world_size > 1:
        assert expected.mean is not None
        for i, held in enumerate(server_parts([residual for _, residual in per_rank])):
            np.testing.assert_allclose(held, expected.mean.server[i], rtol=0, atol=off)


@pytest.mark.parametrize("codec", CODECS, ids=["fused", "by torch's operations"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_was_dead_at_the_freeze_lives_after_the_next_refresh_and_not_before(
    world_size: int, codec: SignCodec
) -> None:
    def train(backend: Backend) -> list[Any]:
        params = pair()
        start = params[0].detach().clone()
        optimizer = OnebitAdam(params, backend=backend, weight_decay=0.0, codec=codec, **OPTIONS)
        for number in range(24):
            given = gradients(params, backend.rank, number)
            if number < 8:
                assert given[0] is not None
                given[0][SLEEPING] = 0.0
            step(optimizer, given)
            still = params[0].detach() == start
            if number < 10:  # steps 6 to 10 are compressed, step 11 is the refresh
                assert bool(still[SLEEPING].all())
            else:
                assert not bool(still[SLEEPING].any())
            assert not bool(still[~SLEEPING].any())
            if number == 10 and world_size > 1:  # error feedback of the newly living starts at 0
                worker = worker_parts(optimizer.state_dict()["onebit"]["residuals"][0])
                assert not worker[0][SLEEPING.numpy()].any()
        if world_size > 1:
            worker = worker_parts(optimizer.state_dict()["onebit"]["residuals"][0])
            assert worker[0][SLEEPING.numpy()].any()
        return contents(optimizer)

    per_rank = run_threads(world_size, train)
    assert all(seen == per_rank[0] for seen in per_rank)


def test_entries_that_come_alive_take_no_larger_steps_than_in_adam() -> None:
    # An entry of which the variance knows one gradient has v = (1 - β₂ᵏ)·g², and moves by at most lr/√(1 - β₂ᵏ) a step.
    # With v <- β₂·v + (1 - β₂)·g² it would move 10·lr a step here, until the next refresh.
    lr, beta2, every = 1e-3, 0.99, 50

    def train(backend: Backend) -> float:
        p = Parameter(torch.zeros(64))
        optimizer = OnebitAdam(
            [p], lr=lr, betas=(0.9, beta2), weight_decay=0.0, freeze_step=5, variance_refresh=every, backend=backend
        )
        largest = 0.0
        for number in range(200):
            before = p.detach().clone()
            step(optimizer, [torch.ones(64) * (torch.arange(64) < 32) if number < 20 else torch.ones(64)])
            largest = max(largest, float((p.detach() - before)[32:].abs().max()))
        return largest

    for largest in run_threads(2, train):
        assert 0 < largest <= 1.01 * lr / math.sqrt(1 - beta2**every)


def test_with_every_step_a_refresh_it_is_adamw_for_ever() -> None:
    def train(backend: Backend, **options: Any) -> list[list[Any]]:
        params = pair()
        optimizer = OnebitAdam(params, lr=1e-2, backend=backend, **options)
        for number in range(60):
            step(optimizer, gradients(params, backend.rank, number))
        return [arrays(params), arrays([optimizer.state[p]["exp_avg_sq"] for p in params])]

    for seen, expected in zip(
        run_threads(2, lambda b: train(b, freeze_step=3, variance_refresh=1)),
        run_threads(2, lambda b: train(b, freeze_step=100)),
        strict=True,
    ):
        for one, other in zip(seen[0] + seen[1], expected[0] + expected[1], strict=True):
            # The same formula in another order: some ten roundings a step of numbers up to 4.
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=60 * 10 * UNIT * 4 * 0.1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_bad_number_in_a_refresh_skips_it_on_all_ranks_and_the_next_step_is_the_refresh(world_size: int) -> None:
    def train(backend: Backend, bad: bool) -> list[Any]:
        params = pair()
        optimizer = OnebitAdam(params, backend=backend, **OPTIONS)
        for number in range(14):
            if number == 10 and bad:
                before = (contents(optimizer), feedback(optimizer)["residuals"])
                given = gradients(params, backend.rank, 99)
                if backend.rank == world_size - 1:
                    assert given[1] is not None
                    given[1][3, 3] = math.nan
                assert optimizer.phase() == "refresh"
                step(optimizer, given)
                assert optimizer.phase() == "refresh"
                assert optimizer.skipped_steps == 1
                assert (contents(optimizer), feedback(optimizer)["residuals"]) == before
            step(optimizer, gradients(params, backend.rank, number))
        return contents(optimizer)

    assert run_threads(world_size, train, True) == run_threads(world_size, train, False)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_stay_bit_equal_with_gradients_missing_here_and_there(world_size: int) -> None:
    first, *others = run_threads(world_size, run, 30, contents, patchy, parameters, OPTIONS)
    assert all(seen == first for seen in others)
    assert len({repr(state) for state in first}) == 30


def test_a_parameter_without_a_gradient_at_a_refresh_keeps_its_variance() -> None:
    def train(backend: Backend) -> None:
        params = pair()
        optimizer = OnebitAdam(params, backend=backend, **OPTIONS)
        for number in range(11):
            before = bits([optimizer.state[p].get("exp_avg_sq", torch.zeros(0)) for p in params])
            given = gradients(params, backend.rank, number)
            step(optimizer, [given[0], None if number == 10 else given[1]])
        after = bits([optimizer.state[p]["exp_avg_sq"] for p in params])
        assert after[0] != before[0]
        assert after[1] == before[1]
        assert [float(optimizer.state[p]["variance_step"]) for p in params] == [11.0, 5.0]

    run_threads(2, train)


def test_collectives_of_a_refresh_are_counted_and_its_bytes_are_dense() -> None:
    def train(backend: Backend) -> list[tuple[int, int]]:
        params = [Parameter(torch.zeros(4096))]
        optimizer = OnebitAdam(params, freeze_step=1, variance_refresh=3, backend=backend)
        seen = []
        for number in range(8):
            before = (optimizer.stats.collectives, optimizer.stats.wire_bytes)
            step(optimizer, [values(number, backend.rank, shape=(4096,))])
            seen.append((optimizer.stats.collectives - before[0], optimizer.stats.wire_bytes - before[1]))
        return seen

    dense, small = (2, 4 * (4096 + 2)), (2, 2 * (4096 // 2 // 8 + 16))
    assert run_threads(2, train) == [[dense, small, small, dense, small, small, dense, small]] * 2
