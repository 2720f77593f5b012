"""A local step of 0/1 Adam on CUDA tensors in one pass over memory, and how it is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from onebit.compress.gpu.module import launch
from onebit.optim import local_kernels
from onebit.optim.gpu.blocks import Group, Places, numels
from onebit.optim.gpu.operands import TYPES, bits, operand, sorted_blocks

_SOURCE = str(Path(__file__).parent / "local.cu")
_ROLES = ("grads", "params", "momenta", "means", "starts", "variances")
_TAKING_BACK = 1 << 18  # threads; they loop, for nearly always there is nothing to take back


class LocalStep(local_kernels.LocalStep):
    """One local step of CUDA tensors."""

    name: ClassVar[str] = "gpu"

    def make(self) -> None:
        """As `optim.local_kernels.LocalStep.make`."""
        self._begin()
        device, layout = self.rows.device, self.layout
        self.finite.fill_(True)
        lists = (self.grads, self.params, self.momenta, self.means, self.starts, self.variances)
        operands = [
            operand(role, tensors, layout, device, fp32=role not in _ROLES[:2])
            for role, tensors in zip(_ROLES, lists, strict=True)
        ]
        grad, param = operands[:2]
        addresses = [o.address for o in operands]
        found = sorted_blocks("local", layout, device, operands, True, lambda: grad.types + 4 * param.types)
        for group in found:
            for places, kernel in ((group.full, f"step_full_{TYPES[group.kind % 4]}"), (group.others, "step_any")):
                self._launch(kernel, 32 * places.n, places, group, addresses)
        for group in found:
            self._launch("take_back", min(32 * group.all.n, _TAKING_BACK), group.all, group, addresses)

    def _begin(self) -> None:
        """Write what an interval begins with, where one does."""
        if self.begins is None:
            return
        torch._foreach_zero_(list(self.means))
        pairs = [(y, x) for y, x, own in zip(self.starts, self.params, self.begins, strict=True) if own]
        if pairs:
            torch._foreach_copy_([y for y, _ in pairs], [x for _, x in pairs])

    def _launch(self, kernel: str, threads: int, places: Places, group: Group, addresses: Sequence[int]) -> None:
        if not places.n:
            return
        device = self.rows.device
        grads, params, *others = addresses
        tensors = (grads, group.kind % 4, params, group.kind // 4, *others)
        factors = (bits(self.beta1), bits(self.alpha), bits(self.eps))
        ends = numels(self.layout, device).data_ptr()
        results = (self.rows.data_ptr(), self.finite.data_ptr())
        launch(_SOURCE, kernel, device, threads, places.address, places.n, ends, *tensors, *results, *factors)
