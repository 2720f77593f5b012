"""The compressed optimizers with short schedules, so that a few steps meet every phase, and runs to save and resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter

from onebit.comm import Backend
from onebit.compress import SignCodec
from onebit.optim import CompressedOptimizer, OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.comm.samples import bits, state_bits
from tests.optim.samples import all_params, gradients, parameters, step

UNFUSED = SignCodec(kernels="reference")
STEPS = 12


@dataclass(frozen=True)
class Kind:
    """An optimizer to make, with the phase of each of its first STEPS steps on several ranks."""

    cls: type[CompressedOptimizer]
    options: Mapping[str, Any]
    phases: str = field(default="", compare=False)

    def make(self, backend: Backend, dtype: torch.dtype = torch.float32) -> CompressedOptimizer:
        """Two groups, with learning rates of their own."""
        params = parameters(dtype=dtype)
        groups = [{"params": params[:4], "lr": 2e-2}, {"params": params[4:]}]
        return self.cls(groups, lr=1e-2, backend=backend, **self.options)  # type: ignore[call-arg]


ADAM = {"freeze_step": 3}
ZERO_ONE = {"var_freeze_step": 4, "var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4}

# w: warm-up, c: compressed, r: refresh, v: variance, s: synchronised, l: local.
KINDS: dict[str, Kind] = {
    "OnebitAdam": Kind(OnebitAdam, ADAM, "wwwccccccccc"),
    "OnebitAdam, refreshed": Kind(OnebitAdam, {**ADAM, "variance_refresh": 3, "adamw_mode": False}, "wwwccrccrccr"),
    "OnebitAdam, auto": Kind(OnebitAdam, {"freeze_step": "auto", "betas": (0.9, 0.6)}),
    "OnebitAdam, unfused": Kind(OnebitAdam, {**ADAM, "codec": UNFUSED}, "wwwccccccccc"),
    "ZeroOneAdam": Kind(ZeroOneAdam, ZERO_ONE, "vvvssslsllls"),
    "ZeroOneAdam, unfused": Kind(ZeroOneAdam, {**ZERO_ONE, "codec": UNFUSED}, "vvvssslsllls"),
    "OnebitLamb": Kind(OnebitLamb, ADAM, "wwwccccccccc"),
}


def advance(optimizer: CompressedOptimizer, rank: int, first: int, last: int, bad: int | None = None) -> list[Any]:
    """Make steps `first` to `last` - 1; returns everything there is after each, bit by bit.

    Args:
        bad: a step in which rank 0 has an infinite gradient.
    """
    seen = []
    for number in range(first, last):
        given = gradients(all_params(optimizer), rank, number)
        if number == bad and rank == 0:
            given[0].view(-1)[3] = math.inf  # type: ignore[union-attr]
        step(optimizer, given)
        seen.append(everything(optimizer))
    return seen


def everything(optimizer: CompressedOptimizer) -> Any:
    """Parameters and the whole state of this rank, bit by bit."""
    return [bits(p) for p in all_params(optimizer)], state_bits(optimizer.state_dict())


def put(params: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """As `model.load_state_dict` does."""
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def copies(optimizer: CompressedOptimizer) -> list[torch.Tensor]:
    """The values of the parameters, as `model.state_dict` would give them to a file."""
    return [p.detach().clone() for p in all_params(optimizer)]


def model(optimizer: CompressedOptimizer) -> list[Parameter]:
    """The parameters."""
    return [p for p in all_params(optimizer) if isinstance(p, Parameter)]
