"""1-bit Adam's compressed step by fused kernels: the averaged momentum stays signs and scales from step to step."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce, CompressedWork, Part
from onebit.compress.kernels import DTYPES
from onebit.optim.exchange import CompressedSending
from onebit.optim.fused_levels import step_kernels_of
from onebit.optim.kernels import Momentum, StepKernels
from onebit.optim.known import Known
from onebit.optim.master import fp32_values

States = Sequence[MutableMapping[str, Any]]
Row = TypeVar("Row", Tensor, Tensor | None)
Item = TypeVar("Item")


class FusedMomentum:
    """The averaged momentum of one group, and what its fused steps need between them.

    After an average the momentum is what every rank has received: 1 bit per element and a scale per block. It is kept
    so, and ``state["exp_avg"]`` is dropped; `unfused` makes it anew, and a step from the one equals a step from the
    other bit for bit. Buffers keep their addresses.

    Args:
        kernels: what encodes and updates.
        reduce: the average of the momenta, over more than one rank.

    Attributes:
        settles: steps after the first leave it to the device whether they are made.
        averaged: the momentum is payloads now; else the states hold it.
        steps, variance_steps: (k,) fp32, counts of the k tensors that have elements, on their device.
        scalars: (k, 3) fp32; see `StepKernels.decode_update`.
        shaped: what a state holds that has the shape of its parameter.
    """

    shaped: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "master")

    def __init__(self, kernels: StepKernels, reduce: CompressedAllreduce) -> None:
        self.kernels = step_kernels_of(kernels, reduce)
        self.reduce = reduce
        device = reduce.parts[0].gathered.device
        self.settles = device.type == "cuda"
        # A part uses neighbours, for only tensors without elements are in no part: its rows are a slice.
        self._filled = sorted({i for part in reduce.parts for i in part.used})
        self._row = {index: row for row, index in enumerate(self._filled)}
        self._counts = torch.zeros(2, len(self._filled), device=device)
        self.steps, self.variance_steps = self._counts
        self.scalars = torch.zeros(len(self._filled), 3, device=device)
        self._payloads = {part.gathered.data_ptr(): torch.zeros_like(part.gathered) for part in reduce.parts}
        self.averaged = False

    def exchange(self, group: Mapping[str, Any], known: Known, gradients: Sequence[Tensor | None]) -> FusedStep:
        """Send and receive one step; arguments as for `FusedStep`."""
        if not self.averaged:
            self._take_over(known)
        settles = self.settles and self.averaged  # else the host must know whether the momentum is still in fp32
        return self._kind_of_step(settles)(self, group, known, gradients)

    def source(self, part: Part, states: States) -> Momentum:
        """The momentum that a step starts from."""
        return self.payload(part) if self.averaged else of_part(part, [state["exp_avg"] for state in states])

    @property
    def parts(self) -> list[Part]:
        """Those of the average, as if the momentum that is kept as payloads had come just now."""
        return [replace(part, gathered=self.payload(part)) for part in self.reduce.parts]

    def payload(self, part: Part) -> Tensor:
        """Where the averaged momentum of a part is kept, as payloads."""
        return self._payloads[part.gathered.data_ptr()]

    def rows(self, used: Sequence[int]) -> Tensor:
        """The rows of `scalars` that belong to the tensors that a part, or a slice of one, uses."""
        return self.scalars[self._row[used[0]] : self._row[used[-1]] + 1]

    def first_row(self, part: Part) -> int:
        """Which row of `scalars` belongs to a part's first tensor."""
        return self._row[part.used[0]]

    def keep(self, states: States) -> None:
        """From now on the payloads are the momentum."""
        if not self.averaged:
            self.averaged = True
            for state in states:
                del state["exp_avg"]

    def unfused(self, params: Sequence[Tensor], states: States) -> list[dict[str, Any]]:
        """Return the states as they would be without fused kernels: with ``exp_avg``, and the parameters' strides.

        The masks of the average must be those of its last step.
        """
        whole = [dict(state) for state in states]
        self._write_momenta(params, whole)
        return whole

    def release(self, params: Sequence[Tensor], states: States) -> None:
        """Give the momentum back to the states; the next step starts from what they hold then."""
        self._write_momenta(params, states)
        self.averaged = False

    def _write_momenta(self, params: Sequence[Tensor], states: States) -> None:
        """Make states whole: with ``exp_avg``, and the parameters' strides."""
        if self.averaged:
            momenta = [torch.empty(p.shape, device=p.device) for p in params]
            for part in self.reduce.parts:
                used = [momenta[i] for i in part.used]
                self.reduce.codec.decode(self.payload(part), used, layout=part.layout, mask=part.mask)
            for state, momentum in zip(states, momenta, strict=True):
                state["exp_avg"] = momentum
        for p, state in zip(params, states, strict=True):
            for key in self.shaped:
                if key in state and state[key].stride() != p.stride():
                    state[key] = torch.empty_like(p, dtype=state[key].dtype).copy_(state[key])

    def _kind_of_step(self, settles: bool) -> type[FusedStep]:
        return SettlingStep if settles else FusedStep

    def _take_over(self, known: Known) -> None:
        """Start from states that others have written."""
        for state in known.states:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].contiguous()
        self._counts.copy_(torch.tensor([[count[i] for i in self._filled] for count in known.counts()]))


