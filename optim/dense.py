"""Every rank's gradients of one group averaged in fp32, with who has one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.comm import MismatchError
from onebit.comm.tensors import all_finite
from onebit.optim.exchange import GroupReducers


class MeanGradients:
    """The mean over ranks of gradients of which any rank may lack any; a lacking one counts as zero.

    One number per parameter travels along and says who has a gradient, so that a parameter that no rank has one for can
    be left alone, as torch does. With one rank nothing is sent.

    Args:
        params: the parameters of a group, on one device.
        gradients: this rank's own, one per parameter; not changed.
        reducers: the averages of the group.
        note: a 0-dim fp32 tensor that every rank gives or none does; it travels along.
        averaged: the gradients are means over ranks already, on every rank: only what travels along is exchanged.

    Attributes:
        means: one fp32 tensor per parameter, the same bits on every rank; with one rank, or `averaged`, the gradients
            themselves, so not to be changed.
        present: whether some rank has a gradient, per parameter.
        note: the mean of the notes, the same bits on every rank; None without.

    Raises:
        MismatchError: `averaged`, and a parameter has a gradient on some ranks alone; on every rank.
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
        self.present = [g is not None for g in gradients]
        self.means = [
            torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
            for p, g in zip(params, gradients, strict=True)
        ]
        self.note: float | None = None
        self._finite: Tensor | None = None
        if reducers.backend.size > 1:
            self._average(reducers, note, averaged)
        elif note is not None:
            self.note = float(note)

    def all_finite(self) -> Tensor:
        """0-dim bool, the same on every rank: no mean has a number that is not finite."""
        return all_finite(self.means) if self._finite is None else self._finite

    def _average(self, reducers: GroupReducers, note: Tensor | None, averaged: bool) -> None:
        given = self.means
        device = given[0].device if given else None
        along = torch.tensor(self.present, dtype=torch.float32, device=device)
        if note is not None:
            along = torch.cat([along, note.to(along).view(1)])
        if averaged:
            # Ranks must agree about the step even if somebody has changed one rank's means: a NaN reaches all of them.
            along = torch.where(all_finite(given).to(along.device), along, torch.nan)
            reducers.dense([along])([along])
            self._finite = along.isfinite().all()
        else:
            self.means = [torch.empty_like(g) for g in given]
            reducers.dense([*given, along])([*given, along], out=[*self.means, along])
        numbers = along.tolist()
        if note is not None:
            self.note = numbers.pop()
        self.present = [number > 0 for number in numbers]
        if averaged and any(0 < number < 1 for number in numbers):
            partly = next(i for i, number in enumerate(numbers) if 0 < number < 1)
            raise MismatchError(
                f"rank {reducers.backend.rank}: parameter {partly} has an averaged gradient on "
                f"{round(numbers[partly] * reducers.backend.size)} of {reducers.backend.size} ranks, expected all or "
                "none; do not drop gradients between backward and step"
            )
