"""Runs of ZeroOneAdam on a short schedule that meets every kind of step, and the gradients that they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend
from onebit.optim import ZeroOneAdam
from tests.optim import samples
from tests.optim.samples import Gradients, all_params, gradients, parameters, patchy

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
    return samples.run(backend, steps, observe, given, start, options, ZeroOneAdam)


def saved(optimizer: ZeroOneAdam) -> list[dict[str, Any]]:
    """The state of every parameter as it would be saved."""
    states = optimizer.state_dict()["state"]
    return [states.get(i, {}) for i in range(len(all_params(optimizer)))]


def mostly(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
    """Gradients of which some are None; in the first step none is."""
    return patchy(params, rank, number) if number else gradients(params, rank, number)


def spoiled(params: Sequence[Tensor], rank: int, number: int, bad: float, at: Sequence[int]) -> Gradients:
    """Gradients of which rank 1 has a bad number at these steps."""
    made = gradients(params, rank, number)
    if rank == 1 and number in at:
        made[0].view(-1)[3] = bad  # type: ignore[union-attr]
    return made
