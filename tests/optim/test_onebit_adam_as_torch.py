"""OnebitAdam is used as torch's own optimizers are: closures, learning rates in tensors, gradients left as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam
from tests.comm.samples import bits
from tests.optim.samples import contents, gradients, parameters, step, values


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned() -> None:
    def train(backend: Backend) -> list[Any]:
        p = Parameter(values(0, shape=(50,)))
        target = values(1, backend.rank, shape=(50,))
        optimizer = OnebitAdam([p], freeze_step=2, backend=backend)
        calls = []

        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = ((p - target) ** 2).mean()
            loss.backward()
            calls.append(loss.item())
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        assert losses == calls
        assert p.grad is not None
        return contents(optimizer)

    def by_hand(backend: Backend) -> list[Any]:
        p = Parameter(values(0, shape=(50,)))
        optimizer = OnebitAdam([p], freeze_step=2, backend=backend)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            ((p - values(1, backend.rank, shape=(50,))) ** 2).mean().backward()
            optimizer.step()
        return contents(optimizer)

    assert run_threads(2, train) == run_threads(2, by_hand)


def test_a_learning_rate_in_a_tensor_acts_as_the_number_and_may_be_changed_in_place() -> None:
    def train(backend: Backend, tensor: bool) -> list[Any]:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=3, lr=torch.tensor(0.5) if tensor else 0.5, backend=backend)
        seen = []
        for number in range(8):
            if tensor:
                optimizer.param_groups[0]["lr"].fill_(0.5 / 2**number)
            else:
                optimizer.param_groups[0]["lr"] = 0.5 / 2**number
            step(optimizer, gradients(params, backend.rank, number))
            seen.append(contents(optimizer))
        return seen

    assert run_threads(2, train, True) == run_threads(2, train, False)


def test_gradients_are_not_changed_and_need_no_averaging() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=3, backend=backend, maximize=True, adamw_mode=False)
        for number in range(6):
            given = gradients(params, backend.rank, number)
            step(optimizer, given)
            assert bits([p.grad for p in params]) == bits(given)

    for world_size in (1, 2):
        run_threads(world_size, train)
