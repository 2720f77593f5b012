"""freeze_step="auto": the variance is frozen when its norm is stable, at the same step on every rank, told once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.comm.threads_backend import ThreadsBackend
from onebit.optim import OnebitAdam, freeze, warmup
from tests.comm.samples import arrays
from tests.optim import oracle
from tests.optim.samples import Gradients, contents, feedback, gradients, parameters, step, through_a_file, values

AUTO: dict[str, Any] = {"freeze_step": "auto", "lr": 1e-2, "betas": (0.9, 0.98)}  # Δ = 50
SIZE = 4000  # entries, so that the norm of their variance has little noise: √(2/4000)·√(0.01) = 0.2 %


def one() -> list[Parameter]:
    return [Parameter(values(0, shape=(SIZE,)))]


def times(factor: Callable[[int], float]) -> Callable[[Sequence[Tensor], int, int], Gradients]:
    """Gradients whose size follows a function of the step."""

    def made(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        return [factor(number) * values(3, i, number, rank, shape=tuple(p.shape)) for i, p in enumerate(params)]

    return made


STEADY = times(lambda number: 1.0)


def frozen_at(
    backend: Backend,
    given: Callable[[Sequence[Tensor], int, int], Gradients],
    rate: Callable[[int], float] = lambda number: 1.0,
    steps: int = 400,
    **options: Any,
) -> int | None:
    """After how many steps the variance was frozen; None: it was not."""
    params = one()
    optimizer = OnebitAdam(params, backend=backend, **{**AUTO, **options})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for number in range(steps):
        if optimizer.phase() == "compressed":
            return number
        step(optimizer, given(params, backend.rank, number))
        scheduler.step()
    return None


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_step_and_every_number_after_it_are_those_of_the_float64_oracle(world_size: int) -> None:
    steps = 220
    given = times(lambda number: 1.0 + 0.5 * math.exp(-number / 25))

    def rate(number: int) -> float:
        return min(number + 1, 20) / 20

    def train(backend: Backend) -> tuple[int | None, list[int], list[Any]]:
        params = one()
        optimizer = OnebitAdam(params, backend=backend, **AUTO)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        for number in range(steps):
            step(optimizer, given(params, backend.rank, number))
            scheduler.step()
        state = optimizer.state[params[0]]
        counts = [int(state[key]) for key in ("step", "variance_step")]
        return optimizer.param_groups[0]["frozen_at"], counts, arrays([params[0], state["exp_avg_sq"]])

    expected = oracle.OnebitAdam([p.detach().double().numpy() for p in one()], world_size, oracle.Options(**AUTO))
    for number in range(steps):
        ranks = [
            [g.double().numpy() for g in given(one(), rank, number) if g is not None] for rank in range(world_size)
        ]
        expected.step(ranks, AUTO["lr"] * rate(number))
    assert expected.frozen_at is not None
    assert 70 < expected.frozen_at < 200
    # No ratio is so near the threshold that fp32 could decide otherwise, which would make this a test of rounding.
    assert min(abs(min(r, 1 / r) - 0.96) for _, r in expected.ratios) > 1e-5
    for at, counts, (x, v) in run_threads(world_size, train):
        assert at == expected.frozen_at
        assert counts == [steps, at]
        np.testing.assert_allclose(v, expected.v[0], rtol=4 * at * 2.0**-24)  # two products and a sum a step
        # Momenta differ by roundings, about 2⁻²⁴ of gradients below 15, and are divided by roots of at least 0.4; a
        # freeze one step off moves the variance by 2 %, and parameters by a percent of the 2 that they have travelled.
        np.testing.assert_allclose(x, expected.x[0], atol=2e-4)


@pytest.mark.parametrize(("change", "phase"), [({"freeze_step": 6}, "compressed"), ({"compress": False}, "dense")])
def test_who_decides_otherwise_before_the_variance_is_stable_is_followed(change: dict[str, Any], phase: str) -> None:
    """The norm then travels with gradients no more; the steps are those of who decided so at once."""

    def train(backend: Backend, at: int) -> tuple[list[Any], str]:
        params = parameters()
        optimizer = OnebitAdam(params, backend=backend, **AUTO)
        for number in range(10):
            if number == at:
                optimizer.param_groups[0].update(change)
            step(optimizer, gradients(params, backend.rank, number))
        return contents(optimizer), optimizer.phase()

    assert run_threads(2, train, 4) == run_threads(2, train, 0)
    assert {found for _, found in run_threads(2, train, 4)} == {phase}


def test_steady_gradients_freeze_as_soon_as_there_are_two_measurements_to_compare() -> None:
    # Every 3 steps, 48 apart; the first is made before step 4, of what 3 steps left. One gradient's noise fades as t⁻¹.
    (at,) = set(run_threads(2, frozen_at, STEADY))
    assert at is not None
    assert 3 + 48 + 1 <= at <= 3 + 48 + 1 + 30
    assert (at - 1) % 3 == 0


@pytest.mark.parametrize("growth", [1.002, 1 / 1.002], ids=["growing", "shrinking"])
def test_a_drifting_variance_is_not_frozen_until_the_drift_ends(growth: float) -> None:
    # The variance changes by 1.002² per step, 1.21 over 48: far from 0.96 to 1/0.96. After the drift, of 150 steps, the
    # old gradients fade by 1/e in 50.
    (never,) = set(run_threads(1, frozen_at, times(lambda number: growth**number)))
    assert never is None
    (at,) = set(run_threads(1, frozen_at, times(lambda number: growth ** min(number, 150))))
    assert at is not None
    assert 200 < at < 320


def test_a_learning_rate_that_still_rises_delays_it() -> None:
    def rising(until: int) -> Callable[[int], float]:
        return lambda number: min(number + 1, until) / until

    at = [run_threads(1, frozen_at, STEADY, rising(until))[0] for until in (1, 100, 200)]
    for found, until in zip(at, (1, 100, 200), strict=True):
        assert found is not None
        assert until + 48 < found <= until + 48 + 33, at
    # In stairs of 20 steps it stands still most of the time, and rises all the same.
    (stairs,) = run_threads(1, frozen_at, STEADY, lambda number: min(number // 20 + 1, 10))
    assert stairs is not None
    assert 180 + 48 < stairs <= 180 + 48 + 6


def test_a_rate_that_falls_or_only_jitters_by_rounding_delays_nothing() -> None:
    (usual,) = run_threads(1, frozen_at, STEADY)
    for rate in (lambda number: 1 / (1 + number), lambda number: 1 + 1e-15 * (number % 2)):
        assert run_threads(1, frozen_at, STEADY, rate) == [usual]


def test_gradients_that_are_all_zero_or_missing_are_nothing_to_freeze() -> None:
    for given in (times(lambda number: 0.0), lambda params, rank, number: [None]):
        assert run_threads(2, frozen_at, given) == [None, None]


def test_ranks_that_add_up_in_another_order_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if one rank's machine rounded sums otherwise: by far more than any does, and across the threshold.
    def crooked(*args: Any) -> Tensor | None:
        measured = freeze.measure(*args)
        backend = ThreadsBackend.current()
        assert backend is not None
        return measured if measured is None or backend.rank == 0 else measured * (1 + 0.03 * (args[0]["step"] % 2))

    monkeypatch.setattr(warmup, "measure", crooked)
    found = run_threads(3, frozen_at, STEADY)
    assert found[0] is not None
    assert len(set(found)) == 1


def test_each_group_has_its_own_time() -> None:
    def train(backend: Backend) -> list[list[str]]:
        steady, drifting, fixed, dense = (Parameter(values(i, shape=(SIZE,))) for i in range(4))
        groups = [
            {"params": [steady]},
            {"params": [drifting]},
            {"params": [fixed], "freeze_step": 7},
            {"params": [dense], "compress": False},
        ]
        optimizer = OnebitAdam(groups, backend=backend, **AUTO)
        phases = []
        for number in range(100):
            given = STEADY([steady, drifting, fixed, dense], backend.rank, number)
            given[1] = given[1] * 1.01**number if given[1] is not None else None
            phases.append([optimizer.phase(g) for g in range(4)])
            step(optimizer, given)
        return phases

    first, second = run_threads(2, train)
    assert first == second
    assert first[-1] == ["compressed", "warmup", "compressed", "dense"]
    assert [phases[2] for phases in first] == ["warmup"] * 7 + ["compressed"] * 93


def test_skipped_steps_do_not_count() -> None:
    def train(backend: Backend, bad: int) -> tuple[Any, list[Any]]:
        params = one()
        optimizer = OnebitAdam(params, backend=backend, **AUTO)
        for number in range(90):
            if number % 10 == 3 and bad:
                given = STEADY(params, backend.rank, 900 + number)
                assert given[0] is not None
                given[0][5] = math.inf
                step(optimizer, given)
            if optimizer.phase() == "compressed":
                break
            step(optimizer, STEADY(params, backend.rank, number))
        return optimizer.param_groups[0]["frozen_at"], contents(optimizer)

    assert run_threads(2, train, 1) == run_threads(2, train, 0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_freezes_at_the_same_step_and_goes_on_bit_for_bit(world_size: int) -> None:
    options = {**AUTO, "betas": (0.9, 0.9), "variance_refresh": 4}  # Δ = 10

    def make(backend: Backend) -> tuple[OnebitAdam, list[Parameter], Any]:
        params = one()
        optimizer = OnebitAdam(params, backend=backend, **options)
        return optimizer, params, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(n + 1, 4))

    def train(backend: Backend) -> None:
        optimizer, params, scheduler = make(backend)
        seen, checkpoints = [], []
        for number in range(40):
            checkpoints.append(
                through_a_file(
                    {"p": params[0].detach(), "optimizer": optimizer.state_dict(), "schedule": scheduler.state_dict()}
                )
            )
            step(optimizer, STEADY(params, backend.rank, number))
            scheduler.step()
            seen.append((contents(optimizer), feedback(optimizer), optimizer.phase()))
        phases = [phase for *_, phase in seen]
        assert set(phases) == {"warmup", "compressed", "refresh"}
        for start in range(1, 40, 3):
            optimizer, params, scheduler = make(backend)
            with torch.no_grad():
                params[0].copy_(checkpoints[start]["p"])
            optimizer.load_state_dict(checkpoints[start]["optimizer"])
            scheduler.load_state_dict(checkpoints[start]["schedule"])
            for number in range(start, min(start + 14, 40)):
                step(optimizer, STEADY(params, backend.rank, number))
                scheduler.step()
                assert (contents(optimizer), feedback(optimizer), optimizer.phase()) == seen[number]

    run_threads(world_size, train)


def test_a_state_of_adamw_starts_the_measurements_anew() -> None:
    def train(backend: Backend) -> None:
        params = one()
        optimizer = OnebitAdam(params, backend=backend, **AUTO)
        for number in range(100):
            step(optimizer, STEADY(params, backend.rank, number))
        assert optimizer.phase() == "compressed"
        copies = one()
        adamw = torch.optim.AdamW(copies, lr=1e-2, betas=(0.9, 0.98))
        for number in range(30):
            step(adamw, STEADY(copies, 0, number))
        optimizer.load_state_dict(adamw.state_dict())
        assert optimizer.phase() == "warmup"
        assert optimizer.param_groups[0]["step"] == 30
        for number in range(30, 30 + 49):
            step(optimizer, STEADY(params, backend.rank, number))
            assert optimizer.phase() == "warmup"
        for number in range(79, 100):
            step(optimizer, STEADY(params, backend.rank, number))
        assert optimizer.phase() == "compressed"

    run_threads(1, train)


# --- what is told


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_switch_is_one_line_with_step_and_ratio(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "onebit"):
        at = run_threads(3, frozen_at, STEADY)[0]
    (line,) = messages(caplog)
    assert f"variance frozen after step {at}: its norm is " in line
    assert 0.96 <= float(line.split("its norm is ")[1].split()[0]) <= 1 / 0.96
    assert "of 48 steps before" in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"freeze_step": 10, "total_steps": 11}, None),
        ({"freeze_step": 10, "total_steps": 10}, "ends after 10 steps and the variance is frozen after step 10: noth"),
        ({"freeze_step": "auto", "total_steps": 1003}, None),
        (
            {"freeze_step": "auto", "total_steps": 900},
            "ends after 900 steps and the variance is frozen after step 994 at",
        ),
        ({"freeze_step": "auto", "total_steps": 30, "betas": (0.9, 0.9)}, None),
    ],
)
def test_a_training_that_ends_before_the_freeze_is_warned_of_when_the_optimizer_is_made(
    options: dict[str, Any], expected: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    OnebitAdam(parameters(), **options)
    said = messages(caplog)
    assert (said == []) if expected is None else (len(said) == 1 and expected in said[0]), said


def test_each_group_is_warned_of_by_itself_and_dense_groups_are_not(caplog: pytest.LogCaptureFixture) -> None:
    groups = [{"params": [p], "freeze_step": 5 * i + 1} for i, p in enumerate(parameters()[:4])]
    groups[3]["compress"] = False
    OnebitAdam(groups, freeze_step=3, total_steps=8)
    (line,) = messages(caplog)
    assert "frozen after step 11" in line


def test_half_a_training_without_a_freeze_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    run_threads(2, lambda backend: frozen_at(backend, times(lambda number: 1.01**number), steps=150, total_steps=130))
    (line,) = messages(caplog)
    assert line.startswith("half of 130 steps are over and the variance is not stable")


def test_gradients_that_arrive_from_all_shapes_and_ranks_freeze_alike() -> None:
    def train(backend: Backend) -> tuple[Any, list[Any]]:
        params = parameters()
        optimizer = OnebitAdam(params, backend=backend, freeze_step="auto", betas=(0.9, 0.95))
        for number in range(120):
            step(optimizer, gradients(params, backend.rank, number))
        return optimizer.param_groups[0]["frozen_at"], contents(optimizer)

    first, *others = run_threads(3, train)
    assert first[0] is not None
    assert all(seen == first for seen in others)
