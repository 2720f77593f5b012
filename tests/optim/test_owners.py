"""Two optimizers on one parameter are found out at the first step that the earlier one makes after the later one's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from onebit.comm import Backend, InputError, run_threads
from onebit.optim import CompressedOptimizer, OnebitAdam, ZeroOneAdam


def parameters(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(1.0, 4.0 + i)) for i in range(count)]


def step(optimizer: CompressedOptimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def test_two_optimizers_that_take_turns_are_found_out_and_nothing_is_changed() -> None:
    params = parameters()
    one = OnebitAdam(params, freeze_step=2)
    other = ZeroOneAdam(params[1:], var_freeze_step=2)
    step(one)
    step(other)
    before = values(params)
    with pytest.raises(InputError, match=r"rank 0: OnebitAdam.step: another optimizer, ZeroOneAdam, .* give every"):
        step(one)
    assert all(torch.equal(a, b) for a, b in zip(before, values(params), strict=True))
    assert one.param_groups[0]["step"] == 1
    step(other)  # the later one goes on


def test_every_rank_hears_of_it() -> None:
    def both(backend: Backend) -> str:
        params = parameters()
        one, other = (OnebitAdam(params, freeze_step=1, backend=backend) for _ in range(2))
        step(one)
        step(other)
        with pytest.raises(InputError) as error:
            step(one)
        return str(error.value).partition(":")[0]

    assert run_threads(2, both) == ["rank 0", "rank 1"]


def test_an_optimizer_that_was_replaced_and_is_still_held_does_no_harm() -> None:
    params = parameters()
    old = OnebitAdam(params, freeze_step=1)
    step(old)
    new = OnebitAdam(params, freeze_step=1)
    new.load_state_dict(old.state_dict())
    step(new)
    step(new)
    assert new.param_groups[0]["step"] == 3


def test_one_that_nobody_holds_any_more_does_not_count() -> None:
    params = parameters()
    first = OnebitAdam(params, freeze_step=1)
    step(first)
    tried = OnebitAdam(params, freeze_step=1)
    schedule = torch.optim.lr_scheduler.ConstantLR(tried)  # it and the optimizer hold each other
    step(tried)
    gone = weakref.ref(tried)
    del tried, schedule
    step(first)
    assert gone() is None
    assert first.param_groups[0]["step"] == 2


def test_optimizers_of_different_parameters_do_not_meet() -> None:
    params = parameters(4)
    halves = [OnebitAdam(params[:2], freeze_step=1), OnebitAdam(params[2:], freeze_step=1)]
    for _ in range(3):
        for optimizer in halves:
            step(optimizer)


def test_a_group_added_later_is_looked_at_too() -> None:
    params = parameters()
    one, other = OnebitAdam(params[:1], freeze_step=1), OnebitAdam(params[1:], freeze_step=1)
    step(one)
    step(other)
    other.add_param_group({"params": params[:1]})
    step(other)
    with pytest.raises(InputError, match="two would update them"):
        step(one)


def test_parameters_and_optimizers_are_let_go() -> None:
    params = parameters()
    optimizer = OnebitAdam(params, freeze_step=1)
    step(optimizer)
    held = [weakref.ref(params[0]), weakref.ref(optimizer)]
    del params, optimizer
    gc.collect()
    assert [reference() for reference in held] == [None, None]
