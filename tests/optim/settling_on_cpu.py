"""Has 1-bit Adam's compressed steps of CPU tensors made by the CUDA sources, with the device deciding about them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from onebit.optim import fused_groups
from onebit.optim.fused import FusedMomentum
from onebit.optim.gpu import momentum
from tests.optim import warps_on_cpu


def settle_by_cuda_sources(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """From now on; returns the names of the kernels that optimizers made from now on use, which grow with them."""
    one_at_a_time = threading.Lock()  # ranks are threads, and a kernel's lanes are kept in one place
    settling: set[str] = set()
    original = FusedMomentum.__init__

    def launch(*arguments: Any) -> None:
        with one_at_a_time:
            warps_on_cpu.launch(*arguments)

    def init(self: FusedMomentum, *arguments: Any) -> None:
        original(self, *arguments)
        self.settles = True
        settling.add(self.kernels.name)

    monkeypatch.setattr(momentum, "launch", launch)
    monkeypatch.setattr(fused_groups, "step_kernels", lambda device, codec: momentum)
    monkeypatch.setattr(FusedMomentum, "__init__", init)
    return settling
