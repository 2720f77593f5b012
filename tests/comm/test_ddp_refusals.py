"""What a newcomer to onebit.comm.ddp gets wrong raises on every rank, changes nothing and names the mend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from onebit.comm import Backend, InputError, OnebitError
from onebit.comm.ddp import attach, compress_gradients
from onebit.optim import OnebitAdam
from tests.comm.ddp_runs import OPTIMIZERS, data, model, step
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits


def adam(params: Any, **options: Any) -> OnebitAdam:
    return OnebitAdam(params, freeze_step=3, **options)


def forgotten_by(make: Any, options: dict[str, Any]) -> Callable[[], None]:
    def forgotten() -> None:
        inner = model()
        step(DistributedDataParallel(inner), make(inner.parameters(), **options), data(dist.get_rank(), 0), 0)

    return forgotten


def forgotten_beside_another_hook() -> None:
    inner = model()
    called = DistributedDataParallel(inner)
    compress_gradients(called)
    step(called, adam(inner.parameters()), data(dist.get_rank(), 0), 0)


def not_wrapped() -> None:
    inner = model()
    attach(inner, adam(inner.parameters()))


def twice() -> None:
    inner = DistributedDataParallel(model())
    optimizer = adam(inner.parameters())
    attach(inner, optimizer)
    attach(inner, optimizer)


def second_optimizer() -> None:
    inner = DistributedDataParallel(model())
    attach(inner, adam(inner.parameters()))
    attach(inner, adam(inner.parameters()))


def second_model() -> None:
    inner = DistributedDataParallel(model())
    optimizer = adam(inner.parameters())
    attach(inner, optimizer)
    attach(DistributedDataParallel(model()), optimizer)


def hook_before() -> None:
    inner = DistributedDataParallel(model())
    inner.register_comm_hook(None, allreduce_hook)
    attach(inner, adam(inner.parameters()))


def compressed_twice() -> None:
    inner = DistributedDataParallel(model())
    compress_gradients(inner)
    compress_gradients(inner)


def compressed_unwrapped() -> None:
    compress_gradients(model())


def part_of_the_model() -> None:
    inner = model()
    attach(DistributedDataParallel(inner), adam(inner.hidden.parameters()))


def more_than_the_model() -> None:
    inner = model()
    attach(DistributedDataParallel(inner), adam([*inner.parameters(), *nn.Linear(7, 9).parameters()]))


def torchs_optimizer() -> None:
    inner = DistributedDataParallel(model())
    attach(inner, torch.optim.AdamW(inner.parameters()))  # type: ignore[arg-type]


def other_group() -> None:
    inner = DistributedDataParallel(model())
    attach(inner, adam(inner.parameters(), backend="single"))


def changed_between() -> None:
    inner = model()
    called = DistributedDataParallel(inner)
    optimizer = OnebitAdam(inner.parameters(), freeze_step=20)
    attach(called, optimizer)
    for number in range(3):
        step(called, optimizer, data(dist.get_rank(), number), number)
    called(data(dist.get_rank(), 3)).mean().backward()
    optimizer.param_groups[0]["freeze_step"] = 3
    before = bits(list(inner.parameters()))
    try:
        optimizer.step()
    finally:
        assert bits(list(inner.parameters())) == before


def late_scaler() -> None:
    inner = model()
    called = DistributedDataParallel(inner)
    optimizer = OnebitAdam(inner.parameters(), freeze_step=20)
    attach(called, optimizer)
    step(called, optimizer, data(dist.get_rank(), 0), 0)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(called(data(dist.get_rank(), 1)).mean()).backward()
    scaler.step(optimizer)


def lost_gradient() -> None:
    inner = model()
    called = DistributedDataParallel(inner)
    optimizer = OnebitAdam(inner.parameters(), freeze_step=20)
    attach(called, optimizer)
    step(called, optimizer, data(dist.get_rank(), 0), 0)
    optimizer.zero_grad()
    called(data(dist.get_rank(), 1)).mean().backward()
    if dist.get_rank() == 1:
        inner.out.bias.grad = None
    optimizer.step()


def wrong_state() -> None:
    compress_gradients(DistributedDataParallel(model())).load_state_dict({"step": 3})


def unfrozen() -> None:
    """A layer that was frozen when the model was wrapped is trained later, which DDP does not know."""
    inner = model()
    inner.conv.requires_grad_(False)
    called = DistributedDataParallel(inner)
    optimizer = OnebitAdam(inner.parameters(), freeze_step=20)
    attach(called, optimizer)
    step(called, optimizer, data(dist.get_rank(), 0), 0)
    step(called, optimizer, data(dist.get_rank(), 1), 1)
    inner.conv.requires_grad_(True)
    before = bits(list(inner.parameters()))
    try:
        step(called, optimizer, data(dist.get_rank(), 2), 2)
    finally:
        assert bits(list(inner.parameters())) == before


# What goes wrong, and what the error says: its class, what came and the mend.
MISTAKES: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "a hook of another kind": (
        forgotten_beside_another_hook,
        ("InputError", "attach(model, optimizer)", "instead of any other communication hook"),
    ),
    "a model that is not wrapped": (not_wrapped, ("InputError", "got Straight", "DistributedDataParallel(model)")),
    "the same twice": (twice, ("InputError", "has a communication hook already", "once")),
    "a second optimizer": (second_optimizer, ("InputError", "wrap the model anew")),
    "a second model": (second_model, ("InputError", "one optimizer per model")),
    "torch's hook first": (hook_before, ("InputError", "wrap the model anew")),
    "compressed twice": (compressed_twice, ("InputError", "has a communication hook already")),
    "compressed but not wrapped": (compressed_unwrapped, ("InputError", "init_process_group()")),
    "part of the model": (part_of_the_model, ("InputError", "'conv.weight'", "over model.parameters()")),
    "more than the model": (more_than_the_model, ("InputError", "2 parameters", "(9, 7)", "this model alone")),
    "torch's optimizer": (torchs_optimizer, ("InputError", "got AdamW", "compress_gradients(model)")),
    "another group": (other_group, ("InputError", "rank 0 of 1", "backend=model.process_group")),
    "an option changed": (changed_between, ("InputError", "were averaged", "between backward and step")),
    "a scaler that comes late": (late_scaler, ("InputError", "GradScaler", "call backward again")),
    "a gradient dropped on one rank": (lost_gradient, ("MismatchError", "on 1 of 2 ranks", "do not drop gradients")),
    "no state of a hook": (wrong_state, ("InputError", "made by state_dict()")),
    "a layer unfrozen later": (unfrozen, ("InputError", "parameter 0, of shape (5, 3, 3, 3)", "wrap the model anew")),
    **{
        f"{name} without attach": (forgotten_by(make, options), ("InputError", name, "attach(model, optimizer)"))
        for name, (make, options) in OPTIMIZERS.items()
    },
}


def all_mistakes(backend: Backend) -> dict[str, str]:
    """The messages, in one launch."""
    found = {}
    for name, (make, _) in MISTAKES.items():
        try:
            make()
        except OnebitError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@functools.cache
def messages() -> list[dict[str, str]]:
    return run_ranks("gloo", 2, all_mistakes)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_raises_on_every_rank_and_names_the_mend(name: str) -> None:
    for said in messages():
        for expected in MISTAKES[name][1]:
            assert expected in said.get(name, "no error")


def test_without_a_process_group_the_mend_begins_with_it() -> None:
    with pytest.raises(InputError, match=r"init_process_group\(\)"):
        not_wrapped()


def idle_wrapper(backend: Backend) -> bool:
    """A wrapper that is let go of does not keep its model from being trained without one."""
    inner = model()
    wrapped: Any = DistributedDataParallel(inner)
    wrapped.itself = [wrapped]  # a cycle, so that only the collector finds it
    del wrapped
    step(inner, adam(inner.parameters()), data(backend.rank, 0), 0)
    return True


def test_a_model_that_is_no_longer_wrapped_is_trained() -> None:
    assert run_ranks("gloo", 2, idle_wrapper) == [True, True]
