"""What tests/gpu asks of CUDA kernels where there is a mask, of the same sources run on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import test_fused_momentum, test_masks
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu

__all__ = ["kernels_on_cpu"]

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no g++"), pytest.mark.usefixtures("kernels_on_cpu", "small")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own tensors on the CPU."""
    monkeypatch.setattr(test_fused_momentum, "DEVICE", "cpu")
    monkeypatch.setattr(test_masks, "DEVICE", "cpu")


@pytest.mark.parametrize("name", test_masks.MASKS)
def test_the_codec(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_masks.test_the_codec_gives_the_bytes_of_the_reference(name, torch.bfloat16, monkeypatch)


@pytest.mark.parametrize("name", test_masks.MASKS)
def test_the_fused_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_masks.test_a_fused_step_is_that_of_separate_operations(name, torch.float32, monkeypatch)


def test_masks_that_come_and_go() -> None:
    test_masks.test_another_mask_is_never_taken_for_the_one_before()
