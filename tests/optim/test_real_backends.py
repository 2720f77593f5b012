"""OnebitAdam over Gloo and MPI processes: the bits of the threads run, on every rank, for 30 times fewer bytes."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest

from onebit.comm import run_threads
from tests.comm.launcher import needs_mpi, run_ranks
from tests.comm.oracle import wire_bytes
from tests.optim.samples import NETWORK, Step, train_network

NUMEL = sum(math.prod(shape) for shape in NETWORK)
KINDS = [("threads", 3), ("gloo", 2), pytest.param("mpi", 3, marks=[pytest.mark.mpi, needs_mpi])]


@functools.cache
def trained(kind: str, world_size: int) -> list[list[Step]]:
    per_rank: list[Any] = run_ranks(kind, world_size, train_network)
    return per_rank


@pytest.mark.parametrize(("kind", "world_size"), KINDS)
def test_parameters_and_moments_are_bit_equal_on_all_ranks_after_every_step(kind: str, world_size: int) -> None:
    first, *others = trained(kind, world_size)
    for seen in others:
        assert [step.state for step in seen] == [step.state for step in first]
    # One bad step in warm-up and one in the compressed phase change nothing, on any rank.
    assert [step.skipped for step in first] == [0, 1, 1, 1, 1, 2, 2, 2]
    assert [step.phase for step in first] == ["warmup"] * 3 + ["compressed"] * 5
    changed = [before.state != after.state for before, after in itertools.pairwise(first)]
    assert changed == [False, True, True, True, False, True, True]


@pytest.mark.parametrize(("kind", "world_size"), KINDS[1:])
def test_processes_end_every_step_with_the_bits_of_threads_error_feedback_included(kind: str, world_size: int) -> None:
    assert trained(kind, world_size) == run_threads(world_size, train_network)


@pytest.mark.parametrize(("kind", "world_size"), KINDS)
def test_a_compressed_step_sends_30_times_fewer_bytes_than_fp32(kind: str, world_size: int) -> None:
    dense = 2 * (world_size - 1) * 4 * NUMEL // world_size
    expected = wire_bytes(world_size, [math.prod(shape) for shape in NETWORK])
    assert 100_000 < NUMEL < 105_000
    for seen in trained(kind, world_size):
        assert {(step.wire_bytes, step.dense_bytes) for step in seen[4:]} == {(expected, dense)}
        assert dense / expected >= 30
        # In warm-up a flag per parameter travels along, and the numbers are filled up to a multiple of the ranks.
        assert all(dense <= step.wire_bytes <= dense + 8 * (len(NETWORK) + world_size) for step in seen[:2])
