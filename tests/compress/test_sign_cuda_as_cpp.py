"""What tests/gpu asks of `SignCodec`'s CUDA kernels, of the same sources run on the CPU; masks are in tests/optim."""

from __future__ import annotations

import pytest

from tests.gpu import test_kernels as on_gpu
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu

__all__ = ["kernels_on_cpu"]

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no g++"), pytest.mark.usefixtures("kernels_on_cpu")]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 9])
def test_the_mean_whatever_the_scales(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    on_gpu.test_the_mean_is_that_of_the_cpu_whatever_the_scales(ranks)
