"""A local step of 0/1 Adam by a fused kernel; neither it nor what it finds out makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.compress import SignCodec
from onebit.compress.kernels import DTYPES
from onebit.optim.local_steps import KEPT, MEAN, RATE, START, Reach, begin, is_open, starts_of

States = Sequence[MutableMapping[str, Any]]


class FusedLocal:
    """Makes the local steps of one group: a layout, with which tables are kept, and the numbers of each tensor.

    Args:
        params: of the group, those that have a variance.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        device = params[0].device
        (self._layout,) = SignCodec().plan(list(params))
        self._rows = torch.zeros(len(params), 4, device=device)

    @staticmethod
    def can(params: Sequence[Tensor], states: States, group: Mapping[str, Any], codec: SignCodec) -> bool:
        """Whether there is a kernel for these options where the parameters are."""
        coupled = not group["adamw_mode"] and group["weight_decay"]
        return bool(params) and not coupled and codec.kernels_on(params[0].device) == "gpu"

    def step(
        self, params: Sequence[Tensor], states: States, gradients: Sequence[Tensor | None], group: Mapping[str, Any]
    ) -> Tensor:
        """Make a step; the states become row-major, and those of an interval that begins if there is none.

        Args:
            params: of any strides.
            gradients: this rank's own; None counts as zero.
            group: its options; weight decay is decoupled.

        Returns:
            0-dim bool on the device: the gradients were finite, and this rank's contribution was not left out.
        """
        reach = Reach.of(states, group)
        if not is_open(states):
            begin(params, states, group)
            for state in states:
                state[MEAN] = torch.zeros_like(state["exp_avg_sq"])
        for state in states:
            for key in ("exp_avg", "exp_avg_sq", MEAN, START, "master"):
                if key in state:
                    state[key] = state[key].contiguous()
        rows = [_row_major(p.detach()) for p in params]
        taken = self._launch(rows, states, gradients, group, reach)
        for p, row in zip(params, rows, strict=True):
            if row.data_ptr() != p.data_ptr():
                p.copy_(row)
        for state, rate, kept in zip(states, reach.rates, reach.kept, strict=True):
            state[RATE], state[KEPT] = rate, kept
        torch._foreach_add_([s["step"] for s in states], 1.0)
        return taken

    def _launch(
        self,
        rows: Sequence[Tensor],
        states: States,
        gradients: Sequence[Tensor | None],
        group: Mapping[str, Any],
        reach: Reach,
    ) -> Tensor:
        from onebit.optim.gpu.local import LocalStep

        numbers = torch.tensor([reach.shares, reach.rates, reach.kept, [1 / root for root in reach.roots]])
        numbers = numbers.t().contiguous()
        self._rows.copy_(numbers.pin_memory() if self._rows.is_cuda else numbers, non_blocking=True)
        beta1 = group["betas"][0]
        taken = torch.empty((), dtype=torch.bool, device=self._rows.device)
        LocalStep(
            layout=self._layout,
            grads=[None if g is None else _row_major(g) for g in gradients],
            params=rows,
            momenta=[s["exp_avg"] for s in states],
            means=[s[MEAN] for s in states],
            starts=starts_of(states),
            variances=[s["exp_avg_sq"] for s in states],
            rows=self._rows,
            finite=taken,
            beta1=beta1,
            alpha=(beta1 - 1) if group["maximize"] else (1 - beta1),
            eps=group["eps"],
        ).make()
        return taken


def _row_major(tensor: Tensor) -> Tensor:
    """The tensor, if its elements lie in order and in a dtype that kernels read; else a copy that is so."""
    if tensor.dtype not in DTYPES:
        tensor = tensor.float()
    return tensor.contiguous()
