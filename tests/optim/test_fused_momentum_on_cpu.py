"""What tests/gpu asks of the fused step's CUDA kernels, of the same sources run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam
from tests.gpu import test_fused_momentum as on_gpu
from tests.optim.samples import contents, feedback, parameters, patchy, step, values
from tests.optim.settling_on_cpu import settle_by_cuda_sources
from tests.optim.warps_on_cpu import COMPILER, kernels_on_cpu

__all__ = ["kernels_on_cpu"]

SIZES = [[1], [1000, 3], [2100, 1, 33, 1024]]
pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no g++"), pytest.mark.usefixtures("kernels_on_cpu", "small")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own tensors on the CPU, and few of them."""
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(on_gpu, "SIZES", SIZES)


@pytest.mark.parametrize("dtypes", on_gpu.DTYPES.values(), ids=on_gpu.DTYPES)
def test_encoding_updating_and_leaving_alone(dtypes: Sequence[torch.dtype]) -> None:
    on_gpu.test_what_is_sent_and_kept_is_the_codecs_for_the_local_momentum(1024, "mean", dtypes)
    on_gpu.test_parameters_move_as_by_separate_operations(1024, "mean", dtypes)
    on_gpu.test_nothing_changes_where_the_step_does_not_proceed(dtypes)


@pytest.mark.parametrize(("block_size", "scale"), [(96, "rms"), (2048, "mean"), (None, "mean")])
def test_blocks_of_any_size(block_size: int | None, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "SIZES", SIZES[1:2])
    dtypes = on_gpu.DTYPES["mixed"]
    on_gpu.test_what_is_sent_and_kept_is_the_codecs_for_the_local_momentum(block_size, scale, dtypes)
    on_gpu.test_parameters_move_as_by_separate_operations(block_size, scale, dtypes)


@pytest.mark.parametrize(("block_size", "dtypes"), [(1024, "fp32"), (1024, "mixed"), (96, "mixed")])
def test_what_is_written_for_the_mean_of_a_node(block_size: int, dtypes: str) -> None:
    on_gpu.test_a_local_momentum_is_written_to_wherever_a_chunk_is(block_size, on_gpu.DTYPES[dtypes])
    on_gpu.test_what_the_codec_has_encoded_is_undone_as_the_numbers_that_it_was(block_size)


@pytest.mark.parametrize("block_size", [1024, None])
def test_undoing(block_size: int | None) -> None:
    on_gpu.test_error_feedback_is_put_back_where_the_step_does_not_proceed(block_size)


def test_dead_entries_and_new_addresses() -> None:
    on_gpu.test_a_dead_entry_only_decays_even_where_nothing_can_be_divided()
    on_gpu.test_new_addresses_are_used_whatever_was_there_before()


@pytest.mark.parametrize("bias_correction", [True, False])
def test_scalars(bias_correction: bool) -> None:
    on_gpu.test_scalars_are_those_of_fp64_rounded_once(1e-3, bias_correction)


def test_whole_steps_on_two_levels_that_the_device_decides_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the CPU's kernels, for which the host decides; some steps have a number that is not finite."""

    def train(backend: Backend) -> list[Any]:
        params = [*parameters(), Parameter(values(9, shape=(40, 60)))]
        optimizer = OnebitAdam(params, lr=1e-2, freeze_step=2, backend=backend, local_group=2, bucket_mb=0.004)
        seen = []
        for number in range(8):
            given = patchy(params, backend.rank, number)
            given[-1] = values(10, number, backend.rank, shape=(40, 60))
            given[-1][values(1, shape=(40, 60)) < 0.5] = 0.0  # dead entries
            if number in (2, 5) and backend.rank == 3:
                given[-1][3, 4] = math.inf
            step(optimizer, given)
            seen.append((contents(optimizer), feedback(optimizer), optimizer.skipped_steps))
        assert optimizer.skipped_steps == 2
        return seen

    expected = run_threads(4, train)
    settling = settle_by_cuda_sources(monkeypatch)
    assert run_threads(4, train) == expected
    assert settling == {"gpu"}
