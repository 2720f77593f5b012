"""Local steps of 0/1 Adam by a fused kernel; neither they nor what they find out make the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from onebit.compress import SignCodec
from onebit.optim.fused import row_major
from onebit.optim.known import Known
from onebit.optim.local_kernels import LocalStep
from onebit.optim.local_steps import KEPT, MEAN, RATE, START, Reach, is_open, starts_of
from onebit.optim.master import master_of

States = Sequence[MutableMapping[str, Any]]
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class FusedLocal:
    """Makes the local steps of one group: a layout, with which tables are kept, and the numbers of each tensor.

    Args:
        kernel: what makes a step.
        params: of the group, those that have a variance.
    """

    def __init__(self, kernel: type[LocalStep], params: Sequence[Tensor]) -> None:
        device = params[0].device
        self._kernel = kernel
        (self._layout,) = SignCodec().plan(list(params))
        self._rows = torch.zeros(len(params), 4, device=device)
        self._lists: Lists = ([], [], [], [])
        # Kept from interval to interval: to allocate hundreds of small tensors takes longer than a step.
        self._means = [torch.empty(p.shape, device=device) for p in params]
        self._starts: dict[int, Tensor] = {}

    def step(self, known: Known, gradients: Sequence[Tensor | None], group: Mapping[str, Any]) -> Tensor:
        """Make a step; the states become row-major, and those of an interval that begins if there is none.

        Args:
            known: what is updated, of any strides.
            gradients: this rank's own, of the same parameters; None counts as zero.
            group: its options; weight decay is decoupled.

        Returns:
            0-dim bool on the device: the gradients were finite, and this rank's contribution was not left out.
        """
        params, states = known.params, known.states
        reach = Reach.of(states, known.counts(), group)
        begins = None if is_open(states) else self._begin(known, group)
        rows = row_major(params)
        taken = self._launch(rows, self._row_major_lists(states), gradients, group, reach, begins)
        if rows is not params:
            for p, row in zip(params, rows, strict=True):
                if p is not row:
                    p.copy_(row)
        for state, rate, kept in zip(states, reach.rates, reach.kept, strict=True):
            state[RATE], state[KEPT] = rate, kept
        known.count()
        return taken

    def _begin(self, known: Known, group: Mapping[str, Any]) -> list[bool]:
        """Give an interval's tensors to the states; returns which starts are to be written: a master is one already."""
        begins = []
        for i, (p, state, mean) in enumerate(zip(known.params, known.states, self._means, strict=True)):
            state[MEAN] = mean
            begins.append(master_of(p, state, group) is None)
            if begins[-1]:
                if i not in self._starts:
                    self._starts[i] = torch.empty(p.shape, device=p.device)
                state[START] = self._starts[i]
        return begins

    def _row_major_lists(self, states: States) -> Lists:
        """Momenta, means, starts and variances; the states' own, which are made row-major where somebody wrote them."""
        found = _lists_of(states)
        if any(
            not all(map(is_, now, then)) or len(now) != len(then) for now, then in zip(found, self._lists, strict=True)
        ):
            for state in states:
                for key in ("exp_avg", MEAN, START, "master", "exp_avg_sq"):
                    if key in state:
                        state[key] = state[key].contiguous()
            self._lists = _lists_of(states)
        return self._lists

    def _launch(
        self,
        rows: Sequence[Tensor],
        lists: Lists,
        gradients: Sequence[Tensor | None],
        group: Mapping[str, Any],
        reach: Reach,
        begins: Sequence[bool] | None,
    ) -> Tensor:
        columns = (reach.shares, reach.rates, reach.kept, [1 / root for root in reach.roots])
        numbers = torch.tensor([column[:1] if reach.alike else column for column in columns]).t()
        device = self._rows.device
        self._rows.copy_((numbers.pin_memory() if self._rows.is_cuda else numbers).to(device, non_blocking=True))
        beta1 = group["betas"][0]
        taken = torch.empty((), dtype=torch.bool, device=self._rows.device)
        momenta, means, starts, variances = lists
        self._kernel(
            layout=self._layout,
            grads=row_major(gradients),
            params=rows,
            momenta=momenta,
            means=means,
            starts=starts,
            variances=variances,
            rows=self._rows,
            finite=taken,
            beta1=beta1,
            alpha=(beta1 - 1) if group["maximize"] else (1 - beta1),
            eps=group["eps"],
            begins=begins,
        ).make()
        return taken


def _lists_of(states: States) -> Lists:
    return (
        [s["exp_avg"] for s in states],
        [s[MEAN] for s in states],
        starts_of(states),
        [s["exp_avg_sq"] for s in states],
    )
