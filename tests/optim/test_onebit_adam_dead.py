"""Entries of OnebitAdam whose variance is 0 at the freeze are dead: they stay as they are, the living do not notice."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from tests.comm.oracle import UNIT
from tests.comm.samples import bits, worker_parts
from tests.optim.samples import Gradients, contents, gradients, run, step, values

DEAD_OPTIONS: dict[str, Any] = {"freeze_step": 5, "lr": 0.1, "weight_decay": 0.0}


def two_parameters() -> list[Parameter]:
    return [Parameter(values(0, shape=(3000,))), Parameter(values(2, shape=(3,)))]


def quiet(dead: Tensor) -> Callable[..., Gradients]:
    """Gradients that are zero at the dead entries for good."""

    def made(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        g = gradients(params, rank, number)
        g[0][dead] = 0.0
        return g

    return made


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("late", [False, True], ids=["zero for good", "with gradients after the freeze"])
def test_dead_entries_stay_bit_equal_to_their_start_and_hold_nothing(world_size: int, late: bool) -> None:
    dead = values(1, shape=(3000,)) < 0

    def train(backend: Backend) -> list[Any]:
        params = [Parameter(values(0, shape=(3000,))), Parameter(values(2, shape=(3,)))]
        start = bits([p[dead] for p in params[:1]])
        optimizer = OnebitAdam(params, freeze_step=5, lr=0.1, weight_decay=0.0, backend=backend)
        for number in range(40):
            g = gradients(params, backend.rank, number)
            if number < 5 or not late:
                g[0][dead] = 0.0
            step(optimizer, g)
            assert bits(params[0][dead]) == start
            state = optimizer.state_dict()["state"][0]
            assert not state["exp_avg"][dead].any()
            assert not state["exp_avg_sq"][dead].any()
        if world_size > 1:
            worker = worker_parts(optimizer.state_dict()["onebit"]["residuals"][0])
            assert not worker[0][dead].any()
            assert worker[0][~dead].any()
        assert float((params[0].detach() - values(0, shape=(3000,)))[~dead].abs().min()) > 0
        return contents(optimizer)

    per_rank = run_threads(world_size, train)
    assert all(seen == per_rank[0] for seen in per_rank)
    if late:  # the living must not notice
        without = run_threads(world_size, run, 40, contents, quiet(dead), two_parameters, DEAD_OPTIONS)
        assert per_rank[0] == without[0][-1]


@pytest.mark.parametrize("codec", [SignCodec(), SignCodec(kernels="reference")], ids=["fused", "by torch's operations"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_half_the_entries_with_zero_gradient_stay_bit_equal_to_their_start_for_500_steps(
    world_size: int, codec: SignCodec
) -> None:
    def train(backend: Backend) -> None:
        p = Parameter(values(0, shape=(300,)))
        start = p.detach().clone()
        optimizer = OnebitAdam([p], lr=1e-2, weight_decay=0.0, freeze_step=75, backend=backend, codec=codec)
        for number in range(500):
            g = values(5, number, backend.rank, shape=(300,))
            g[::2] = 0.0
            step(optimizer, [g])
        assert bits(p[::2]) == bits(start[::2])
        assert bool((p[1::2] != start[1::2]).all())

    run_threads(world_size, train)


@pytest.mark.parametrize("codec", [SignCodec(), SignCodec(kernels="reference")], ids=["fused", "by torch's operations"])
def test_dead_entries_are_remembered_as_a_bit_each_and_not_as_a_byte(codec: SignCodec) -> None:
    numel = 3007  # no other tensor here has as many elements

    def train(backend: Backend) -> int:
        p = Parameter(values(0, shape=(numel,)))
        optimizer = OnebitAdam([p], freeze_step=2, variance_refresh=3, backend=backend, codec=codec)
        for number in range(7):
            g = values(1, number, backend.rank, shape=(numel,))
            g[::2] = 0.0
            step(optimizer, [g])
        backend.barrier()  # while all ranks have theirs
        held = [t for t in gc.get_objects() if type(t) is Tensor and t.numel() == numel and t.dtype == torch.bool]
        backend.barrier()
        return len(held)

    assert run_threads(2, train) == [0, 0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_in_the_gradient_of_a_dead_entry_does_no_harm(world_size: int, bad: float) -> None:
    dead = values(1, shape=(3000,)) < 0

    def poisoned(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        g = quiet(dead)(params, rank, number)
        if number == 8 and rank == 0:
            g[0][int(dead.nonzero()[3])] = bad
        return g

    def observe(optimizer: OnebitAdam) -> Any:
        return contents(optimizer), optimizer.skipped_steps

    expected = run_threads(world_size, run, 12, observe, quiet(dead), two_parameters, DEAD_OPTIONS)
    assert run_threads(world_size, run, 12, observe, poisoned, two_parameters, DEAD_OPTIONS) == expected


def test_decoupled_weight_decay_acts_on_dead_entries_and_nothing_else_does() -> None:
    def train(backend: Backend) -> None:
        p = Parameter(torch.ones(100))
        optimizer = OnebitAdam([p], freeze_step=2, lr=0.1, weight_decay=0.5, backend=backend)
        for _ in range(10):
            step(optimizer, [torch.zeros(100)])
        # Ten factors, each rounded, and ten products.
        torch.testing.assert_close(p.detach(), torch.full((100,), 0.95**10), rtol=20 * UNIT, atol=0.0)

    run_threads(2, train)
