"""Two runs of `OnebitLamb`, step by step: no further apart than their own roundings account for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebit.optim import OnebitLamb
from onebit.optim.lamb import has_factor
from onebit.optim.moments import corrections
from tests.optim.samples import step

UNIT = 2.0**-24  # one rounding to fp32, relative

# Fused steps without r round x·keep, and what the move leaves of it, and keep by half of that, for it is more than 0.5.
# Fused steps with r round x once, and so do torch's.
OF_VALUE = 3.5
# On the way to rate·m/d. Fused: a correction, the scale, a root, its correction twice, ε twice and a quotient, then c̄;
# or with r a sum with decay, the rate and what it gives. By torch: a root, its correction twice, ε twice, a quotient,
# a correction twice, a sum, c̄·r, lr twice, what the rate gives.
OF_MOVE = 11 + 13
# On the way to rate·λ·x. Fused: lr·λ, c̄; or with r λ twice, a sum, the rate and what it gives. By torch: λ twice, a
# sum, c̄·r, lr twice, what the rate gives.
OF_DECAY = 5 + 7
# Of a step's momentum: a product, two sums, what is left over and a scale; then a mean, a sum, what is left over and a
# scale. What is left over hands them on, so that they add up. A bit told the other way round is 3·10⁷ roundings.
OF_MOMENTUM = 9


@dataclass(frozen=True)
class Seen:
    """What one rank had after a step, per parameter; to see it waits for no device.

    Attributes:
        values: copies.
        momenta: the averaged ones of a compressed step.
        pushes: how far such a step moves an element whose momentum is 1, in fp64; where torch's operations make it.
        rates: lr·c·r of the step, (k,) fp64.
    """

    values: list[Tensor]
    momenta: list[Tensor]
    pushes: list[Tensor]
    rates: Tensor


def path_of(
    optimizer: OnebitLamb, params: Sequence[Tensor], given: Callable[[int], Sequence[Tensor | None]], steps: int
) -> list[Seen]:
    """Make steps on one rank, with all parameters in one group, and see what each has made."""
    seen = []
    for number in range(steps):
        factor = optimizer.lamb_coefficients()["factor"]
        step(optimizer, given(number))
        seen.append(_seen(optimizer, params, factor, number >= optimizer.param_groups[0]["freeze_step"]))
    return seen


def _seen(optimizer: OnebitLamb, params: Sequence[Tensor], factor: Tensor, compressed: bool) -> Seen:
    group, states = optimizer.param_groups[0], [optimizer.state[p] for p in params]
    rates = optimizer.lamb_coefficients()["coeff"].double() * factor * group["lr"]
    momenta: list[Tensor] = []
    pushes: list[Tensor] = []
    if compressed and optimizer.kernels == "torch":
        momenta = [state["exp_avg"].clone() for state in states]
        for state, rate in zip(states, rates, strict=True):
            up, root = corrections(state, group)
            pushes.append(rate * up / (state["exp_avg_sq"].double().sqrt() / root + group["eps"]))
    elif compressed:
        (fused,) = optimizer._fused.values()
        momenta = [state["exp_avg"] for state in fused.unfused(params, states)]
    return Seen([p.detach().clone() for p in params], momenta, pushes, rates)


def assert_together(fused: Sequence[Seen], by_torch: Sequence[Seen], group: Mapping[str, Any]) -> None:
    """Hold the fused steps to those of torch's operations, which have had the same gradients.

    Warm-up is the same code. After it the values may be apart by their roundings so far, by what the momenta differ in,
    times how far they push, and by what r differs in; the momenta by their own roundings; r by 10⁻⁴ of it. Each element
    has a bound of its own along its way, for one that passes 0 still has the roundings of what it was. Measured: up to
    0.6 of what is allowed to values, most in the first step, and 0.3 to momenta.

    Args:
        group: options of both.
    """
    most_of_rate = 1e-4 if has_factor(group) else 0.0
    most = [torch.zeros_like(x, dtype=torch.float64) for x in by_torch[0].values]
    largest, averages = [0.0] * len(most), 0
    for number, (one, other) in enumerate(zip(fused, by_torch, strict=True)):
        torch.testing.assert_close(one.rates, other.rates, rtol=most_of_rate, atol=0.0)
        apart = (one.rates / other.rates - 1).abs()
        averages += bool(other.momenta)
        for i in range(len(most)):
            x, y = one.values[i].double(), other.values[i].double()
            if not x.numel():
                continue
            told = f"step {number}, rates {float(one.rates[i])!r} and {float(other.rates[i])!r}"
            if other.momenta:
                before = by_torch[number - 1].values[i].double().abs()
                m, n, push = one.momenta[i].double(), other.momenta[i].double(), other.pushes[i]
                largest[i] = max(largest[i], float(n.abs().max()))
                rounded = torch.full_like(n, averages * OF_MOMENTUM * UNIT * largest[i])
                _assert_within(m, n, rounded, f"momentum {i}", told)
                move, decay = n.abs() * push, other.rates[i] * group["weight_decay"] * before
                most[i] += UNIT * (OF_VALUE * y.abs().maximum(before) + OF_MOVE * move + OF_DECAY * decay)
                most[i] += (m - n).abs() * push + apart[i] * (move + decay)
                told += f", momenta up to {float((m - n).abs().max() / largest[i]) / UNIT:.2f} roundings apart"
            _assert_within(x, y, most[i], f"parameter {i}", told)


def _assert_within(found: Tensor, wanted: Tensor, most: Tensor, what: str, told: str) -> None:
    over = (found - wanted).abs() - most
    if bool((over <= 0).all()):
        return
    at = int(over.nan_to_num(torch.inf).argmax())
    x, y, allowed = (float(t.flatten()[at]) for t in (found, wanted, most))
    raise AssertionError(
        f"{what}, {told}: element {at} of shape {tuple(wanted.shape)} is {x!r}, by torch's operations {y!r}: "
        f"{abs(x - y)!r} apart where {allowed!r} is allowed; so are {int((~(over <= 0)).sum())} elements in all; the "
        f"tensor's norms are {float(found.norm())!r} and {float(wanted.norm())!r}"
    )
