"""FusedAdam without a GPU: its kernels run on the CPU, as C++, and so do torch's that stand in for them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from onebit.compress import InputError
from onebit.optim import FusedAdam, fused_adam
from onebit.optim.gpu import adam
from onebit.optim.gpu.adam_torch import TorchSteps
from tests.optim import cuda_on_cpu
from tests.optim.fused_adam_suite import SHAPES, FusedAdamSuite, Make, parameters, set_gradients


class OnCPU(FusedAdam):
    """As on a CUDA device."""

    device_type: ClassVar[str] = "cpu"


@pytest.fixture
def device() -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is measured here in microseconds would wait for a second thread for milliseconds
    yield "cpu"
    torch.set_num_threads(threads)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    names: list[str] = []

    def launch(file: Path, kernel: str, device: torch.device, threads: int, *arguments: int) -> None:
        names.append(kernel)
        cuda_on_cpu.launch(file, kernel, device, threads, *arguments)

    monkeypatch.setattr(adam, "launch", launch)
    return names


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++")
class TestKernels(FusedAdamSuite):
    @pytest.fixture
    def make(self, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> Make:
        monkeypatch.setattr(fused_adam, "_kernels", lambda: ("gpu", adam.AdamLaunches))
        return OnCPU

    def test_launches_do_not_grow_with_the_number_of_tensors(self, make: Make, launches: list[str]) -> None:
        params = parameters(SHAPES * 3, "cpu") + parameters(SHAPES, "cpu", torch.bfloat16)
        optimizer = make([{"params": params[:9]}, {"params": params[9:]}])
        set_gradients(0, params)
        optimizer.step()
        assert launches == ["adam_factors", "adam_f32_f32", "adam_bf16_bf16"]

    @pytest.mark.parametrize("vectors", [1, 4])
    def test_any_number_of_elements_per_thread_gives_the_same_bits(
        self, make: Make, vectors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = tmp_path / f"adam_{vectors}.cu"
        source.write_text(f'#define VECTORS {vectors}\n#include "{adam.SOURCE}"\n')
        kernels = functools.partial(adam.AdamLaunches, source=source, vectors=vectors)
        params, others = parameters(SHAPES, "cpu"), parameters(SHAPES, "cpu")
        set_gradients(0, params, others)
        make(params).step()
        monkeypatch.setattr(fused_adam, "_kernels", lambda: ("gpu", kernels))
        make(others).step()
        assert all(map(torch.equal, params, others))


class TestTorchInTheirPlace(FusedAdamSuite):
    @pytest.fixture
    def make(self, monkeypatch: pytest.MonkeyPatch) -> Make:
        monkeypatch.setattr(fused_adam, "_kernels", lambda: ("torch", TorchSteps))
        return OnCPU


def test_parameters_on_the_cpu_are_refused_with_the_name_of_what_takes_them() -> None:
    with pytest.raises(InputError, match=r"CPUAdam"):
        FusedAdam(parameters([(3,)], "cpu"))


def test_without_cupy_torchs_kernel_is_used_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    fused_adam._kernels.cache_clear()
    try:
        optimizers = [OnCPU(parameters([(3,)], "cpu")) for _ in range(2)]
        assert [o.kernels for o in optimizers] == ["torch", "torch"]
        assert caplog.text.count("CuPy") == 1
    finally:
        fused_adam._kernels.cache_clear()


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_thread_blocks_cover_every_element_once(chunk: int) -> None:
    numels = np.array([5, 0, 1024, 1025, 1, 70_000])
    members = np.array([0, 1, 3, 5])
    table = adam.blocks(numels, members, chunk)
    seen = {int(m): np.zeros(numels[m], int) for m in members}
    for tensor, number in table:
        assert number * chunk < numels[tensor]
        seen[int(tensor)][number * chunk : (number + 1) * chunk] += 1
    assert all((count == 1).all() for count in seen.values())
    assert table.dtype == np.int32
