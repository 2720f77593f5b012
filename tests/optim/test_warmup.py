"""Warm-up is torch's own AdamW or Adam on the mean gradient, bit for bit, from the first step to the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, AdamW

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam
from tests.comm.oracle import UNIT
from tests.comm.samples import bits
from tests.optim.samples import (
    Gradients,
    all_params,
    contents,
    gradients,
    mean_of,
    parameters,
    patchy,
    step,
    through_a_file,
    values,
)

STEPS = 8
LATER = 1000  # a freeze that does not come

# Which optimizer of torch, its options, and what OnebitAdam's are where they differ.
VARIANTS: dict[str, tuple[type[AdamW] | type[Adam], dict[str, Any], dict[str, Any]]] = {
    "defaults": (AdamW, {}, {}),
    "betas and eps": (AdamW, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 0.3}, {}),
    "betas of 0": (AdamW, {"betas": (0.0, 0.0)}, {}),
    "no decay": (AdamW, {"weight_decay": 0.0}, {}),
    "strong decay": (AdamW, {"lr": 0.3, "weight_decay": 1.5}, {}),
    "maximize": (AdamW, {"maximize": True, "weight_decay": 0.2}, {}),
    "rate of 0": (AdamW, {"lr": 0.0}, {}),
    "rate in a tensor": (AdamW, {"lr": torch.tensor(3e-2)}, {}),
    "Adam": (Adam, {"lr": 3e-2, "weight_decay": 0.0}, {"adamw_mode": False}),
    "Adam with decay": (Adam, {"lr": 3e-2, "weight_decay": 0.4}, {"adamw_mode": False}),
    "Adam that maximizes with decay": (Adam, {"weight_decay": 0.4, "maximize": True}, {"adamw_mode": False}),
}


def make_pair(backend: Backend, variant: str, **options: Any) -> tuple[OnebitAdam, torch.optim.Optimizer]:
    """OnebitAdam and torch's optimizer, each with its own copy of the parameters."""
    theirs, common, ours = VARIANTS[variant]
    optimizer = OnebitAdam(parameters(), backend=backend, **{"freeze_step": LATER, **common, **ours, **options})
    return optimizer, theirs(parameters(), **common)


def assert_same(optimizer: OnebitAdam, reference: torch.optim.Optimizer) -> None:
    for p, expected in zip(all_params(optimizer), all_params(reference), strict=True):
        assert bits(p) == bits(expected)
        assert ("exp_avg" in optimizer.state[p]) == ("exp_avg" in reference.state[expected])
        for key, value in reference.state[expected].items():
            assert bits(optimizer.state[p][key]) == bits(value), key


