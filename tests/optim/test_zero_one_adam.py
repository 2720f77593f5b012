"""ZeroOneAdam: right by a float64 oracle, silent between synchronisations, the same on all ranks after each."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, InputError, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam, ZeroOneAdam
from onebit.optim.policies import SyncPolicy, VariancePolicy
from tests.comm.launcher import needs_mpi, run_ranks
from tests.comm.oracle import UNIT, wire_bytes
from tests.comm.samples import arrays, bits, server_parts, state_bits, worker_parts
from tests.optim import zero_one_oracle as oracle
from tests.optim.samples import (
    SHAPES,
    Gradients,
    all_params,
    checksum,
    contents,
    gradients,
    mean_of,
    parameters,
    patchy,
    step,
    through_a_file,
    values,
)

# Variance steps 1, 2, 3, 5, 7; gaps of 1 up to step 11, then of 2, of 4 from 15 on.
SOON: dict[str, Any] = {
    "lr": 1e-2,
    "var_freeze_step": 8,
    "var_update_scaler": 2,
    "local_step_scaler": 3,
    "local_step_clipper": 4,
}
KINDS = ["variance", "variance", "variance", "sync", "variance", "sync", "variance", "sync", "sync", "sync", "sync"]
KINDS += ["local", "sync", "local", "sync", "local", "local", "local", "sync", "local", "local", "local", "sync"]


def run(
    backend: Backend,
    steps: int,
    observe: Callable[[ZeroOneAdam], Any],
    given: Callable[[Sequence[Tensor], int, int], Gradients] = gradients,
    start: Callable[[], list[Parameter]] = parameters,
    options: Mapping[str, Any] = SOON,
) -> list[Any]:
    """Make steps on one rank; returns what was observed after each."""
    params = start()
    optimizer = ZeroOneAdam(params, backend=backend, **options)
    seen = []
    for number in range(steps):
        step(optimizer, given(params, backend.rank, number))
        seen.append(observe(optimizer))
    return seen


def saved(optimizer: ZeroOneAdam) -> list[dict[str, Any]]:
    """The state of every parameter as it would be saved."""
    states = optimizer.state_dict()["state"]
    return [states.get(i, {}) for i in range(len(all_params(optimizer)))]


def mixed(indices: Sequence[int] = range(len(SHAPES))) -> list[Parameter]:
    """Parameters of all shapes and dtypes, fp32, bf16 and fp16."""
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float16)
    return [p for i in indices for p in [Parameter(parameters()[i].detach().to(dtypes[i % 4]))]]


def test_the_schedule_of_these_tests_is_what_it_says() -> None:
    def train(backend: Backend) -> list[str]:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        seen = []
        for number in range(len(KINDS)):
            seen.append(optimizer.phase())
            step(optimizer, gradients(params, backend.rank, number))
        return seen

    assert run_threads(1, train) == [KINDS]


# --- the algorithm

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


def mostly(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
    """Gradients of which some are None; in the first step none is."""
    return patchy(params, rank, number) if number else gradients(params, rank, number)


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


def slack(steps: int, largest: float) -> float:
    """How far momentum and feedback may be off; see tests/optim/test_onebit_adam.py for why it is a random walk."""
    return math.sqrt(40 * steps) * UNIT * largest


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


# --- communication


@pytest.mark.parametrize("many", [1, 40])
@pytest.mark.parametrize("world_size", [2, 3])
def test_local_steps_communicate_nothing_and_others_what_the_formula_says(world_size: int, many: int) -> None:
    numels = [1500] * many

    def train(backend: Backend) -> list[tuple[str, int, int]]:
        params = [Parameter(torch.zeros(n)) for n in numels]
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        seen = []
        for number in range(len(KINDS)):
            kind = optimizer.phase()
            backend.traffic.reset()
            given = [values(i, number, backend.rank, shape=(1500,)) for i in range(many)]
            if number > 12:  # neither does it matter who has a gradient
                given[backend.rank % many] = None  # type: ignore[call-overload]
            step(optimizer, given)
            seen.append((kind, backend.traffic.collectives, backend.traffic.wire_bytes))
        return seen

    for seen in run_threads(world_size, train):
        assert [kind for kind, _, _ in seen] == KINDS
        assert {(c, b) for kind, c, b in seen if kind == "local"} == {(0, 0)}
        settled = [(c, b) for kind, c, b in seen[8:] if kind == "sync"]
        assert set(settled) == {(2, wire_bytes(world_size, numels))}


@pytest.mark.parametrize("world_size", [2])
def test_the_published_schedule_sends_26_times_less_than_fp32_adamw_in_half_as_many_rounds(world_size: int) -> None:
    # BERT-Large's 152,000 steps scaled down to 2,280, with as many variance steps per doubling as leaves about as many.
    steps, numel = 2280, 16 * 1024
    shape = {
        "var_freeze_step": 12_500 * steps // 152_000,
        "local_step_scaler": 32_678 * steps // 152_000,
        "var_update_scaler": 4,
    }

    def train(backend: Backend) -> tuple[int, int, int]:
        p = Parameter(torch.ones(numel))
        optimizer = ZeroOneAdam([p], backend=backend, weight_decay=0.0, **shape)
        p.grad = values(backend.rank, shape=(numel,))
        rounds = 0
        for _ in range(steps):
            before = backend.traffic.collectives
            optimizer.step()
            rounds += backend.traffic.collectives > before
        return backend.traffic.wire_bytes, rounds, optimizer.stats.dense_bytes

    def adamw(backend: Backend) -> int:
        p = Parameter(torch.ones(numel))
        optimizer = OnebitAdam([p], freeze_step=99, backend=backend)
        p.grad = torch.ones(numel)
        optimizer.step()
        backend.traffic.reset()
        optimizer.step()
        return backend.traffic.wire_bytes

    per_step = run_threads(world_size, adamw)[0]  # 4 bytes per element on two ranks, and one flag per parameter
    assert per_step == 4 * (numel + 2)
    for sent, rounds, _ in run_threads(world_size, train):
        assert rounds == SyncPolicy(**{k: v for k, v in shape.items() if k != "var_update_scaler"}).count(steps)
        assert rounds <= 0.5 * steps
        assert steps * per_step / sent >= 26


def test_one_rank_communicates_nothing_and_neither_codec_nor_gaps_matter_to_it() -> None:
    def train(backend: Backend) -> None:
        other = {**SOON, "local_step_clipper": 1, "codec": SignCodec(block_size=64), "bucket_mb": 1e-3}
        usual = run(backend, 23, contents, gradients, mixed)
        assert run(backend, 23, contents, gradients, mixed, other) == usual
        assert backend.traffic.collectives == backend.traffic.wire_bytes == 0

    run_threads(1, train)


def test_an_uncompressed_group_is_adamw_for_good_beside_one_with_local_steps() -> None:
    def train(backend: Backend) -> None:
        together, alone, own = parameters(), parameters()[:4], parameters()[4:]
        groups = [{"params": together[:4]}, {"params": together[4:], "compress": False}]
        optimizer = ZeroOneAdam(groups, backend=backend, **SOON)
        apart = ZeroOneAdam(alone, backend=backend, **SOON)
        adamw = torch.optim.AdamW(own, lr=1e-2)
        for number in range(23):
            assert (optimizer.phase(0), optimizer.phase(1)) == (KINDS[number], "variance")
            given = gradients(together, backend.rank, number)
            step(optimizer, given)
            step(apart, given[:4])
            step(adamw, mean_of([gradients(together, rank, number)[4:] for rank in range(2)]))
            assert bits(together[:4]) == bits(alone)
            for p, q in zip(together[4:], own, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)

    run_threads(2, train)


# --- the same on all ranks


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_are_bit_equal_after_every_synchronised_step_and_differ_in_between(
    world_size: int, master_weights: bool
) -> None:
    options = {**SOON, "master_weights": master_weights}
    first, *others = run_threads(world_size, run, len(KINDS), contents, mostly, mixed, options)
    for seen in others:
        for number, kind in enumerate(KINDS):
            assert (seen[number] == first[number]) == (kind != "local"), f"step {number + 1}"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bucket_size_and_order_of_registration_change_no_bit(world_size: int) -> None:
    order = [5, 0, 6, 3, 2, 1, 4]

    def permuted(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(mixed(), rank, number)
        return [made[i] for i in order]

    usual = run_threads(world_size, run, 20, contents, gradients, mixed)
    small = {**SOON, "bucket_mb": 2.0**-13}
    otherwise = run_threads(world_size, run, 20, contents, permuted, lambda: mixed(order), small)
    for one, other in zip(usual, otherwise, strict=True):
        for now, then in zip(one, other, strict=True):
            assert [now[i] for i in order] == then


@pytest.mark.parametrize("world_size", [1, 2])
def test_strides_of_parameters_and_gradients_change_no_bit(world_size: int) -> None:
    def in_rows() -> list[Parameter]:
        return [Parameter(p.detach().contiguous()) for p in parameters()]

    def strided_too(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        return [torch.empty_like(p).copy_(g) for p, g in zip(params, gradients(params, rank, number), strict=True)]

    expected = run_threads(world_size, run, 20, contents, gradients, in_rows)
    for given in (gradients, strided_too):
        assert run_threads(world_size, run, 20, contents, given) == expected


def by_processes(backend: Backend) -> list[str]:
    return [checksum(state) for state in run(backend, len(KINDS), contents, gradients, mixed)]


@pytest.mark.parametrize(
    ("kind", "world_size"), [("gloo", 2), pytest.param("mpi", 3, marks=[pytest.mark.mpi, pytest.mark.slow, needs_mpi])]
)
def test_processes_make_the_steps_of_threads(kind: str, world_size: int) -> None:
    assert run_ranks(kind, world_size, by_processes) == run_threads(world_size, by_processes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("master_weights", [False, True])
def test_synchronize_makes_ranks_equal_in_the_middle_of_an_interval_and_the_schedule_goes_on(
    master_weights: bool, dtype: torch.dtype
) -> None:
    def train(backend: Backend) -> list[Any]:
        params = parameters(dtype=dtype)
        optimizer = ZeroOneAdam(params, backend=backend, master_weights=master_weights, **SOON)
        seen = []
        for number in range(len(KINDS)):
            assert optimizer.phase() == KINDS[number]
            step(optimizer, gradients(params, backend.rank, number))
            if number == 16:
                counted = [int(state["step"]) for state in saved(optimizer)]
                optimizer.synchronize()
                assert [int(state["step"]) for state in saved(optimizer)] == counted
                seen.append(contents(optimizer))
                backend.traffic.reset()
                optimizer.synchronize()
                assert backend.traffic.collectives == 0
                assert contents(optimizer) == seen[-1]
            elif KINDS[number] != "local":
                seen.append(contents(optimizer))
        return seen

    first, second = run_threads(2, train)
    assert first == second


def test_synchronize_of_one_rank_or_before_the_first_step_changes_nothing() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        optimizer.synchronize()
        assert bits(params) == bits(parameters())
        if backend.size == 1:
            for number in range(15):
                step(optimizer, gradients(params, 0, number))
                before = contents(optimizer)
                optimizer.synchronize()
                assert contents(optimizer) == before

    for world_size in (1, 2):
        run_threads(world_size, train)


# --- learning rates that end


def test_an_interval_without_learning_rate_moves_nothing_and_ranks_agree_about_the_momentum() -> None:
    def train(backend: Backend) -> list[Any]:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        seen = []
        for number in range(len(KINDS)):
            optimizer.param_groups[0]["lr"] = 0.0 if 15 <= number < 19 else 1e-2
            before = bits(params)
            step(optimizer, gradients(params, backend.rank, number))
            assert (bits(params) == before) == (15 <= number < 19)
            assert all(bool(t.isfinite().all()) for t in (*params, *(state["exp_avg"] for state in saved(optimizer))))
            if KINDS[number] != "local":
                seen.append(contents(optimizer))
        return seen

    first, second = run_threads(2, train)
    assert first == second


def test_a_schedule_that_restarts_after_its_lowest_learning_rate_does_not_blow_up_the_momentum() -> None:
    def train(backend: Backend) -> None:
        p = Parameter(torch.zeros(3000))
        optimizer = ZeroOneAdam([p], backend=backend, **SOON)
        for number in range(60):
            optimizer.param_groups[0]["lr"] = 1e-12 if 30 <= number < 40 else 1e-2
            step(optimizer, [values(number, backend.rank, shape=(3000,))])
            # Feedback in units of lr·m would come back as 1e10 times the momentum here. Signs and their error feedback
            # keep it within a few times the largest gradient.
            assert float(saved(optimizer)[0]["exp_avg"].abs().max()) < 10

    run_threads(2, train)


# --- numbers that are not finite


def spoiled(params: Sequence[Tensor], rank: int, number: int, bad: float, at: Sequence[int]) -> Gradients:
    made = gradients(params, rank, number)
    if rank == 1 and number in at:
        made[0].view(-1)[3] = bad  # type: ignore[union-attr]
    return made


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


# --- dead entries and late parameters


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


# --- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_of_half_precision_parameters_go_the_way_of_fp32_parameters(
    world_size: int, dtype: torch.dtype
) -> None:
    def exact(params: Sequence[Tensor], rank: int, number: int) -> Gradients:  # the same in fp32 and in half precision
        return [g.to(dtype).to(p.dtype) for p, g in zip(params, gradients(parameters(), rank, number), strict=True)]

    def train(backend: Backend) -> None:
        full = [Parameter(p.detach().float()) for p in parameters(dtype=dtype)]
        half = parameters(dtype=dtype)
        reference = ZeroOneAdam(full, backend=backend, **SOON)
        optimizer = ZeroOneAdam(half, backend=backend, master_weights=True, **SOON)
        for number, kind in enumerate(KINDS):
            step(reference, exact(full, backend.rank, number))
            step(optimizer, exact(half, backend.rank, number))
            for p, h, state, other in zip(full, half, saved(reference), saved(optimizer), strict=True):
                assert h.dtype == dtype
                assert bits(h) == bits(p.detach().to(dtype)), f"step {number + 1}"
                for key, value in state.items():
                    if key != "interval_start":
                        assert state_bits(other[key]) == state_bits(value)
                if kind != "local" or world_size == 1:
                    assert bits(other["master"]) == bits(p)

    run_threads(world_size, train)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_masters_an_interval_is_rounded_once_at_its_end(dtype: torch.dtype) -> None:
    def train(backend: Backend) -> None:
        # Numbers below 1 are eps / 2 apart: two of these steps are rounded away together, three are not.
        small = torch.finfo(dtype).eps / 8 * 0.9
        p = Parameter(torch.ones(64, dtype=dtype))
        options = {**SOON, "weight_decay": 0.0, "lr": small}
        optimizer = ZeroOneAdam([p], backend=backend, **options)
        for number in range(len(KINDS)):
            step(optimizer, [torch.ones(64)])
            assert bool((p < 1).all()) == (number >= 17), f"step {number + 1}: {p[0]}"

    run_threads(2, train)


# --- saving and loading


@pytest.mark.parametrize(
    ("world_size", "dtype", "master_weights"),
    [(1, torch.float32, False), (2, torch.float32, False), (2, torch.bfloat16, True), (3, torch.float16, False)],
    ids=str,
)
def test_a_run_resumed_after_any_step_is_bit_equal_to_one_without_a_break(
    world_size: int, dtype: torch.dtype, master_weights: bool
) -> None:
    def make(backend: Backend) -> tuple[ZeroOneAdam, list[Parameter]]:
        params = parameters(dtype=dtype)
        groups = [{"params": params[:4]}, {"params": params[4:], "local_step_scaler": 1, "lr": 1e-3}]
        return ZeroOneAdam(groups, backend=backend, master_weights=master_weights, **SOON), params

    def seen(optimizer: ZeroOneAdam) -> Any:
        return contents(optimizer), state_bits(optimizer.state_dict())

    def train(backend: Backend) -> None:
        optimizer, params = make(backend)
        checkpoints, expected = [], []
        for number in range(len(KINDS)):
            checkpoints.append(through_a_file({"p": [p.detach() for p in params], "o": optimizer.state_dict()}))
            step(optimizer, mostly(params, backend.rank, number))
            expected.append(seen(optimizer))
        for start in range(len(KINDS)):
            resumed, own = make(backend)
            with torch.no_grad():
                for p, value in zip(own, checkpoints[start]["p"], strict=True):
                    p.copy_(value)
            resumed.load_state_dict(checkpoints[start]["o"])
            for number in range(start, min(start + 6, len(KINDS))):
                step(resumed, mostly(own, backend.rank, number))
                assert seen(resumed) == expected[number], f"saved after {start} steps, now after {number + 1}"

    run_threads(world_size, train)


def test_a_state_of_adamw_is_one_whose_every_step_updated_the_variance() -> None:
    def train(backend: Backend) -> list[Any]:
        params = parameters()
        adamw = torch.optim.AdamW(params, lr=1e-2)
        for number in range(17):  # the next step is the second of an interval
            step(adamw, mean_of([gradients(params, rank, number) for rank in range(2)]))
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        optimizer.load_state_dict(through_a_file(adamw.state_dict()))
        assert optimizer.phase() == KINDS[17]
        for number in range(17, 19):
            step(optimizer, gradients(params, backend.rank, number))
        assert {float(state["variance_step"]) for state in saved(optimizer)} == {17.0}
        return contents(optimizer)

    first, second = run_threads(2, train)
    assert first == second


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"var_freeze_step": 0}, "var_freeze_step must be an int of at least 1, got 0"),
        ({"local_step_clipper": 1.5}, "local_step_clipper must be an int of at least 1, got 1.5"),
        ({"lr": -1.0}, "lr must be"),
        ({"adamw_mode": 1}, "adamw_mode must be True or False"),
        ({"amsgrad": True}, "amsgrad=True is not supported"),
        ({"freeze_step": 10}, "there is no option 'freeze_step'"),
    ],
)
def test_options_out_of_range_or_unknown_are_refused_with_their_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"ZeroOneAdam: {message}"):
        ZeroOneAdam(parameters(), **{"var_freeze_step": 5, **options})
    optimizer = ZeroOneAdam(parameters(), var_freeze_step=5)
    if "freeze_step" not in options:  # in a group a name that nobody knows is somebody else's
        with pytest.raises(InputError, match=message):
            optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], **options})
        assert len(optimizer.param_groups) == 1


def test_a_group_added_in_the_middle_has_a_schedule_of_its_own_and_disturbs_nobody() -> None:
    def train(backend: Backend) -> None:
        old, new, alone = parameters()[:4], parameters()[4:], parameters()[4:]
        optimizer = ZeroOneAdam(old, backend=backend, **SOON)
        undisturbed = ZeroOneAdam(parameters()[:4], backend=backend, **SOON)
        added = ZeroOneAdam(alone, backend=backend, **SOON)
        for number in range(30):
            if number == 17:  # in the middle of an interval
                optimizer.add_param_group({"params": new})
            given = gradients([*old, *new], backend.rank, number)
            step(optimizer, given[: len(all_params(optimizer))])
            step(undisturbed, given[:4])
            assert contents(optimizer, old) == contents(undisturbed)
            if number >= 17:
                assert optimizer.phase(1) == KINDS[number - 16]
                step(added, given[4:])
                assert contents(optimizer, new) == contents(added)

    run_threads(2, train)


def test_the_schedule_is_that_of_the_policies() -> None:
    variance = VariancePolicy(var_freeze_step=8, var_update_scaler=2)
    sync = SyncPolicy(var_freeze_step=8, local_step_scaler=3, local_step_clipper=4)
    for number, kind in zip(itertools.count(1), KINDS, strict=False):
        assert variance.updates(number) == (kind == "variance")
        assert sync.synchronises(number) == (kind != "local")
