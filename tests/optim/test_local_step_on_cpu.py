"""What tests/gpu asks of the kernel of local steps, of the CPU's own and of the GPU's source run on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from onebit.optim.cpu.local import LocalStep
from tests.gpu import test_local_step as on_gpu
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu

__all__ = ["kernels_on_cpu"]


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    if request.param == "cpu":
        monkeypatch.setattr(on_gpu, "LocalStep", LocalStep)
    elif COMPILER is None:
        pytest.skip("no g++")
    else:
        request.getfixturevalue("kernels_on_cpu")


@pytest.mark.parametrize("dtypes", on_gpu.DTYPES.values(), ids=on_gpu.DTYPES)
def test_a_step_is_that_of_separate_operations(dtypes: Sequence[torch.dtype]) -> None:
    on_gpu.test_a_step_is_that_of_separate_operations(dtypes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_step_with_a_number_that_is_not_finite_adds_nothing(bad: float, share: float) -> None:
    on_gpu.test_a_step_with_a_number_that_is_not_finite_adds_nothing(bad, share)


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_a_step_that_begins_an_interval_reads_no_mean_and_starts_where_parameters_are(bad: float | None) -> None:
    on_gpu.test_a_step_that_begins_an_interval_reads_no_mean_and_starts_where_parameters_are(bad)


def test_a_bad_gradient_of_a_dead_entry_counts_for_nothing() -> None:
    on_gpu.test_a_bad_gradient_of_a_dead_entry_counts_for_nothing()
