"""Runs of OnebitLamb with a schedule of its learning rate, and all that there is to see of them, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitLamb
from tests.comm.samples import bits
from tests.optim.samples import Gradients, contents, gradients, parameters, rate, step

SOON: dict[str, Any] = {"freeze_step": 4, "lr": 1e-2}

PUBLISHED = {"factor_min": 0.5, "factor_max": 4.0}


def train(
    backend: Backend,
    steps: int,
    observe: Callable[[OnebitLamb], Any],
    given: Callable[[Sequence[Tensor], int, int], Gradients] = gradients,
    start: Callable[[], list[Parameter]] = parameters,
    every: int = 1,
    **options: Any,
) -> list[Any]:
    """Make steps on one rank; returns what was observed after each, or after every so many."""
    params = start()
    optimizer = OnebitLamb(params, backend=backend, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    seen = []
    for number in range(steps):
        step(optimizer, given(params, backend.rank, number))
        scheduler.step()
        if number % every == every - 1:
            seen.append(observe(optimizer))
    return seen


def of_threads(world_size: int, *args: Any, **options: Any) -> list[list[Any]]:
    """What every rank observed."""
    return run_threads(world_size, lambda backend: train(backend, *args, **options))


def everything(optimizer: OnebitLamb) -> Any:
    """Parameters, state and what is told of it, bit by bit."""
    return contents(optimizer), bits(list(optimizer.lamb_coefficients().values()))
