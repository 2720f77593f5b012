"""The fused step where every rank of a node holds and updates a slice of the state: whole steps, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce, Part
from onebit.comm.shared_node import SHARED
from onebit.comm.slice_rows import SliceRow, copy_all
from onebit.comm.slices import run_of
from onebit.optim.fused import FusedMomentum, FusedStep, States, of_part, row_major
from onebit.optim.kernels import Momentum, StepKernels
from onebit.optim.known import Known
from onebit.optim.slices import GroupSlices
from onebit.optim.state_keys import MASTER, MOMENTUM, VARIANCE


class SlicedMomentum(FusedMomentum):
    """The averaged momentum of a group whose states hold slices; as payloads it is whole on every rank.

    Args:
        kernels: what makes the node's mean, and updates.
        reduce: the average of the momenta, on two levels.
        slices: of the parameters whose momenta they are.

    Attributes:
        memory: where the ranks of the node find each other's moved slices, if they share memory; kept between steps.
    """

    def __init__(self, kernels: StepKernels, reduce: CompressedAllreduce, slices: GroupSlices) -> None:
        super().__init__(kernels, reduce)
        self.slices = slices
        shares = reduce.local_transport == SHARED
        self.memory = slices.dealt.share_rows(dict(enumerate(slices.params))) if shares else None

    def _kind_of_step(self, settles: bool) -> type[FusedStep]:
        return SlicedStep  # the host decides: ranks need each other once more in a step that is to be made

    def _write_momenta(self, params: Sequence[Tensor], states: States) -> None:
        if self.averaged:
            operators = self.reduce.codec.unchecked(self.steps.device)
            for state, momentum in zip(states, self.slices.dealt.decode(operators, self.parts), strict=True):
                state[MOMENTUM] = momentum


class SlicedStep(FusedStep):
    """One compressed step, drafted on this rank's slices: until `commit` nothing but error feedback is changed."""

    _average: SlicedMomentum

    def __init__(
        self,
        average: SlicedMomentum,
        group: Mapping[str, Any],
        known: Known,
        gradients: Sequence[Tensor | None],
    ) -> None:
        self._whole_rows: Sequence[Tensor] = []
        self._flat: dict[int, Tensor] = {}
        self._moved: list[SliceRow] = []
        self._targets: list[list[Tensor]] = []
        self._sources: list[list[Tensor]] = []
        self._variances: list[list[Tensor]] = []
        self._whole: list[Tensor] = []  # the momentum, where it is in slices of fp32, as after warm-up
        if not average.averaged:
            self._whole = average.slices.whole(known.params, [state[MOMENTUM] for state in known.states])
        super().__init__(average, group, known, gradients)

    def all_finite(self) -> Tensor:
        """0-dim bool, the same on every rank."""
        finite = super().all_finite()
        self._prepare()  # while the device is busy with the exchange
        return finite

    def draft(self) -> None:
        """Make the step beside what there is; collective inside the node."""
        average = self._average
        with average.reduce.stats.stage("update", average.reduce.backend):
            self._count_in(average.steps.clone(), None)
            self._masters = self._new_masters()
            self._move_slices()
        for row in self._moved:
            row.exchange()

    def _prepare(self) -> None:
        """Find where this rank's slices of the parameters are, and where others will get the moved ones from."""
        average, dealt = self._average, self._average.slices.dealt
        self._whole_rows = row_major(self._params)
        self._flat = {i: row.view(-1) for i, row in enumerate(self._whole_rows)}
        self._moved = list(dealt.rows(dict(enumerate(self._params)), average.memory))
        self._targets = [row.open() for row in self._moved]
        self._sources = [[run_of(self._flat[i], offset, numel) for i, offset, numel in runs] for runs in dealt.runs]
        self._variances = dealt.pieces({i: state[VARIANCE] for i, state in enumerate(self._states)})

    def _move_slices(self) -> None:
        """Fill what others get: this rank's slices of the parameters, moved."""
        average, dealt = self._average, self._average.slices.dealt
        pieces = zip(
            dealt.own(average.reduce.parts),
            dealt.runs,
            self._targets,
            self._sources,
            dealt.pieces(dict(enumerate(self._masters))),
            self._variances,
            strict=True,
        )
        for part, runs, params, sources, masters, variances in pieces:
            copy_all(params, sources)
            if runs:
                scalars = average.rows([tensor for tensor, _, _ in runs])
                self._kernels.decode_update(
                    part, params, masters, variances, part.gathered, scalars, eps=self._group["eps"]
                )
        self._targets = []  # what is sent is let go when it is

    def _move(self, made: Tensor | None) -> None:
        average = self._average
        average.steps.add_(1.0)
        for row in self._moved:
            row.write(self._flat)
        self._write_back(self._whole_rows)
        for state, master in zip(self._states, self._masters, strict=True):
            if master is not None:
                state[MASTER] = master
        for part in average.reduce.parts:
            average.payload(part).copy_(part.gathered)
        average.keep(self._states)

    def _momentum(self, part: Part) -> Momentum:
        return self._average.payload(part) if self._average.averaged else of_part(part, self._whole)

    def _fp32_copies(self) -> Sequence[Tensor | None]:
        return [None] * len(self._params)  # decay in the gradient, which would read them whole, has none

    def _new_masters(self) -> Sequence[Tensor | None]:
        """Copies of the slices of the masters, to be updated."""
        if not self._group["master_weights"]:
            return self._masters
        cut = self._average.slices.cut
        return [
            None if p.dtype == torch.float32 else state[MASTER].clone() if MASTER in state else cut([p], [p])[0].float()
            for p, state in zip(self._params, self._states, strict=True)
        ]
