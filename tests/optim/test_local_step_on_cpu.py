"""What tests/gpu asks of the kernel of local steps, of the same source run on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.gpu import test_local_step as on_gpu
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu

__all__ = ["kernels_on_cpu"]

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no g++"), pytest.mark.usefixtures("kernels_on_cpu")]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")


@pytest.mark.parametrize("dtypes", on_gpu.DTYPES.values(), ids=on_gpu.DTYPES)
def test_a_step_is_that_of_separate_operations(dtypes: Sequence[torch.dtype]) -> None:
    on_gpu.test_a_step_is_that_of_separate_operations(dtypes)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_step_with_a_number_that_is_not_finite_adds_nothing(share: float) -> None:
    on_gpu.test_a_step_with_a_number_that_is_not_finite_adds_nothing(float("nan"), share)


def test_a_bad_gradient_of_a_dead_entry_counts_for_nothing() -> None:
    on_gpu.test_a_bad_gradient_of_a_dead_entry_counts_for_nothing()
