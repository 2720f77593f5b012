"""Every rank's gradients of one group averaged in fp32, with who has one; and the exchange of a step on them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit.comm import DenseWork, MismatchError
from onebit.comm.tensors import all_finite
from onebit.optim.exchange import GroupReducers

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer


class MeanGradients:
    """The mean over ranks of gradients of which any rank may lack any; a lacking one counts as zero.

    One number per parameter travels along and says who has a gradient, so that a parameter that no rank has one for can
    be left alone, as torch does. With one rank nothing is sent. It is a `onebit.optim.exchange.Sending`: gradients are
    read when their bucket is sent.

    Args:
        params: the parameters of a group, on one device.
        gradients: this rank's own, one per parameter; not changed.
        reducers: the averages of the group.
        note: a 0-dim fp32 tensor that every rank gives or none does; it travels along.
        averaged: the gradients are means over ranks already, on every rank: only what travels along is exchanged.

    Attributes:
        means: after `finish`, one fp32 tensor per parameter, the same bits on every rank; with one rank, or `averaged`,
            the gradients themselves, so not to be changed.
        present: after `finish`, whether some rank has a gradient, per parameter.
        note: after `finish`, the mean of the notes, the same bits on every rank; None without.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        reducers: GroupReducers,
        note: Tensor | None = None,
        *,
        averaged: bool = False,
    ) -> None:
        self._params = params
        self._gradients = gradients
        self._reducers = reducers
        self._given_note = note
        self._averaged = averaged
        self._work: DenseWork | None = None
        self._finite: Tensor | None = None
        self.means: list[Tensor] = []
        self.present: list[bool] = []
        self.note: float | None = None
        if reducers.backend.size > 1 and not averaged:
            self._open()

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """As of `Sending`."""
        return [[t - 1 for t in tensors if t] for tensors in self._buckets]

    @property
    def late(self) -> Sequence[int]:
        """As of `Sending`: what travels along is known when all gradients are."""
        return [index for index, tensors in enumerate(self._buckets) if 0 in tensors]

    def send(self, bucket: int) -> None:
        """Read the gradients of a bucket and start sending it."""
        assert self._work is not None
        self._read(self._buckets[bucket])
        self._work.send(bucket)

    def spoil(self, bucket: int) -> None:
        """Send NaN instead."""
        assert self._work is not None
        self._work.spoil(bucket)

    def pass_on(self, bucket: int) -> None:
        """Send on the mean of what came of a bucket."""
        assert self._work is not None
        self._work.pass_on(bucket)

    def forget(self, bucket: int) -> None:
        """Nothing: there is no error feedback."""

    def finish(self) -> None:
        """Send what is left, and return when the means are here.

        Raises:
            MismatchError: `averaged`, and a parameter has a gradient on some ranks alone; on every rank.
            TransportError: a peer is dead or too slow.
        """
        if self._work is None:
            self.present = [g is not None for g in self._gradients]
            self.means = [self._own(index) for index in range(len(self._params))]
            if self._reducers.backend.size > 1:
                self._compare()
            elif self._given_note is not None:
                self.note = float(self._given_note)
            return
        for bucket in self._work.unsent:
            self._read(self._buckets[bucket])
        along = self._along_like
        self._work.wait([along, *self.means])
        self._work = None
        self._given.clear()
        if any(map(math.isnan, self._learn(along))):
            self._finite = torch.zeros((), dtype=torch.bool)

    def cancel(self) -> None:
        """The means are not wanted any more, as something has failed."""
        if self._work is not None:
            self._work.cancel()

    def all_finite(self) -> Tensor:
        """After `finish`: 0-dim bool, the same on every rank: no mean has a number that is not finite."""
        return all_finite(self.means) if self._finite is None else self._finite

    def _open(self) -> None:
        self.means = [torch.empty_like(p, dtype=torch.float32) for p in self._params]
        count = len(self._params) + (self._given_note is not None)
        self._along_like = torch.empty(count, device=self.means[0].device if self.means else None)
        like = [self._along_like, *self.means]
        dense = self._reducers.dense(like)
        self._buckets = dense.buckets
        self._given = list(like)  # each replaced when it is read
        self._to_read = set(range(len(like)))
        self._work = dense.open(self._given)

    def _read(self, tensors: Sequence[int]) -> None:
        """Have these tensors of the average ready: what travels along is the first."""
        for t in self._to_read.intersection(tensors):
            self._given[t] = self._own(t - 1) if t else self._along()
        self._to_read.difference_update(tensors)

    def _own(self, index: int) -> Tensor:
        g = self._gradients[index]
        return torch.zeros_like(self._params[index], dtype=torch.float32) if g is None else g.float()

    def _along(self) -> Tensor:
        device = self._params[0].device if self._params else None
        along = torch.tensor([g is not None for g in self._gradients], dtype=torch.float32, device=device)
        return along if self._given_note is None else torch.cat([along, self._given_note.to(along).view(1)])

    def _learn(self, along: Tensor) -> list[float]:
        """Take in the mean of what travelled along, and return the share of ranks that have each gradient."""
        numbers: list[float] = along.tolist()
        if self._given_note is not None:
            self.note = numbers.pop()
        self.present = [number > 0 for number in numbers]
        return numbers

    def _compare(self) -> None:
        """Gradients were averaged: see that all ranks have the same ones."""
        # Ranks must agree about the step even if somebody has changed one rank's means: a NaN reaches all of them.
        along = self._along()
        along = torch.where(all_finite(self.means).to(along.device), along, torch.nan)
        self._reducers.dense([along])([along])
        self._finite = along.isfinite().all()
        numbers = self._learn(along)
        if any(0 < number < 1 for number in numbers):
            backend = self._reducers.backend
            partly = next(i for i, number in enumerate(numbers) if 0 < number < 1)
            raise MismatchError(
                f"rank {backend.rank}: parameter {partly} has an averaged gradient on "
                f"{round(numbers[partly] * backend.size)} of {backend.size} ranks, expected all or "
                "none; do not drop gradients between backward and step"
            )


class MeanExchange(ABC):
    """The staged exchange of a step on mean gradients; a subclass says what is made of them.

    Args:
        optimizer, group, reducers: whose step it is.
        note: what travels along, as of `MeanGradients`.

    Attributes:
        sending: as of `onebit.optim.exchange.StagedExchange`.
    """

    def __init__(
        self,
        optimizer: CompressedOptimizer,
        group: dict[str, Any],
        reducers: GroupReducers,
        note: Tensor | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._group = group
        self._reducers = reducers
        self._mean = self.sending = MeanGradients(
            group["params"], optimizer._gradients(group), reducers, note, averaged=optimizer.gradients_averaged
        )

    def all_finite(self) -> Tensor:
        """0-dim bool, the same on every rank."""
        return self._mean.all_finite()

    def undo(self) -> None:
        """Nothing was changed."""
        self._mean.cancel()

    @abstractmethod
    def commit(self) -> None:
        """Make the step; the group's step count is already that of the step."""

    def _used(self) -> list[int]:
        """Which of the group's parameters some rank has a gradient for."""
        return [i for i, present in enumerate(self._mean.present) if present]

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """These parameters, and their mean gradients."""
        used = self._used()
        return [self._group["params"][i] for i in used], [self._mean.means[i] for i in used]
