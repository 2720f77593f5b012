"""OnebitAdam's ranks hold the same bits after every step, and nothing around a parameter changes any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from tests.optim.samples import (
    FREEZE_SOON,
    Gradients,
    all_params,
    contents,
    gradients,
    in_rows,
    mixed,
    parameters,
    patchy,
    run,
    step,
    strided_too,
)


@pytest.mark.parametrize("given", [gradients, patchy])
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_parameters_and_moments_are_bit_equal_on_all_ranks_after_every_step(
    world_size: int, given: Callable[..., Gradients]
) -> None:
    first, *others = run_threads(world_size, run, 12, contents, given, mixed, FREEZE_SOON)
    for seen in others:
        assert seen == first
    assert len({repr(state) for state in first}) == 12


@pytest.mark.parametrize("codec", [SignCodec(), SignCodec(block_size=None, scale="rms")], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bucket_size_and_order_of_registration_change_no_bit(world_size: int, codec: SignCodec) -> None:
    order = [5, 0, 6, 3, 2, 1, 4]

    def permuted(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(mixed(), rank, number)
        return [made[i] for i in order]

    options = {"freeze_step": 4, "lr": 1e-2, "codec": codec}
    usual = run_threads(world_size, run, 10, contents, gradients, mixed, options)
    otherwise = run_threads(
        world_size, run, 10, contents, permuted, lambda: mixed(order), {**options, "bucket_mb": 2.0**-13}
    )
    for one, other in zip(usual, otherwise, strict=True):
        for now, then in zip(one, other, strict=True):
            assert [now[i] for i in order] == then


@pytest.mark.parametrize("world_size", [1, 2])
def test_strides_of_parameters_and_gradients_change_no_bit(world_size: int) -> None:
    expected = run_threads(world_size, run, 8, contents, gradients, in_rows, FREEZE_SOON)
    assert not all(p.is_contiguous() for p in parameters())
    for given in (gradients, strided_too):
        assert run_threads(world_size, run, 8, contents, given, parameters, FREEZE_SOON) == expected


def test_groups_do_what_each_would_do_alone() -> None:
    settings: list[dict[str, Any]] = [
        {"freeze_step": 2, "lr": 1e-2},
        {"freeze_step": 5, "lr": 1e-3, "betas": (0.5, 0.9), "weight_decay": 0.3},
        {"freeze_step": 100, "adamw_mode": False},
    ]
    bounds = [slice(0, 3), slice(3, 5), slice(5, 7)]

    def train(backend: Backend) -> None:
        together, alone = parameters(), parameters()
        groups = [{"params": together[b], **o} for b, o in zip(bounds, settings, strict=True)]
        whole = OnebitAdam(groups, freeze_step=1, backend=backend)
        parts = [OnebitAdam(alone[b], backend=backend, **o) for b, o in zip(bounds, settings, strict=True)]
        for number in range(8):
            expected = ["warmup" if number < o["freeze_step"] else "compressed" for o in settings]
            assert [whole.phase(g) for g in range(3)] == expected
            given = gradients(together, backend.rank, number)
            step(whole, given)
            for b, part in zip(bounds, parts, strict=True):
                step(part, given[b])
            assert contents(whole) == [entry for part in parts for entry in contents(part)]

    run_threads(2, train)


def test_a_group_added_in_the_middle_makes_its_own_warm_up_and_disturbs_nobody() -> None:
    def train(backend: Backend) -> None:
        old, new, alone = parameters()[:4], parameters()[4:], parameters()[4:]
        optimizer = OnebitAdam(old, freeze_step=3, backend=backend)
        undisturbed = OnebitAdam(parameters()[:4], freeze_step=3, backend=backend)
        added = OnebitAdam(alone, freeze_step=2, lr=0.5, backend=backend)
        for number in range(9):
            if number == 5:
                optimizer.add_param_group({"params": new, "freeze_step": 2, "lr": 0.5})
            given = gradients([*old, *new], backend.rank, number)
            step(optimizer, given[: len(all_params(optimizer))])
            step(undisturbed, given[:4])
            assert contents(optimizer, old) == contents(undisturbed)
            if number >= 5:
                step(added, given[4:])
                assert contents(optimizer, new) == contents(added)
                assert optimizer.phase(1) == ("warmup" if number < 6 else "compressed")

    run_threads(3, train)