class FusedStep:
    """One compressed step, a staged exchange whose fate the host decides; until then only error feedback changes.

    Args:
        average: the group's momentum.
        group: its options.
        known: what is updated, one parameter per tensor of the average.
        gradients: this rank's own, of the same parameters; None counts as zero. They are read when they are sent, and
            must stay as they are then until the step is over.
    """

    def __init__(
        self,
        average: FusedMomentum,
        group: Mapping[str, Any],
        known: Known,
        gradients: Sequence[Tensor | None],
    ) -> None:
        self._average = average
        self._kernels = average.kernels
        self._group = group
        self._known = known
        self._params = known.params
        self._states = known.states
        self._gradients = gradients
        self._rows: dict[int, Sequence[Tensor | None]] = {}
        self._factors = self._local_factors()
        self._masters = self._fp32_copies()
        self._values: Sequence[Tensor] = self._params
        if self._factors["l2"]:
            pairs = zip(self._masters, self._params, strict=True)
            self._values = row_major([p if master is None else master for master, p in pairs])
        self._work: CompressedWork = average.reduce.start_with(
            self._encode, self._undo_encode, overlap=False, send=False
        )
        copied = average.reduce.levels is not None
        self.sending = CompressedSending(self._work, average.reduce.parts, known.indices, copied)

    def all_finite(self) -> Tensor:
        """0-dim bool, the same on every rank."""
        return self._work.all_finite()

    def undo(self) -> None:
        """Put error feedback back; the step is not made."""
        self._work.undo()
        self._let_go()

    def commit(self) -> None:
        """Count the step and make it."""
        self._known.count()
        self._update()
        self._work.accept()
        self._let_go()

    def _let_go(self) -> None:
        """Forget the work, which knows this step: gradients are to be freed at once, not by the garbage collector."""
        del self._work, self.sending

    def _local_factors(self) -> dict[str, Any]:
        """What makes a momentum local; see `StepKernels.encode_momentum`."""
        group = self._group
        sign = -1.0 if group["maximize"] else 1.0
        coupled = 0.0 if group["adamw_mode"] else group["weight_decay"]
        return {
            "beta1": group["betas"][0],
            "alpha": sign * (1 - group["betas"][0]),
            "l2": sign * coupled,  # a part of the gradient, and as that it takes the sign once more
        }

    def _fp32_copies(self) -> Sequence[Tensor | None]:
        """What an update starts from and is written to in fp32, row-major; None: the parameter alone."""
        return _masters(self._params, self._states, self._group)

    def _encode(self, part: Part) -> None:
        self._kernels.encode_momentum(part, *self._inputs(part), **self._factors)

    def _undo_encode(self, part: Part, made: Tensor | None = None) -> None:
        self._kernels.undo_encode(part, *self._inputs(part), **self._factors, proceed=made)

    def _inputs(self, part: Part) -> tuple[Sequence[Tensor | None], Momentum, Sequence[Tensor]]:
        return self._rows_of(part), self._momentum(part), of_part(part, self._values)

    def _rows_of(self, part: Part) -> Sequence[Tensor | None]:
        """The gradients of a part, row-major, as they were when it was encoded."""
        key = part.gathered.data_ptr()
        if key not in self._rows:
            self._rows[key] = row_major(of_part(part, self._gradients))
        return self._rows[key]

    def _momentum(self, part: Part) -> Momentum:
        """The momentum that the step starts from."""
        return self._average.source(part, self._states)

    def _update(self, made: Tensor | None = None) -> None:
        """Count the time of `_move`."""
        reduce = self._average.reduce
        with reduce.stats.stage("update", reduce.backend):
            self._move(made)

    def _move(self, made: Tensor | None) -> None:
        """Move the parameters, unless `made` is false; the payloads become the momentum."""
        self._count(made)
        average = self._average
        rows, variances = row_major(self._params), [state["exp_avg_sq"] for state in self._states]
        for part in average.reduce.parts:
            self._move_part(part, of_part(part, rows), of_part(part, variances), made)
        self._write_back(rows)
        average.keep(self._states)

    def _write_back(self, rows: Sequence[Tensor]) -> None:
        """Copy what `row_major` has made of the parameters to those that it has copied."""
        if rows is not self._params:
            for p, row in zip(self._params, rows, strict=True):
                if p is not row:
                    p.copy_(row)

    def _move_part(
        self, part: Part, params: Sequence[Tensor], variances: Sequence[Tensor], made: Tensor | None
    ) -> None:
        """Move what a part holds, given as row-major tensors; its payloads become the momentum."""
        average = self._average
        self._kernels.decode_update(
            part,
            params,
            of_part(part, self._masters),
            variances,
            average.payload(part),
            average.rows(part.used),
            eps=self._group["eps"],
            proceed=made,
        )

    def _count(self, made: Tensor | None) -> None:
        """Count the step, and write the scalars of the update."""
        self._count_in(self._average.steps, made)

    def _count_in(self, steps: Tensor, made: Tensor | None) -> None:
        """Count the step in `steps`, as `FusedMomentum.steps`, and write the scalars of the update."""
        average, group = self._average, self._group
        self._kernels.adam_scalars(
            steps,
            average.variance_steps,
            average.scalars,
            lr=group["lr"],
            betas=group["betas"],
            weight_decay=group["weight_decay"] if group["adamw_mode"] else 0.0,
            bias_correction=group["bias_correction"],
            proceed=made,
        )


