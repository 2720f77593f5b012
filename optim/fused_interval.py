"""The step at whose end ranks meet after an interval of 0/1 Adam, by the fused kernels of 1-bit Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.comm import Part
from onebit.optim.fused import FusedMomentum, FusedStep, of_part
from onebit.optim.kernels import Momentum
from onebit.optim.known import Known
from onebit.optim.local_steps import MEAN, START, Reach, end, starts_of


class FusedInterval(FusedStep):
    """Averages the mean momentum of an interval, this step included, and moves the parameters from its start.

    With w the share of this step, the mean is (1-w)·a + w·(β₁·m + (1-β₁)·g). What does not need g is worked out first;
    then it has the form of a local momentum, which the kernel encodes. For the update a start is what a master is.

    Args:
        average, group, known, gradients: as for `FusedStep`; weight decay is decoupled.
        reach: this step included, with one share for all parameters.
    """

    def __init__(
        self,
        average: FusedMomentum,
        group: Mapping[str, Any],
        known: Known,
        gradients: Sequence[Tensor | None],
        reach: Reach,
    ) -> None:
        states = known.states
        for state in states:
            for key in (MEAN, START, "master"):
                if key in state:
                    state[key] = state[key].contiguous()
        average._take_over(known)
        self._reach = reach
        share, beta1 = reach.shares[0], group["betas"][0]
        self._rest = list(torch._foreach_mul([s["exp_avg"] for s in states], share * beta1))
        torch._foreach_add_(self._rest, [s[MEAN] for s in states], alpha=1 - share)
        super().__init__(average, group, known, gradients)

    def _local_factors(self) -> dict[str, Any]:
        factors = super()._local_factors()
        return {**factors, "beta1": 1.0, "alpha": self._reach.shares[0] * factors["alpha"]}

    def _fp32_copies(self) -> list[Tensor | None]:
        return list(starts_of(self._states))

    def _momentum(self, part: Part) -> Momentum:
        return of_part(part, self._rest)

    def _count(self, made: Tensor | None) -> None:
        reach, filled = self._reach, self._average._filled
        rows = [(reach.rates[i], 1 / reach.roots[i], reach.kept[i]) for i in filled]
        numbers = torch.tensor(rows).view(-1, 3)
        self._average.steps.add_(1.0)
        scalars = self._average.scalars
        scalars.copy_(numbers.pin_memory() if scalars.is_cuda else numbers, non_blocking=True)

    def commit(self) -> None:
        super().commit()
        end(self._states)
