"""1-bit LAMB's compressed step without its factor, by fused kernels: 1-bit Adam's with a learning rate per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from onebit.comm import CompressedAllreduce
from onebit.optim import lamb
from onebit.optim.fused import FusedMomentum, FusedStep, SettlingStep, States
from onebit.optim.kernels import StepKernels
from onebit.optim.known import Known


class FusedRates(FusedMomentum):
    """The averaged momentum of one group of `OnebitLamb` whose steps have no factor r.

    Args:
        kernels: what encodes and updates.
        reduce: the average of the momenta, over more than one rank.
        known: what is updated, one parameter per tensor of the average.
        layers: the group's.
    """

    def __init__(self, kernels: StepKernels, reduce: CompressedAllreduce, known: Known, layers: lamb.Layers) -> None:
        super().__init__(kernels, reduce)
        self._layers = layers
        self._places = layers.rows([known.indices[i] for i in self._filled])

    def exchange(self, group: Mapping[str, Any], known: Known, gradients: Sequence[Tensor | None]) -> FusedStep:
        return super().exchange({**group, "adamw_mode": True}, known, gradients)  # no decay in what is encoded

    def keep(self, states: States) -> None:
        if not self.averaged:
            lamb.forget_factor(states, self._layers, self._places)
        super().keep(states)

    def set_rates(self, group: Mapping[str, Any]) -> None:
        """Make `scalars`, written for a learning rate of lr, those of lr·c̄."""
        self._layers.freeze(self._places)
        coeff = self._layers.coeff[self._places]
        self.scalars[:, 0] *= coeff
        self.scalars[:, 2] = 1.0 - coeff * (group["lr"] * group["weight_decay"])

    def _kind_of_step(self, settles: bool) -> type[FusedStep]:
        return _SettlingStep if settles else _Step


class _Step(FusedStep):
    """One step: what `FusedStep` does, at each tensor's own rate."""

    _average: FusedRates

    def _count(self, made: Tensor | None) -> None:
        super()._count(made)
        self._average.set_rates(self._group)


class _SettlingStep(_Step, SettlingStep):
    """One step whose fate the device decides."""
