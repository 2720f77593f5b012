"""A number that is not finite, on any rank at any step, makes all ranks skip the step, as if it had not been."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, TransportError, run_threads
from onebit.optim import OnebitAdam
from tests.comm.oracle import UNIT
from tests.comm.samples import bits
from tests.optim.samples import Gradients, all_params, contents, gradients, parameters, step, values

FREEZE = 4
BAD = [math.nan, math.inf, -math.inf]


def spoiled(params: Sequence[Tensor], rank: int, number: int, guilty: int, bad: float) -> Gradients:
    """Gradients of which one, on one rank, has a bad number."""
    made = gradients(params, rank, number)
    if rank == guilty:
        g = made[number % len(made)]
        g = made[0] if g is None or not g.numel() else g
        assert g is not None
        g.view(-1)[g.numel() // 2] = bad
    return made


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_step_is_skipped_on_all_ranks_and_leaves_no_trace_in_parameters_and_moments(
    world_size: int, dtype: torch.dtype, bad: float
) -> None:
    def train(backend: Backend) -> None:
        params = parameters(dtype=dtype)
        optimizer = OnebitAdam(params, freeze_step=FREEZE, lr=1e-2, backend=backend)
        skipped = 0
        for number in range(2 * FREEZE):
            for guilty in {0, world_size - 1}:
                before, phase = contents(optimizer), optimizer.phase()
                step(optimizer, spoiled(params, backend.rank, number, guilty, bad))
                skipped += 1
                assert contents(optimizer) == before
                assert (optimizer.skipped_steps, optimizer.phase()) == (skipped, phase)
                assert optimizer.param_groups[0]["step"] == number
            step(optimizer, gradients(params, backend.rank, number))
            assert optimizer.skipped_steps == skipped
            assert contents(optimizer) != before

    run_threads(world_size, train)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_whose_warm_up_had_bad_steps_is_bit_equal_to_one_without_in_both_phases(world_size: int) -> None:
    def train(backend: Backend, bad_steps: bool) -> list[Any]:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=FREEZE, lr=1e-2, backend=backend)
        seen = []
        for number in range(2 * FREEZE):
            if bad_steps and number < FREEZE:
                step(optimizer, spoiled(params, backend.rank, 50 + number, number % world_size, math.inf))
            step(optimizer, gradients(params, backend.rank, number))
            seen.append(contents(optimizer))
        assert optimizer.skipped_steps == (FREEZE if bad_steps else 0)
        return seen

    assert run_threads(world_size, train, True) == run_threads(world_size, train, False)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_bad_step_in_the_compressed_phase_moves_error_feedback_by_rounding_only(world_size: int, bad: float) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=FREEZE, lr=1e-2, backend=backend)
        for number in range(2 * FREEZE):
            step(optimizer, gradients(params, backend.rank, number))
        before = optimizer.state_dict()["onebit"]["residuals"][0]
        repeats = 10
        for number in range(repeats):
            step(optimizer, spoiled(params, backend.rank, 30 + number, number % world_size, bad))
        after = optimizer.state_dict()["onebit"]["residuals"][0]
        assert float(before["worker"].abs().max()) > 0
        # Fewer than 8 + 4n roundings of numbers up to ten times the residuals, see the test of undo in tests/comm.
        largest = 10 * max(float(before[part].abs().max()) for part in ("worker", "server") if before[part].numel())
        for part in ("worker", "server"):
            off = (after[part] - before[part]).abs()
            assert float(off.max() if off.numel() else 0) <= repeats * (8 + 4 * world_size) * UNIT * largest

    run_threads(world_size, train)


def test_runs_with_and_without_a_bad_step_in_the_compressed_phase_stay_together() -> None:
    def train(backend: Backend, bad_step: bool) -> list[Tensor]:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=FREEZE, lr=1e-2, backend=backend)
        for number in range(3 * FREEZE):
            if bad_step and number == 2 * FREEZE:
                step(optimizer, spoiled(params, backend.rank, 77, 0, math.nan))
            step(optimizer, gradients(params, backend.rank, number))
        return [p.detach() for p in params]

    with_it, without = run_threads(2, train, True), run_threads(2, train, False)
    for one, other in zip(with_it[0], without[0], strict=True):
        # No sign was decided by the rounding in the feedback: an update of 1e-2 differs by its rounding alone.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert [bits(p) for p in with_it[0]] == [bits(p) for p in with_it[1]]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bad_number_in_one_group_skips_all_groups_whatever_their_phase(world_size: int, where: int) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        groups = [{"params": params[:3], "freeze_step": 2}, {"params": params[3:], "freeze_step": 50}]
        optimizer = OnebitAdam(groups, freeze_step=1, backend=backend)
        for number in range(5):
            step(optimizer, gradients(params, backend.rank, number))
        assert (optimizer.phase(0), optimizer.phase(1)) == ("compressed", "warmup")
        before = contents(optimizer)
        made = gradients(params, backend.rank, 5)
        if backend.rank == world_size - 1:
            made[(0, 3)[where]].view(-1)[1] = math.nan
        step(optimizer, made)
        assert contents(optimizer) == before
        assert [group["step"] for group in optimizer.param_groups] == [5, 5]
        step(optimizer, gradients(params, backend.rank, 5))
        assert [group["step"] for group in optimizer.param_groups] == [6, 6]

    run_threads(world_size, train)


@pytest.mark.parametrize("number", [1, FREEZE + 1])
def test_finite_gradients_whose_sum_overflows_skip_the_step(number: int) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=FREEZE, backend=backend, betas=(0.0, 0.9))
        for i in range(number):
            step(optimizer, gradients(params, backend.rank, i))
        before = contents(optimizer)
        step(optimizer, [torch.full_like(p, 3e38) for p in params])
        if optimizer.skipped_steps:
            assert contents(optimizer) == before
        assert all(bool(p.isfinite().all()) for p in params)
        assert number > FREEZE or optimizer.skipped_steps == 1

    run_threads(2, train)


def test_the_skip_is_logged_with_the_rank_and_the_count_and_the_loss_still_returned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def train(backend: Backend) -> None:
        p = Parameter(values(0, shape=(9,)))
        optimizer = OnebitAdam([p], freeze_step=2, backend=backend)
        for _ in range(2):
            p.grad = torch.full((9,), math.nan if backend.rank else 1.0)
            assert optimizer.step(lambda: 12.5) == 12.5

    with caplog.at_level(logging.WARNING, "onebit"):
        run_threads(2, train)
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [
        f"rank {rank}: step skipped, some rank has a non-finite gradient ({count} so far)"
        for rank in range(2)
        for count in (1, 2)
    ]


def test_the_count_of_skipped_steps_is_saved() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend)
        step(optimizer, spoiled(params, backend.rank, 0, 1, math.nan))
        other = OnebitAdam(parameters(), freeze_step=2, backend=backend)
        other.load_state_dict(optimizer.state_dict())
        assert other.skipped_steps == 1
        assert all_params(other)[0].isfinite().all()

    run_threads(2, train)


@pytest.mark.parametrize("number", [1, FREEZE + 2])
def test_a_rank_that_ends_raises_on_the_others_and_their_step_is_not_made(number: int) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        groups = [{"params": params[:3]}, {"params": params[3:]}]
        optimizer = OnebitAdam(groups, freeze_step=FREEZE, backend=backend)
        for i in range(number):
            step(optimizer, gradients(params, backend.rank, i))
        if backend.rank == 1:
            return
        before, residuals = contents(optimizer), optimizer.state_dict()["onebit"]["residuals"]
        for _ in range(2):
            with pytest.raises(TransportError, match=f"rank {backend.rank}: .* did not complete"):
                step(optimizer, gradients(params, backend.rank, number))
            assert contents(optimizer) == before
            assert [group["step"] for group in optimizer.param_groups] == [number, number]
        if number > FREEZE:
            for old, new in zip(residuals, optimizer.state_dict()["onebit"]["residuals"], strict=True):
                # Two steps put back, each of four roundings of numbers that the residuals exceed at most tenfold.
                bound = 2 * 4 * UNIT * 10 * float(old["worker"].abs().max())
                assert torch.allclose(new["worker"], old["worker"], rtol=0, atol=bound)

    run_threads(3, train)


def test_a_group_whose_average_fails_takes_the_groups_before_it_along() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam([{"params": params[:3]}, {"params": params[3:]}], freeze_step=FREEZE, backend=backend)
        for number in range(2 * FREEZE):
            step(optimizer, gradients(params, backend.rank, number))
        before, residuals = contents(optimizer), optimizer.state_dict()["onebit"]["residuals"]
        original, calls = backend._all_to_all, []

        def fail_the_second_time(output: Tensor, input: Tensor) -> Any:
            calls.append(input)
            return original(output, input) if len(calls) == 1 else 1 / 0

        backend._all_to_all = fail_the_second_time  # type: ignore[method-assign]
        with pytest.raises(TransportError, match=f"rank {backend.rank}: all_to_all did not complete"):
            step(optimizer, gradients(params, backend.rank, 99))
        assert len(calls) == 2
        assert contents(optimizer) == before
        for old, new in zip(residuals, optimizer.state_dict()["onebit"]["residuals"], strict=True):
            bound = 4 * UNIT * 10 * float(old["worker"].abs().max())  # as above
            assert torch.allclose(new["worker"], old["worker"], rtol=0, atol=bound)

    run_threads(2, train)
