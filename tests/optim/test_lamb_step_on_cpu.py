"""What tests/gpu asks of 1-bit LAMB's fused step, of the same CUDA sources run on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from onebit.comm import run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitLamb, fused_groups, fused_lamb
from onebit.optim.gpu import lamb, momentum
from tests.gpu import test_lamb_step as on_gpu
from tests.optim import warps_on_cpu
from tests.optim.warps_on_cpu import COMPILER

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")
_one_at_a_time = threading.Lock()  # ranks are threads, and a kernel's lanes are kept in one place


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*arguments: Any) -> None:
        with _one_at_a_time:
            warps_on_cpu.launch(*arguments)

    def kernels(device: torch.device, codec: SignCodec) -> Any:
        return None if codec.kernels_on(device) == "reference" else momentum

    for module in (momentum, lamb):
        monkeypatch.setattr(module, "launch", launch)
    for module in (fused_lamb, fused_groups):
        monkeypatch.setattr(module, "step_kernels", kernels)
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(on_gpu, "SIZES", [*on_gpu.SIZES[:4], 9_000])
    monkeypatch.setattr(lamb, "_FAN", 3)  # so that several warps put that together


@pytest.mark.parametrize("dtypes", on_gpu.DTYPES.values(), ids=on_gpu.DTYPES)
def test_a_step_and_the_next_factors_are_those_of_float64(dtypes: Sequence[torch.dtype]) -> None:
    on_gpu.test_a_step_and_the_next_factors_are_those_of_float64(dtypes)


def test_nothing_changes_where_the_step_does_not_proceed() -> None:
    on_gpu.test_nothing_changes_where_the_step_does_not_proceed()


def test_a_learning_rate_on_the_device_is_no_other() -> None:
    on_gpu.test_a_learning_rate_on_the_device_is_read_there(torch.float64)


@pytest.mark.parametrize("variant", on_gpu.VARIANTS)
def test_40_steps_end_where_the_unfused_ones_end(variant: str) -> None:
    on_gpu.test_40_steps_end_where_the_unfused_ones_end(variant, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("master", "has_factor"), [(False, True), (True, True), (True, False)])
def test_replicas_are_bit_equal_and_a_saved_run_goes_on_bit_for_bit(
    dtype: torch.dtype, master: bool, has_factor: bool
) -> None:
    on_gpu.test_replicas_are_bit_equal_and_a_saved_run_goes_on_bit_for_bit(dtype, master, has_factor)


def test_the_device_decides_as_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu.test_a_step_that_the_device_decides_about_is_the_step_that_the_host_decides_about(monkeypatch)


def test_dead_entries_and_going_back() -> None:
    on_gpu.test_dead_entries_move_by_decay_alone_and_going_back_to_dense_steps_takes_the_momentum_along()


def test_there_are_kernels_for_blocks_of_1024_alone() -> None:
    cpu = torch.device("cpu")
    assert fused_lamb.lamb_kernels(cpu, SignCodec()) is momentum
    assert fused_lamb.lamb_kernels(cpu, SignCodec(block_size=512)) is None
    assert fused_lamb.lamb_kernels(cpu, SignCodec(block_size=None)) is None

    def kernels(backend: Any) -> str:
        return OnebitLamb(on_gpu.start(), freeze_step=1, backend=backend).kernels

    assert run_threads(1, kernels) == ["torch"]
