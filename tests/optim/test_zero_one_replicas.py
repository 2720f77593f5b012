"""ZeroOneAdam's ranks hold the same bits whenever they meet, and nothing around a parameter changes any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, run_threads
from onebit.optim import ZeroOneAdam
from tests.comm.launcher import needs_mpi, run_ranks
from tests.comm.samples import bits
from tests.optim.samples import Gradients, checksum, contents, gradients, in_rows, mixed, parameters, step, strided_too
from tests.optim.zero_one_runs import KINDS, SOON, mostly, run, saved


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_are_bit_equal_after_every_synchronised_step_and_differ_in_between(
    world_size: int, master_weights: bool
) -> None:
    options = {**SOON, "master_weights": master_weights}
    first, *others = run_threads(world_size, run, len(KINDS), contents, mostly, mixed, options)
    for seen in others:
        for number, kind in enumerate(KINDS):
            assert (seen[number] == first[number]) == (kind != "local"), f"step {number + 1}"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bucket_size_and_order_of_registration_change_no_bit(world_size: int) -> None:
    order = [5, 0, 6, 3, 2, 1, 4]

    def permuted(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(mixed(), rank, number)
        return [made[i] for i in order]

    usual = run_threads(world_size, run, 20, contents, gradients, mixed)
    small = {**SOON, "bucket_mb": 2.0**-13}
    otherwise = run_threads(world_size, run, 20, contents, permuted, lambda: mixed(order), small)
    for one, other in zip(usual, otherwise, strict=True):
        for now, then in zip(one, other, strict=True):
            assert [now[i] for i in order] == then


@pytest.mark.parametrize("world_size", [1, 2])
def test_strides_of_parameters_and_gradients_change_no_bit(world_size: int) -> None:
    expected = run_threads(world_size, run, 20, contents, gradients, in_rows)
    for given in (gradients, strided_too):
        assert run_threads(world_size, run, 20, contents, given) == expected


def by_processes(backend: Backend) -> list[str]:
    return [checksum(state) for state in run(backend, len(KINDS), contents, gradients, mixed)]


@pytest.mark.parametrize(
    ("kind", "world_size"), [("gloo", 2), pytest.param("mpi", 3, marks=[pytest.mark.mpi, pytest.mark.slow, needs_mpi])]
)
def test_processes_make_the_steps_of_threads(kind: str, world_size: int) -> None:
    assert run_ranks(kind, world_size, by_processes) == run_threads(world_size, by_processes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("master_weights", [False, True])
def test_synchronize_makes_ranks_equal_in_the_middle_of_an_interval_and_the_schedule_goes_on(
    master_weights: bool, dtype: torch.dtype
) -> None:
    def train(backend: Backend) -> list[Any]:
        params = parameters(dtype=dtype)
        optimizer = ZeroOneAdam(params, backend=backend, master_weights=master_weights, **SOON)
        seen = []
        for number in range(len(KINDS)):
            assert optimizer.phase() == KINDS[number]
            step(optimizer, gradients(params, backend.rank, number))
            if number == 16:
                counted = [int(state["step"]) for state in saved(optimizer)]
                optimizer.synchronize()
                assert [int(state["step"]) for state in saved(optimizer)] == counted
                seen.append(contents(optimizer))
                backend.traffic.reset()
                optimizer.synchronize()
                assert backend.traffic.collectives == 0
                assert contents(optimizer) == seen[-1]
            elif KINDS[number] != "local":
                seen.append(contents(optimizer))
        return seen

    first, second = run_threads(2, train)
    assert first == second


def test_synchronize_of_one_rank_or_before_the_first_step_changes_nothing() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        optimizer.synchronize()
        assert bits(params) == bits(parameters())
        if backend.size == 1:
            for number in range(15):
                step(optimizer, gradients(params, 0, number))
                before = contents(optimizer)
                optimizer.synchronize()
                assert contents(optimizer) == before

    for world_size in (1, 2):
        run_threads(world_size, train)
