"""1-bit LAMB's compressed step by fused kernels: 1-bit Adam's, with an update that finds every tensor's next rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce, Part
from onebit.compress import Codec
from onebit.optim.fused import FusedMomentum, FusedStep, SettlingStep, of_part
from onebit.optim.kernels import StepKernels, step_kernels
from onebit.optim.known import Known
from onebit.optim.lamb import Layers
from onebit.optim.state_keys import FRESH_VARIANCE, VARIANCE


def lamb_kernels(device: torch.device, codec: Codec) -> StepKernels | None:
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
        from onebit.optim.gpu.lamb import LayerwiseUpdate

        super().__init__(kernels, reduce)
        self.layers = layers
        sizes = [known.params[i].numel() for i in self._filled]
        self.layerwise = LayerwiseUpdate(sizes, [known.indices[i] for i in self._filled], self.steps.device)

    def exchange(self, group: Mapping[str, Any], known: Known, gradients: Sequence[Tensor | None]) -> FusedStep:
        return super().exchange({**group, "adamw_mode": True}, known, gradients)  # no decay in what is encoded

    def _kind_of_step(self, settles: bool) -> type[FusedStep]:
        return _SettlingLambStep if settles else _LambStep


class _LambStep(FusedStep):
    """One step: what `FusedStep` does, but for the update, which starts v′ where there is none and measures it."""

    _average: FusedLamb

    def _move(self, made: Tensor | None) -> None:
        for state in self._states:
            if FRESH_VARIANCE not in state:
                state[FRESH_VARIANCE] = state[VARIANCE].clone()
            state[FRESH_VARIANCE] = state[FRESH_VARIANCE].contiguous()
        super()._move(made)
        self._average.layerwise.finish(self._average.layers, self._group, made)

    def _count(self, made: Tensor | None) -> None:
        average = self._average
        average.layerwise.begin(average.steps, average.variance_steps, average.layers, self._group, made)

    def _move_part(
        self, part: Part, params: Sequence[Tensor], variances: Sequence[Tensor], made: Tensor | None
    ) -> None:
        average, states = self._average, self._states
        average.layerwise.update(
            part,
            average.first_row(part),
            params,
            of_part(part, self._masters),
            variances,
            of_part(part, [state[FRESH_VARIANCE] for state in states]),
            average.source(part, states),
            average.payload(part),
            self._group,
            made,
        )


class _SettlingLambStep(_LambStep, SettlingStep):
    """One step whose fate the device decides."""
