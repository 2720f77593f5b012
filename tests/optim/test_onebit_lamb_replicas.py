"""OnebitLamb's ranks hold the same bits after every step, and nothing around a parameter changes any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitLamb
from tests.comm.samples import bits
from tests.optim.lamb_runs import PUBLISHED, SOON, everything, of_threads
from tests.optim.samples import Gradients, contents, gradients, in_rows, mixed, parameters, patchy, step


@pytest.mark.parametrize("options", [{"master_weights": True}, PUBLISHED], ids=["masters", "factor"])
@pytest.mark.parametrize("given", [gradients, patchy])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_everything_is_bit_equal_on_all_ranks_after_every_step(
    world_size: int, given: Callable[..., Gradients], options: dict[str, Any]
) -> None:
    options = {**SOON, **options}
    first, *others = of_threads(world_size, 12, everything, given=given, start=mixed, **options)
    for seen in others:
        assert seen == first
    assert len({repr(state) for state in first}) == 12


@pytest.mark.parametrize("factor", [{}, PUBLISHED], ids=["no factor", "factor"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bucket_size_and_order_of_registration_change_no_bit(world_size: int, factor: dict[str, float]) -> None:
    order = [5, 0, 6, 3, 2, 1, 4]

    def permuted(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(mixed(), rank, number)
        return [made[i] for i in order]

    options = {**SOON, **factor}
    usual = of_threads(world_size, 10, contents, start=mixed, **options)
    otherwise = of_threads(
        world_size, 10, contents, given=permuted, start=lambda: mixed(order), bucket_mb=2.0**-13, **options
    )
    for one, other in zip(usual, otherwise, strict=True):
        for now, then in zip(one, other, strict=True):
            assert [now[i] for i in order] == then


def test_strides_of_parameters_change_no_bit() -> None:
    assert not all(p.is_contiguous() for p in parameters())
    for options in (SOON, {**SOON, **PUBLISHED}):
        assert of_threads(2, 8, contents, **options) == of_threads(2, 8, contents, start=in_rows, **options)


def test_groups_do_what_each_would_do_alone() -> None:
    settings: list[dict[str, Any]] = [
        {"freeze_step": 2, "lr": 1e-2},
        {"freeze_step": 5, "max_coeff": 0.2, "weight_decay": 0.3, **PUBLISHED},
        {"freeze_step": 2, "compress": False},
    ]
    bounds = [slice(0, 3), slice(3, 5), slice(5, 7)]

    def compare(backend: Backend) -> None:
        together, alone = parameters(), parameters()
        groups = [{"params": together[b], **o} for b, o in zip(bounds, settings, strict=True)]
        whole = OnebitLamb(groups, freeze_step=1, backend=backend)
        parts = [
            OnebitLamb([{"params": alone[b], **o}], freeze_step=1, backend=backend)
            for b, o in zip(bounds, settings, strict=True)
        ]
        for number in range(8):
            expected = ["warmup" if number < limit else "compressed" for limit in (2, 5)]
            assert [whole.phase(g) for g in range(3)] == [*expected, "dense"]
            given = gradients(together, backend.rank, number)
            step(whole, given)
            for b, part in zip(bounds, parts, strict=True):
                step(part, given[b])
            assert contents(whole) == [entry for part in parts for entry in contents(part)]
            for g, part in enumerate(parts):
                assert bits(list(whole.lamb_coefficients(g).values())) == bits(list(part.lamb_coefficients().values()))

    run_threads(2, compare)
