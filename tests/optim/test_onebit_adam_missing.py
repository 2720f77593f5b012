"""OnebitAdam where gradients are missing, for a step or for good, and where a group has nothing to step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam
from tests.comm.samples import bits
from tests.optim.samples import FREEZE_SOON, Gradients, contents, gradients, parameters, run, step


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_gradient_that_is_none_counts_as_zero_once_its_parameter_is_known(world_size: int) -> None:
    def with_zeros(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = sometimes_none(params, rank, number)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, made, strict=True)]

    def sometimes_none(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(params, rank, number)
        everywhere = number >= 4  # after the freeze; before it, at most on some ranks
        return [None if (i + number) % 3 == 0 and (everywhere or rank > 0) else g for i, g in enumerate(made)]

    expected = run_threads(world_size, run, 10, contents, with_zeros, parameters, FREEZE_SOON)
    assert run_threads(world_size, run, 10, contents, sometimes_none, parameters, FREEZE_SOON) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_parameter_without_gradients_in_warm_up_is_left_alone_for_good_and_told_once(
    world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    def late(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(params, rank, number)
        if number < 6 or rank > 0:
            made[3] = None
        return made

    def never(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        return [None if i == 3 else g for i, g in enumerate(gradients(params, rank, number))]

    with caplog.at_level(logging.WARNING, "onebit"):
        expected = run_threads(world_size, run, 10, contents, never, parameters, FREEZE_SOON)
        assert not caplog.records
        seen = run_threads(world_size, run, 10, contents, late, parameters, FREEZE_SOON)
    assert seen == expected
    assert seen[0][-1][3] == (bits(parameters()[3]), {})
    (record,) = caplog.records
    assert "rank 0: parameters [3] have their first gradient after the freeze" in record.getMessage()
    assert "add_param_group" in record.getMessage()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_steps_without_any_gradient_change_nothing_but_the_count(world_size: int, bias_correction: bool) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend, bias_correction=bias_correction)
        for number in range(4):
            step(optimizer, [None] * len(params))
            assert optimizer.phase() == ("warmup" if number < 1 else "compressed")
        assert bits(params) == bits(parameters())
        assert not any(optimizer.state[p] for p in params)
        optimizer.state_dict()

    run_threads(world_size, train)


def test_groups_without_parameters_or_elements_are_stepped_and_saved() -> None:
    def train(backend: Backend) -> None:
        empty = [Parameter(torch.empty(0)), Parameter(torch.empty(3, 0))]
        optimizer = OnebitAdam([{"params": empty}, {"params": []}], freeze_step=2, backend=backend)
        for _ in range(4):
            step(optimizer, [torch.zeros_like(p) for p in empty])
            optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.phase() == "compressed"

    for world_size in (1, 2):
        run_threads(world_size, train)
