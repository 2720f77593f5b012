"""1-bit LAMB's compressed step by fused kernels: 1-bit Adam's, at rates that the device finds for every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce
from onebit.compress import SignCodec
from onebit.optim.fused import FusedMomentum, FusedStep, SettlingStep, of_part, row_major
from onebit.optim.kernels import StepKernels, step_kernels
from onebit.optim.known import Known
from onebit.optim.lamb import Layers
from onebit.optim.state_keys import FRESH_VARIANCE, VARIANCE


def lamb_kernels(device: torch.device, codec: SignCodec) -> StepKernels | None:
    """What encodes and updates, where there are kernels for LAMB's own part of a step as well; None: there are none."""
    kernels = step_kernels(device, codec)
    if kernels is None or kernels.name != "gpu":
        return None
    from onebit.optim.gpu.lamb import BLOCK

    return kernels if codec.block_size == BLOCK else None


class FusedLamb(FusedMomentum):
    """The averaged momentum of one group of `OnebitLamb`, and the rates of its tensors.

    Args:
        kernels: from `lamb_kernels`.
        reduce: the average of the momenta, over more than one rank.
        known: what is updated, one parameter per tensor of the average.
        layers: the group's.
    """

    shaped = (*FusedMomentum.shaped, FRESH_VARIANCE)

    def __init__(self, kernels: StepKernels, reduce: CompressedAllreduce, known: Known, layers: Layers) -> None:
        from onebit.optim.gpu.lamb import Measures

        super().__init__(kernels, reduce, known.states)
        self.layers = layers
        sizes = [known.params[i].numel() for i in self._filled]
        self.measures = Measures(sizes, [known.indices[i] for i in self._filled], self.steps.device)

    def exchange(self, group: Mapping[str, Any], known: Known, gradients: Sequence[Tensor | None]) -> FusedStep:
        return super().exchange({**group, "adamw_mode": True}, known, gradients)  # no decay in what is encoded

    def _kind_of_step(self, settles: bool) -> type[FusedStep]:
        return _SettlingLambStep if settles else _LambStep


class _LambStep(FusedStep):
    """One step: what `FusedStep` does, with scalars of the update that follow from what the average tells."""

    _average: FusedLamb

    def _count(self, made: Tensor | None) -> None:
        average, group, states = self._average, self._group, self._states
        for state in states:
            if FRESH_VARIANCE not in state:
                state[FRESH_VARIANCE] = state[VARIANCE].clone()
            state[FRESH_VARIANCE] = state[FRESH_VARIANCE].contiguous()
        variances, fresh = [s[VARIANCE] for s in states], [s[FRESH_VARIANCE] for s in states]
        values: Sequence[Tensor] = ()
        if group["weight_decay"]:
            pairs = zip(self._masters, self._params, strict=True)
            values = row_major([p if master is None else master for master, p in pairs])
        average.measures.begin(average.steps, average.variance_steps, group, made)
        for part in average.reduce.parts:
            average.measures.measure(
                part,
                average.first_row(part),
                average.source(part, states),
                of_part(part, variances),
                of_part(part, fresh),
                of_part(part, values) if values else (),
                group,
                made,
            )
        average.measures.finish(average.layers, average.scalars, group, made)


class _SettlingLambStep(_LambStep, SettlingStep):
    """One step whose fate the device decides."""
