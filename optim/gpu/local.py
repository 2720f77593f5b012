"""A local step of 0/1 Adam on CUDA tensors in one pass over memory, and how it is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from onebit.compress.gpu.module import launch
from onebit.compress.layout import Layout
from onebit.optim.gpu.blocks import Group, Places, numels
from onebit.optim.gpu.operands import TYPES, bits, operand, sorted_blocks

_SOURCE = str(Path(__file__).parent / "local.cu")
_ROLES = ("grads", "params", "momenta", "means", "starts", "variances")
_TAKING_BACK = 1 << 18  # threads; they loop, for nearly always there is nothing to take back


@dataclass(frozen=True, kw_only=True)
class LocalStep:
    """One local step of a list of tensors, all row-major and on one device.

    With m' = β₁·m + α·g, 0 where v is 0, and a' = a + share·(m' - a), a parameter becomes
    x = kept·y - rate·a' / (√v·root + ε), rounded; every operation in fp32 is rounded once.

    Attributes:
        layout: of the tensors, in blocks of 1024 and one chunk; tables are kept with it.
        grads: g, fp32, bf16 or fp16; None counts as zeros.
        params: x, fp32, bf16 or fp16, overwritten.
        momenta, means: m and a, fp32, updated in place.
        starts, variances: y and v, fp32.
        rows: (k, 4) fp32 on the device: share, rate, kept and root of each tensor.
        finite: 0-dim bool on the device.
        beta1, alpha, eps: β₁, ±(1-β₁) and ε.
    """

    layout: Layout
    grads: Sequence[Tensor | None]
    params: Sequence[Tensor]
    momenta: Sequence[Tensor]
    means: Sequence[Tensor]
    starts: Sequence[Tensor]
    variances: Sequence[Tensor]
    rows: Tensor
    finite: Tensor
    beta1: float
    alpha: float
    eps: float

    def make(self) -> None:
        """Make the step, and set `finite`: whether all m' are.

        Where one is not, the whole step is taken back but for its decay: no m changes, a becomes a·(1 - share), both to
        within rounding, and x follows.
        """
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
            for places in (group.full, group.others):
                self._launch("take_back", min(32 * places.n, _TAKING_BACK), places, group, addresses)

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
