"""What a rank does between two synchronisations, and at one, as passes over lists of tensors.

An interval starts where the ranks last met. Its state is, per parameter: y, the value then; a, the mean of the momenta
since, weighted by their rates γ; and two numbers, Σγ and the product of the decoupled weight decays. In between a
parameter is a function of these, x = kept·y - Σγ·a / (√v/root + ε), never of its own last value; so when all ranks have
one a, they have one x to the last bit.

The published form accumulates u = Σγ·m = Σγ·a. The mean needs no division that could be by 0, cannot overflow, and
leaves error feedback in units of momentum, so what was not said at one learning rate is no blow at a smaller one.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebit.optim.known import Counts
from onebit.optim.master import fp32_values, write_back
from onebit.optim.moments import corrections

MEAN, START, RATE, KEPT = "interval_mean", "interval_start", "interval_rate", "interval_kept"


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far a list of parameters has come since the ranks last met, one number per parameter.

    Attributes:
        rates: Σγ, with γ = lr / (1 - β₁ᵗ).
        kept: the product of 1 - lr·λ.
        roots: √(1 - β₂ᵏ) of a variance updated k times.
        shares: that of the latest momentum in the mean of all.
        alike: all parameters have come equally far.
    """

    rates: list[float]
    kept: list[float]
    roots: list[float]
    shares: list[float]
    alike: bool

    @staticmethod
    def of(states: Sequence[Mapping[str, Any]], counts: Counts, group: Mapping[str, Any], *, steps: int = 1) -> Reach:
        """The reach of parameters with these states and counts when `steps`, 0 or 1, more steps have been made."""
        lr = float(group["lr"]) if steps else 0.0
        keep = 1 - lr * group["weight_decay"] if group["adamw_mode"] else 1.0
        columns = [*counts, [s.get(RATE, 0.0) for s in states], [s.get(KEPT, 1.0) for s in states]]
        alike = bool(states) and all(column.count(column[0]) == len(column) for column in columns)
        reached: list[list[float]] = [[], [], [], []]
        for step, variance_step, rate, kept in zip(*(c[:1] if alike else c for c in columns), strict=True):
            correction, root = corrections({"step": step + steps, "variance_step": variance_step}, group)
            rate += lr * correction
            share = lr * correction / rate if rate else 1.0
            for column, number in zip(reached, (rate, kept * keep, root, share), strict=True):
                column.append(number)
        rates, kepts, roots, shares = (column * len(states) if alike else column for column in reached)
        return Reach(rates=rates, kept=kepts, roots=roots, shares=shares, alike=alike)


def is_open(states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some parameter has made local steps since the ranks last met."""
    return any(RATE in state for state in states)


def begin(params: Sequence[Tensor], states: Sequence[MutableMapping[str, Any]], group: Mapping[str, Any]) -> None:
    """Remember the values of parameters, where the ranks last met; a master is that already and stays as it is."""
    for p, value, state in zip(params, fp32_values(params, states, group), states, strict=True):
        if value is not state.get("master"):
            state[START] = value.clone() if value is p else value


def end(states: Sequence[MutableMapping[str, Any]]) -> None:
    """Forget an interval, if there is one."""
    for state in states:
        for key in (MEAN, START, RATE, KEPT):
            state.pop(key, None)


def starts_of(states: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """What an interval started at, fp32."""
    return [state[START] if START in state else state["master"] for state in states]


def local_step(
    params: Sequence[Tensor],
    starts: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    reach: Reach,
    eps: float,
) -> None:
    """Move the parameters of this rank to where the mean of its own momenta leads from where the ranks last met.

    Args:
        params: fp32, bf16 or fp16; overwritten.
        starts: y, fp32.
        means, variances, reach, eps: as for `move`, this step included.
    """
    values = [p if p.dtype == torch.float32 else torch.empty_like(y) for p, y in zip(params, starts, strict=True)]
    torch._foreach_copy_(values, starts)
    move(values, means, variances, reach, eps)
    write_back(params, values)


def move(values: list[Tensor], means: list[Tensor], variances: list[Tensor], reach: Reach, eps: float) -> None:
    """x <- kept·x - Σγ·a / (√v/root + ε), in place.

    Args:
        values: x, fp32, as it was when the ranks last met.
        means: a, fp32.
        variances: v, fp32.
        reach: of the parameters.
        eps: ε.
    """
    spread = torch._foreach_sqrt(variances)
    torch._foreach_div_(spread, reach.roots)
    torch._foreach_add_(spread, eps)
    if any(kept != 1 for kept in reach.kept):
        torch._foreach_mul_(values, reach.kept)
    torch._foreach_addcdiv_(values, means, spread, [-rate for rate in reach.rates])
