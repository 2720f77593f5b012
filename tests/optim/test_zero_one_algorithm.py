"""ZeroOneAdam is the published algorithm by a float64 oracle, and torch's Adam or 1-bit Adam where it should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam, ZeroOneAdam
from tests.comm.oracle import UNIT
from tests.comm.samples import arrays, server_parts, state_bits, worker_parts
from tests.optim import zero_one_oracle as oracle
from tests.optim.oracle import slack
from tests.optim.samples import gradients, mean_of, parameters, step
from tests.optim.zero_one_runs import SOON, mostly, run, saved

# 16 variance steps up to step 49; gaps of 1 to step 90, of 2 to 120, of 4 to 152, then of 8.
STEPS = 210
LONG: dict[str, Any] = {
    "lr": 1e-2,
    "var_freeze_step": 60,
    "var_update_scaler": 4,
    "local_step_scaler": 30,
    "local_step_clipper": 8,
}
VARIANTS: dict[str, tuple[dict[str, Any], SignCodec]] = {
    "defaults": ({}, SignCodec()),
    "published codec": ({"weight_decay": 0.0}, SignCodec(block_size=None, scale="rms")),
    "coupled decay, maximize": ({"weight_decay": 0.1, "adamw_mode": False, "maximize": True}, SignCodec(block_size=64)),
    "no bias correction": (
        {"lr": 1e-3, "bias_correction": False, "weight_decay": 0.5, "betas": (0.8, 0.99), "eps": 1e-3},
        SignCodec(block_size=64, kernels="reference"),  # so that no kernels are fused
    ),
    "missing gradients": ({}, SignCodec(block_size=64)),
}
CASES = [("defaults", n) for n in (1, 2, 3, 4)]
CASES += [("published codec", 3), ("coupled decay, maximize", 1), ("coupled decay, maximize", 2)]
CASES += [("no bias correction", 2), ("missing gradients", 3)]


def rate(number: int) -> float:
    """What the learning rate is multiplied by; 0 in a whole interval and at the start of others."""
    return 0.0 if number in (2, 70, *range(160, 169), 177) else 1.0 + 0.5 * math.sin(number)


@pytest.mark.parametrize(("variant", "world_size"), CASES)
def test_210_steps_through_all_phases_follow_the_float64_oracle(variant: str, world_size: int) -> None:
    # The gradients do not depend on the parameters, so a difference in rounding is not fed back and does not explode.
    changed, codec = VARIANTS[variant]
    options = {**LONG, **changed}
    given = mostly if variant == "missing gradients" else gradients
    start = parameters()

    def train(backend: Backend) -> list[tuple[list[list[Any]], Any]]:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, codec=codec, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        seen = []
        for number in range(STEPS):
            step(optimizer, given(params, backend.rank, number))
            scheduler.step()
            states = saved(optimizer)
            moments = [arrays([state[key] for state in states]) for key in ("exp_avg", "exp_avg_sq")]
            residual = optimizer.state_dict()["onebit"]["residuals"][0] if number % 30 == 29 else None
            seen.append(([arrays(params), *moments], residual))
        return seen

    per_rank = run_threads(world_size, train)
    expected = oracle.ZeroOneAdam(
        [p.detach().double().numpy() for p in start],
        world_size,
        oracle.Options(**options),
        codec.block_size,
        codec.scale,
    )
    largest = [0.0] * len(start)
    for number in range(STEPS):
        listed = [given(start, rank, number) for rank in range(world_size)]
        doubles = [[None if g is None else g.double().numpy() for g in of_rank] for of_rank in listed]
        expected.step(doubles, options["lr"] * rate(number))
        for i in range(len(start)):
            parts = [expected.m[r][i] for r in range(world_size)] + [g[i] for g in doubles if g[i] is not None]
            if expected.mean is not None:
                parts += [expected.mean.server[i], *(worker[i] for worker in expected.mean.worker)]
            largest[i] = max(largest[i], *(float(np.abs(part).max(initial=0)) for part in parts))
        for rank, (seen, residual) in enumerate(steps[number] for steps in per_rank):
            where = f"step {number + 1}, a {expected.kinds[-1]} step, rank {rank}"
            check(expected, seen, rank, number + 1, largest, where)
            if residual is not None and expected.mean is not None and world_size > 1:
                for i, held in enumerate(worker_parts(residual)):
                    off = np.abs(held - expected.mean.worker[rank][i]).max(initial=0)
                    assert off <= slack(number + 1, largest[i]), where
        if number % 30 == 29 and expected.mean is not None and world_size > 1:
            for i, held in enumerate(server_parts([steps[number][1] for steps in per_rank])):
                assert np.abs(held - expected.mean.server[i]).max(initial=0) <= slack(number + 1, largest[i])
    assert {kind: expected.kinds.count(kind) for kind in ("variance", "sync", "local")} == {
        "variance": 16,
        "sync": 104,
        "local": 90,
    }


def check(
    expected: oracle.ZeroOneAdam, seen: list[list[Any]], rank: int, steps: int, largest: Sequence[float], where: str
) -> None:
    closest = math.inf if expected.mean is None else expected.mean.closest
    x, m, v = seen
    options = expected.options
    for i in range(len(x)):
        told = f"parameter {i}, {where}; the closest c was {closest} of its scale from 0"
        off = slack(steps, largest[i])
        assert np.abs(m[i] - expected.m[rank][i].reshape(-1)).max(initial=0) <= off, f"momentum, {told}"
        # Two products and a sum a step, all positive, so relative; and 2·(1-β₂)·|g| times what the mean gradient is off
        # by, n + 3 roundings of `largest`, which adds up to less than twice that times √v.
        root = np.sqrt(expected.v[i].reshape(-1))
        slack_v = 8 * steps * UNIT * root**2 + 2 * (len(expected.x) + 3) * UNIT * largest[i] * root
        assert np.all(np.abs(v[i] - expected.v[i].reshape(-1)) <= slack_v), f"variance, {told}"
        # A step adds lr·m/√v, with m off by `off` at most and less in earlier steps, and rounds x itself a few times.
        moved = 1.5 * options.lr * steps * off / (root + options.eps)
        size = 4 * math.sqrt(steps) * 4 * UNIT * np.abs(x[i]).max(initial=1)
        assert np.all(np.abs(x[i] - expected.x[rank][i].reshape(-1)) <= moved + size), f"parameters, {told}"


@pytest.mark.parametrize("adamw_mode", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_torchs_own_while_every_step_updates_the_variance(world_size: int, adamw_mode: bool) -> None:
    def train(backend: Backend) -> None:
        params, own = parameters(), parameters()
        optimizer = ZeroOneAdam(
            params, 1e-2, var_freeze_step=100, var_update_scaler=100, adamw_mode=adamw_mode, backend=backend
        )
        kind = torch.optim.AdamW if adamw_mode else torch.optim.Adam
        torchs = kind(own, lr=1e-2, weight_decay=1e-2)
        for number in range(100):
            step(optimizer, gradients(params, backend.rank, number))
            step(torchs, mean_of([gradients(own, rank, number) for rank in range(world_size)]))
        for p, q in zip(params, own, strict=True):
            # Both round each operation once; where torch fuses two of them, a step differs in the last bit.
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)

    run_threads(world_size, train)


@pytest.mark.parametrize("world_size", [1, 3])
def test_without_longer_gaps_it_is_1_bit_adam(world_size: int) -> None:
    def train(backend: Backend) -> None:
        params, others = parameters(), parameters()
        options: dict[str, Any] = {"lr": 1e-2, "backend": backend}
        one = ZeroOneAdam(params, var_freeze_step=6, var_update_scaler=6, local_step_clipper=1, **options)
        other = OnebitAdam(others, freeze_step=6, **options)
        for number in range(20):
            given = gradients(params, backend.rank, number)
            step(one, given)
            step(other, given)
            states = [optimizer.state_dict()["state"] for optimizer in (one, other)]
            for i, (p, q) in enumerate(zip(params, others, strict=True)):
                # The same few operations a step, whose products and sums may be rounded together or apart: 20 steps of
                # roundings of gradients of up to 50, and of parameters of up to 4.
                torch.testing.assert_close(
                    states[0][i]["exp_avg"], states[1][i]["exp_avg"], rtol=0, atol=20 * 50 * UNIT
                )
                torch.testing.assert_close(p, q, rtol=0, atol=20 * 4 * UNIT)

    run_threads(world_size, train)


def test_weight_decay_stays_out_of_momentum_and_of_what_is_sent() -> None:
    def moments(optimizer: ZeroOneAdam) -> Any:
        states = saved(optimizer)
        kept = ("exp_avg", "exp_avg_sq", "interval_mean")
        feedback = optimizer.state_dict()["onebit"]["residuals"]
        return state_bits([[state.get(key) for key in kept] for state in states]), state_bits(feedback)

    without = run_threads(2, run, 24, moments, gradients, parameters, {**SOON, "weight_decay": 0.0})
    assert run_threads(2, run, 24, moments, gradients, parameters, {**SOON, "weight_decay": 0.7}) == without


@pytest.mark.parametrize("world_size", [1, 2])
def test_weight_decay_is_that_of_adamw_in_every_phase(world_size: int) -> None:
    def train(backend: Backend) -> None:
        p = Parameter(torch.ones(50))
        optimizer = ZeroOneAdam([p], backend=backend, weight_decay=0.5, **{**SOON, "lr": 0.1})
        for number in range(23):
            step(optimizer, [torch.zeros(50)])
            # A factor and a product a step, each rounded.
            expected = torch.full((50,), 0.95 ** (number + 1))
            torch.testing.assert_close(p.detach(), expected, rtol=2 * 23 * UNIT, atol=0.0)

    run_threads(world_size, train)
