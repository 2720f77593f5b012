"""Every rank's gradients of one group averaged in fp32, with who has one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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

    Attributes:
        means: one fp32 tensor per parameter, the same bits on every rank; with one rank the gradients themselves, so
            not to be changed.
        present: whether some rank has a gradient, per parameter.
        note: the mean of the notes, the same bits on every rank; None without.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        reducers: GroupReducers,
        note: Tensor | None = None,
    ) -> None:
        self.present = [g is not None for g in gradients]
        self.means = [
            torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
            for p, g in zip(params, gradients, strict=True)
        ]
        self.note: float | None = None
        if reducers.backend.size > 1:
            self._average(reducers, note)
        elif note is not None:
            self.note = float(note)

    def all_finite(self) -> Tensor:
        """0-dim bool, the same on every rank: no mean has a number that is not finite."""
        return all_finite(self.means)

    def _average(self, reducers: GroupReducers, note: Tensor | None) -> None:
        given = self.means
        device = given[0].device if given else None
        along = torch.tensor(self.present, dtype=torch.float32, device=device)
        if note is not None:
            along = torch.cat([along, note.to(along).view(1)])
        self.means = [torch.empty_like(g) for g in given]
        reducers.dense([*given, along])([*given, along], out=[*self.means, along])
        numbers = along.tolist()
        if note is not None:
            self.note = numbers.pop()
        self.present = [number > 0 for number in numbers]