class SettlingStep(FusedStep):
    """One compressed step whose fate the device decides, without the host being told."""

    def settle(self, finite: Tensor) -> None:
        """Make the step where `finite`, 0-dim bool on the device, is true, and else undo it."""
        self._update(finite)
        for part in self._average.reduce.parts:
            self._undo_encode(part, finite)
        self._work.settle_server(finite)
        self._let_go()


def _masters(params: Sequence[Tensor], states: States, group: Mapping[str, Any]) -> Sequence[Tensor | None]:
    """The fp32 master of each parameter, row-major; None: it has none."""
    if not group["master_weights"]:
        return [None] * len(params)
    values = fp32_values(params, states, group)
    masters = [None if value is p else value for p, value in zip(params, values, strict=True)]
    rows = row_major(masters)
    if rows is not masters:
        for state, row in zip(states, rows, strict=True):
            if row is not None:
                state["master"] = row
    return rows


def row_major(tensors: Sequence[Row]) -> Sequence[Row]:
    """The tensors, where their elements do not lie in order or in a dtype that kernels read as copies that do.

    Returns:
        The argument itself if there is nothing to copy.
    """
    here = [t for t in tensors if t is not None]
    if all(map(Tensor.is_contiguous, here)) and {t.dtype for t in here}.issubset(DTYPES):
        return tensors
    return [t if t is None else (t if t.dtype in DTYPES else t.float()).contiguous() for t in tensors]


def of_part(part: Part, items: Sequence[Item]) -> Sequence[Item]:
    """Those of the tensors of an average that a part uses."""
    first, last = part.used[0], part.used[-1]
    return items[first : last + 1] if last - first < len(part.used) else [items[i] for i in part.used]
