"""torch.amp.GradScaler drives the optimizers: gradients are unscaled as they are read, ranks skip a step together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.amp import GradScaler
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam
from tests.comm.samples import bits
from tests.optim.samples import Gradients, contents, gradients, parameters, step

OPTIONS: dict[str, Any] = {"freeze_step": 3, "variance_refresh": 4, "lr": 1e-2}
STEPS = 9


def scaled_step(scaler: GradScaler, optimizer: OnebitAdam, params: list[Parameter], given: Gradients) -> None:
    """What a training loop does with gradients of the loss times the scale."""
    scaler.scale(torch.ones(()))  # the scaler makes its scale at the first loss
    for p, g in zip(params, given, strict=True):
        p.grad = None if g is None else (g.float() * scaler.get_scale()).to(p.dtype)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_steps_through_a_scaler_are_those_without_in_every_phase(world_size: int, dtype: torch.dtype) -> None:
    def train(backend: Backend) -> None:
        params, copies = parameters(dtype=dtype), parameters(dtype=dtype)
        optimizer, plain = (OnebitAdam(p, backend=backend, **OPTIONS) for p in (params, copies))
        # Powers of two change no bit, and ranks may have different ones: each takes its own out.
        scaler = GradScaler("cpu", init_scale=2.0 ** (4 + backend.rank), growth_interval=4)
        for number in range(STEPS):
            given = gradients(params, backend.rank, number)
            scaled_step(scaler, optimizer, params, given)
            step(plain, given)
            assert contents(optimizer) == contents(plain)
        assert scaler.get_scale() == 2.0 ** (4 + backend.rank + 2)

    run_threads(world_size, train)


def test_gradients_of_half_precision_are_unscaled_in_fp32_and_do_not_vanish() -> None:
    def train(backend: Backend) -> float:
        p = Parameter(torch.zeros(8, dtype=torch.float16))
        optimizer = OnebitAdam([p], lr=0.25, weight_decay=0.0, freeze_step=2, eps=0.0, backend=backend)
        scaler = GradScaler("cpu", init_scale=2.0**20)
        for _ in range(4):  # 2⁻³⁰ is 0 in fp16, where nothing is below 2⁻²⁴
            scaled_step(scaler, optimizer, [p], [torch.full((8,), 2.0**-30)])
        return float(p.detach().float().mean())

    for mean in run_threads(2, train):
        assert mean == pytest.approx(-1.0, rel=1e-3)  # four steps of lr, each rounded to fp16


@pytest.mark.parametrize("by_hand", [False, True], ids=["scaler.step alone", "after scaler.unscale_"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_overflow_on_one_rank_is_skipped_by_all_and_its_scale_backs_off(world_size: int, by_hand: bool) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, backend=backend, **OPTIONS)
        guilty = backend.rank == world_size - 1
        scaler = GradScaler("cpu", init_scale=2.0**16)
        for number in range(STEPS):
            before, scale = contents(optimizer), scaler.get_scale() if number else 2.0**16
            given = gradients(params, backend.rank, 50 + number)
            if guilty:
                assert given[0] is not None
                given[0].view(-1)[number] = math.inf
            scaler.scale(torch.ones(()))
            for p, g in zip(params, given, strict=True):
                p.grad = None if g is None else g * scale
            if by_hand:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert contents(optimizer) == before
            assert optimizer.skipped_steps == number + 1
            assert scaler.get_scale() == (scale / 2 if guilty else scale)
            scaled_step(scaler, optimizer, params, gradients(params, backend.rank, number))
            assert contents(optimizer) != before

    run_threads(world_size, train)


def test_a_verdict_without_a_bad_number_is_honoured_and_answered_with_that_of_all_ranks() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, backend=backend, **OPTIONS)
        for number in range(STEPS):
            before = contents(optimizer)
            optimizer.found_inf = torch.tensor(float(backend.rank == 1))
            step(optimizer, gradients(params, backend.rank, 50 + number))
            assert contents(optimizer) == before
            assert float(optimizer.found_inf) == 1.0
            optimizer.found_inf = torch.tensor(0.0)
            optimizer.grad_scale = torch.tensor(1.0)
            step(optimizer, gradients(params, backend.rank, number))
            assert float(optimizer.found_inf) == 0.0
            del optimizer.found_inf, optimizer.grad_scale
        assert optimizer.skipped_steps == STEPS
        plain = parameters()
        reference = OnebitAdam(plain, backend=backend, **{**OPTIONS, "freeze_step": 100})
        for number in range(3):  # error feedback is put back to within rounding, so the warm-up alone is compared
            step(reference, gradients(plain, backend.rank, number))
        assert bits(params) != bits(plain)

    run_threads(2, train)


def test_gradients_keep_their_scale_when_the_step_has_read_them() -> None:
    params = parameters()
    optimizer = OnebitAdam(params, backend="single", **OPTIONS)
    scaler = GradScaler("cpu", init_scale=8.0)
    given = gradients(params, 0, 0)
    scaled_step(scaler, optimizer, params, given)
    assert bits([p.grad for p in params if p.grad is not None]) == bits([8.0 * g for g in given if g is not None])