@pytest.mark.parametrize("given", [gradients, patchy], ids=["all gradients", "some are None"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_step_is_that_of_torch_on_the_mean_gradient(
    world_size: int, variant: str, given: Callable[..., Gradients]
) -> None:
    def train(backend: Backend) -> None:
        optimizer, reference = make_pair(backend, variant)
        params = all_params(optimizer)
        for number in range(STEPS):
            step(optimizer, given(params, backend.rank, number))
            step(reference, mean_of([given(params, rank, number) for rank in range(world_size)]))
            assert_same(optimizer, reference)

    run_threads(world_size, train)


@pytest.mark.parametrize("variant", ["defaults", "Adam with decay"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_hundred_steps_are_those_of_torch_with_a_freeze_that_is_waited_for(world_size: int, variant: str) -> None:
    def train(backend: Backend) -> None:
        optimizer, reference = make_pair(backend, variant, freeze_step="auto")
        params = all_params(optimizer)
        for number in range(100):
            step(optimizer, gradients(params, backend.rank, number))
            step(reference, mean_of([gradients(params, rank, number) for rank in range(world_size)]))
        assert_same(optimizer, reference)

    run_threads(world_size, train)


@pytest.mark.parametrize("freeze_step", [1, 2, 5])
def test_exactly_freeze_step_steps_are_those_of_torch(freeze_step: int) -> None:
    def train(backend: Backend) -> None:
        optimizer, reference = make_pair(backend, "defaults", freeze_step=freeze_step, variance_floor=0.0)
        params = all_params(optimizer)
        for number in range(freeze_step):
            assert optimizer.phase() == "warmup"
            step(optimizer, gradients(params, backend.rank, number))
            step(reference, mean_of([gradients(params, rank, number) for rank in range(2)]))
            assert_same(optimizer, reference)
        assert optimizer.phase() == "compressed"
        variance = [bits(optimizer.state[p]["exp_avg_sq"]) for p in params]
        step(optimizer, gradients(params, backend.rank, freeze_step))
        step(reference, mean_of([gradients(params, rank, freeze_step) for rank in range(2)]))
        assert [bits(optimizer.state[p]["exp_avg_sq"]) for p in params] == variance
        assert bits(params[0]) != bits(all_params(reference)[0])

    run_threads(2, train)


def test_the_first_update_has_the_size_of_the_learning_rate() -> None:
    def train(backend: Backend) -> None:
        p = Parameter(torch.zeros(100))
        optimizer = OnebitAdam([p], lr=0.25, weight_decay=0.0, freeze_step=1, backend=backend)
        step(optimizer, [torch.full((100,), 3.0 + backend.rank)])
        # m/(1 - β₁) = g and v/(1 - β₂) = g², so g/|g|, where some roundings and eps = 1e-8 of 3 are lost.
        torch.testing.assert_close(p.detach(), torch.full((100,), -0.25), rtol=1e-6, atol=0.0)

    run_threads(2, train)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)),
    "one cycle, which moves betas too": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_schedulers_act_as_on_torch(world_size: int, schedule: str) -> None:
    def train(backend: Backend) -> None:
        optimizer, reference = make_pair(backend, "betas and eps")
        params = all_params(optimizer)
        schedulers = [SCHEDULES[schedule](o) for o in (optimizer, reference)]
        rates = set()
        for number in range(STEPS):
            step(optimizer, gradients(params, backend.rank, number))
            step(reference, mean_of([gradients(params, rank, number) for rank in range(world_size)]))
            rates.add(optimizer.param_groups[0]["lr"])
            for scheduler in schedulers:
                scheduler.step()
            assert_same(optimizer, reference)
        assert len(rates) > 3

    run_threads(world_size, train)


def test_closures_are_evaluated_as_by_torch() -> None:
    def train(backend: Backend) -> None:
        def closure_of(optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
            def closure() -> Tensor:
                optimizer.zero_grad()
                params = all_params(optimizer)
                loss = sum(((p.float() - 0.1) ** 2).sum() for p in params) + torch.zeros(())
                loss.backward()
                return loss

            return closure

        optimizer, reference = make_pair(backend, "Adam with decay")
        for _ in range(STEPS):  # the same data on all ranks, and a sum of two equal numbers halved is exact
            assert bits(optimizer.step(closure_of(optimizer))) == bits(reference.step(closure_of(reference)))
            assert_same(optimizer, reference)

    run_threads(2, train)


def test_a_bias_that_is_not_corrected_leaves_exactly_the_two_factors_out() -> None:
    beta1, beta2, lr, eps = 0.9, 0.999, 1e-3, 1e-8

    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(
            params,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            weight_decay=0.0,
            freeze_step=5,
            bias_correction=False,
            backend=backend,
        )
        x = [p.detach().double().clone() for p in params]
        m, v = ([torch.zeros_like(p) for p in x] for _ in range(2))
        for number in range(5):
            step(optimizer, gradients(params, backend.rank, number))
            for i, g in enumerate(mean_of([gradients(params, rank, number) for rank in range(2)])):
                m[i] = beta1 * m[i] + (1 - beta1) * g.double()
                v[i] = beta2 * v[i] + (1 - beta2) * g.double() ** 2
                x[i] -= lr * m[i] / (v[i].sqrt() + eps)
            for p, expected in zip(params, x, strict=True):
                # Some ten fp32 operations a step on numbers about 1; a factor too much is hundreds of times that.
                torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=3e-6)
            assert {float(optimizer.state[p]["step"]) for p in params} == {number + 1}

    run_threads(2, train)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_half_precision_parameters_take_fp32_steps_and_are_rounded_once(world_size: int, dtype: torch.dtype) -> None:
    def train(backend: Backend) -> None:
        params, copies = parameters(dtype=dtype), parameters()
        optimizer = OnebitAdam(params, lr=0.1, freeze_step=LATER, backend=backend)
        reference = AdamW(copies, lr=0.1)
        for number in range(STEPS):
            with torch.no_grad():
                for copy, p in zip(copies, params, strict=True):
                    copy.copy_(p)
            step(optimizer, gradients(params, backend.rank, number))
            step(reference, mean_of([gradients(params, rank, number) for rank in range(world_size)]))
            for copy, p in zip(copies, params, strict=True):
                assert bits(p) == bits(copy.detach().to(dtype))
                assert bits(optimizer.state[p]["exp_avg_sq"]) == bits(reference.state[copy]["exp_avg_sq"])

    run_threads(world_size, train)


# --- a run that torch began


@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_state_of_a_torch_optimizer_is_carried_on_bit_for_bit(world_size: int, before: int) -> None:
    def train(backend: Backend) -> None:
        reference = AdamW(parameters(), lr=1e-2, betas=(0.8, 0.99))
        params = all_params(reference)
        for number in range(before):
            step(reference, mean_of([patchy(params, rank, number) for rank in range(world_size)]))
        copies = [Parameter(p.detach().clone()) for p in params]
        optimizer = OnebitAdam(copies, lr=55.0, freeze_step=before + 3, variance_floor=0.0, backend=backend)
        optimizer.load_state_dict(through_a_file(reference.state_dict()))
        assert optimizer.phase() == "warmup"
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["freeze_step"], group["step"]) == (
            1e-2,
            (0.8, 0.99),
            before + 3,
            before,
        )
        for number in range(before, before + 3):
            step(optimizer, patchy(copies, backend.rank, number))
            step(reference, mean_of([patchy(params, rank, number) for rank in range(world_size)]))
            assert_same(optimizer, reference)
        assert optimizer.phase() == "compressed"
        step(optimizer, patchy(copies, backend.rank, 99))

    run_threads(world_size, train)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_torch_run_past_the_freeze_goes_on_compressed_with_the_variance_of_all_its_steps(
    world_size: int,
) -> None:
    def train(backend: Backend) -> list[Any]:
        reference = AdamW(parameters(), lr=1e-2, weight_decay=0.0)
        for number in range(6):
            step(reference, mean_of([gradients(all_params(reference), rank, number) for rank in range(world_size)]))
        ends = []
        for freeze_step in (2, 6):  # 2 has long passed; the variance was last updated in step 6 either way
            copies = [Parameter(p.detach().clone()) for p in all_params(reference)]
            optimizer = OnebitAdam(copies, freeze_step=freeze_step, backend=backend)
            optimizer.load_state_dict(through_a_file(reference.state_dict()))
            assert optimizer.phase() == "compressed"
            for number in range(6, 9):
                step(optimizer, gradients(copies, backend.rank, number))
            ends.append(contents(optimizer))
        assert ends[0] == ends[1]
        return ends[0]

    per_rank = run_threads(world_size, train)
    assert all(end == per_rank[0] for end in per_rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_moments_of_a_torch_run_become_fp32(dtype: torch.dtype) -> None:
    def train(backend: Backend) -> None:
        reference = AdamW(parameters(dtype=dtype), lr=1e-2, eps=1e-2)  # the usual eps is 0 in fp16
        params = all_params(reference)
        for number in range(3):
            step(reference, gradients(params, 0, number))
        copies = [Parameter(p.detach().clone()) for p in params]
        optimizer = OnebitAdam(copies, freeze_step=5, backend=backend)
        optimizer.load_state_dict(through_a_file(reference.state_dict()))
        for copy, p in zip(copies, params, strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                assert bits(optimizer.state[copy][key]) == bits(reference.state[p][key].float())
        for number in range(3, 8):
            step(optimizer, gradients(copies, backend.rank, number))
        assert {s["exp_avg_sq"].dtype for s in optimizer.state.values()} == {torch.float32}
        assert all(bool(p.isfinite().all()) for p in copies)

    for world_size in (1, 2):
        run_threads(world_size, train)


def test_torch_can_take_over_a_state_of_ours() -> None:
    def train(backend: Backend) -> None:
        optimizer, reference = make_pair(backend, "betas and eps")
        for number in range(3):
            step(optimizer, gradients(all_params(optimizer), 0, number))
        saved = through_a_file(optimizer.state_dict())
        reference.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
        for p, q in zip(all_params(reference), all_params(optimizer), strict=True):
            with torch.no_grad():
                p.copy_(q)
        step(reference, gradients(all_params(reference), 0, 3))
        step(optimizer, gradients(all_params(optimizer), 0, 3))
        assert [bits(p) for p in all_params(optimizer)] == [bits(p) for p in all_params(reference)]

    run_threads(1, train)


def test_mean_of_is_a_mean() -> None:
    ranks = [[values(rank, shape=(50,)), None, None if rank else values(9, shape=(2,))] for rank in range(3)]
    mean, nothing, third = mean_of(ranks)
    assert nothing is None
    assert mean is not None
    assert third is not None
    exact = torch.stack([r[0].double() for r in ranks if r[0] is not None]).mean(0)
    # Three roundings of numbers below 10.
    torch.testing.assert_close(mean.double(), exact, rtol=0, atol=3 * UNIT * 10)
    torch.testing.assert_close(third, values(9, shape=(2,)) / 3)
