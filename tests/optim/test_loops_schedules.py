"""Learning-rate schedulers, moving averages of the model and clipping, in every phase of each optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from onebit.comm import Backend, MismatchError, run_threads
from onebit.optim import clip_grad_norm_
from tests.comm.samples import bits
from tests.optim.loops import KINDS, STEPS, assert_equal_on_ranks, backward, loss_of, make, network, settled
from tests.optim.samples import contents, gradients, parameters, step

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS // 2),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "one cycle, which moves betas too": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "cyclic, which moves betas too": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 4, cycle_momentum=True),
    "one after the other": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.ExponentialLR(o, 0.8)], [5]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_acts_as_if_its_numbers_were_written_by_hand(kind: str, world_size: int, schedule: str) -> None:
    moved = torch.optim.AdamW([Parameter(torch.zeros(1))], lr=1e-2)  # what the scheduler does to torch's own
    scheduler = SCHEDULES[schedule](moved)
    plan: list[tuple[float, tuple[float, float]]] = []
    for _ in range(STEPS):
        plan.append((float(moved.param_groups[0]["lr"]), moved.param_groups[0]["betas"]))
        moved.step()
        scheduler.step()

    def train(backend: Backend) -> None:
        params, copies = parameters(), parameters()
        scheduled, by_hand = (make(kind, p, backend) for p in (params, copies))
        scheduler = SCHEDULES[schedule](scheduled)
        for number, (lr, betas) in enumerate(plan):
            assert (scheduled.param_groups[0]["lr"], scheduled.param_groups[0]["betas"]) == (lr, betas)
            by_hand.param_groups[0].update(lr=lr, betas=betas)
            step(scheduled, gradients(params, backend.rank, number))
            step(by_hand, gradients(params, backend.rank, number))
            scheduler.step()
            assert contents(scheduled) == contents(by_hand)
        settled(scheduled)
        assert_equal_on_ranks(backend, params)

    run_threads(world_size, train)
    assert len(set(plan)) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_betas_of_a_cycle_reach_the_momentum_of_every_phase(kind: str) -> None:
    """With betas[0] of 0 the momentum is the gradient alone, so what was there before must leave no trace."""

    def train(backend: Backend, number: int) -> list[bytes]:
        params = parameters()
        optimizer = make(kind, params, backend)
        for earlier in range(number):
            step(optimizer, gradients(params, backend.rank, earlier))
        settled(optimizer)
        optimizer.param_groups[0]["betas"] = (0.0, 0.999)
        step(optimizer, gradients(params, backend.rank, number))
        saved = optimizer.state_dict()["state"]
        return bits([saved[i]["exp_avg"].sign() for i in range(len(params))])

    for number in (2, STEPS - 1):
        # On one rank nothing is compressed, and the momentum has the signs of the gradient.
        made = [g for g in gradients(parameters(), 0, number) if g is not None]
        assert run_threads(1, train, number)[0] == bits([g.sign() for g in made])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_in_a_tensor_is_the_number_that_it_holds_when_a_scheduler_fills_it(kind: str, world_size: int) -> None:
    def train(backend: Backend) -> None:
        params, copies = parameters(), parameters()
        rate = torch.tensor(2.0**-6)
        in_tensor, as_number = make(kind, params, backend, lr=rate), make(kind, copies, backend, lr=2.0**-6)
        schedulers = [lr_scheduler.StepLR(o, 3, gamma=0.5) for o in (in_tensor, as_number)]  # exact in fp32
        for number in range(STEPS):
            step(in_tensor, gradients(params, backend.rank, number))
            step(as_number, gradients(params, backend.rank, number))
            for scheduler in schedulers:
                scheduler.step()
            assert contents(in_tensor) == contents(as_number)
        assert in_tensor.param_groups[0]["lr"] is rate
        assert float(rate) == 2.0**-10

    run_threads(world_size, train)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plateau_that_all_ranks_see_keeps_them_equal_and_one_of_their_own_is_found_out(kind: str) -> None:
    def train(backend: Backend, shared: bool) -> None:
        params = parameters()
        optimizer = make(kind, params, backend, check_every=1)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        for number in range(STEPS):
            step(optimizer, gradients(params, backend.rank, number))
            plateau.step(1.0 if shared or backend.rank else 1.0 / (1 + number))
        settled(optimizer)
        assert_equal_on_ranks(backend, params)
        assert optimizer.param_groups[0]["lr"] < 1e-3

    run_threads(2, train, True)
    with pytest.raises(MismatchError):
        run_threads(2, train, False)


# --- averages of the model


@pytest.mark.parametrize("kind", KINDS)
def test_a_moving_average_of_the_model_is_that_of_its_values_and_equal_on_ranks(kind: str) -> None:
    decay = 0.75

    def train(backend: Backend) -> list[list[bytes]]:
        model = network()
        optimizer = make(kind, model.parameters(), backend)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
        expected: list[Any] = []
        for number in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model, backend.rank, number))
            optimizer.step()
            settled(optimizer)  # what ranks average must be what they share
            averaged.update_parameters(model)
            now = [p.detach().double().numpy().copy() for p in model.parameters()]
            expected = [decay * e + (1 - decay) * n for e, n in zip(expected, now, strict=True)] if expected else now
        for p, value in zip(averaged.module.parameters(), expected, strict=True):
            # 14 lerps of numbers about 1, each rounded once or twice in fp32.
            np.testing.assert_allclose(p.detach().numpy(), value, rtol=0, atol=3e-6)
        return [bits(list(averaged.module.parameters()))]

    first, second = run_threads(2, train)
    assert first == second


# --- clipping


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_scales_all_ranks_by_the_power_mean_of_their_norms(kind: str, world_size: int) -> None:
    most = 0.02

    def train(backend: Backend) -> None:
        clipped, scaled = network(), network()
        optimizers = [make(kind, model.parameters(), backend) for model in (clipped, scaled)]
        for number in range(STEPS):
            norms: list[float] = []
            for rank in range(world_size):  # every rank's gradient of its own parameters, which it can work out
                scaled.zero_grad()
                backward(loss_of(scaled, rank, number))
                norms.append(sum(float(given(p).double().square().sum()) for p in scaled.parameters()) ** 0.5)
            scaled.zero_grad()
            clipped.zero_grad()
            for model in (clipped, scaled):
                backward(loss_of(model, backend.rank, number))
            total = clip_grad_norm_(optimizers[0], most)
            if kind != "ZeroOneAdam":  # whose ranks have parameters of their own here and there
                # fp32 sums of 640 squares.
                assert float(total) == pytest.approx((sum(n * n for n in norms) / world_size) ** 0.5, rel=1e-5)
            factor = torch.clamp(most / (total + 1e-6), max=1.0)
            for p in scaled.parameters():
                p.grad = given(p) * factor
            for optimizer in optimizers:
                optimizer.step()
            assert contents(optimizers[0]) == contents(optimizers[1])

    run_threads(world_size, train)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_every_number_by_itself_keeps_ranks_equal(kind: str) -> None:
    def train(backend: Backend) -> None:
        model = network()
        optimizer = make(kind, model.parameters(), backend)
        for number in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model, backend.rank, number))
            nn.utils.clip_grad_value_(model.parameters(), 2.0**-10)
            assert all(float(given(p).abs().max()) <= 2.0**-10 for p in model.parameters())
            optimizer.step()
        settled(optimizer)
        assert_equal_on_ranks(backend, list(model.parameters()))

    run_threads(2, train)


def given(p: Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad
