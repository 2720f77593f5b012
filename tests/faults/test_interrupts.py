"""An interrupt in the middle of a step, as by Ctrl-C, leaves an optimizer that is whole and can be saved."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from onebit.comm import Backend, TransportError, run_threads
from onebit.optim import ZeroOneAdam
from tests.faults.training import MAKERS, Moment, give_gradients, make

MADE = (2, 6, 9)  # steps before; what follows are steps of every phase that needs the other ranks


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("operation", ["_all_to_all", "_all_gather"])
def test_a_rank_that_is_interrupted_in_a_collective_has_what_it_had_before_the_step(
    operation: str, name: str, made: int
) -> None:
    def train(backend: Backend) -> None:
        optimizer = make(name, backend)
        for number in range(made):
            give_gradients(optimizer, backend.rank, number)
            optimizer.step()
        before, original, calls = Moment.of(optimizer), getattr(backend, operation), []

        def interrupted(output: Tensor, input: Tensor) -> Any:
            calls.append(operation)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(output, input)

        backend.timeout = 0.5
        if backend.rank == 1:
            setattr(backend, operation, interrupted)
        caught: BaseException | None = None
        while caught is None:  # a local step of 0/1 Adam needs no other rank
            before = Moment.of(optimizer)
            give_gradients(optimizer, backend.rank, made)
            try:
                optimizer.step()
            except (KeyboardInterrupt, TransportError) as error:
                caught = error
        assert isinstance(caught, KeyboardInterrupt if backend.rank == 1 else TransportError)
        assert Moment.of(optimizer).fits(before)
        give_gradients(optimizer, backend.rank, made)
        with pytest.raises(TransportError, match="of this group failed"):
            optimizer.step()
        assert Moment.of(optimizer).fits(before)

    run_threads(2, train)


@pytest.mark.parametrize("fatal", [1, 3, 4, 5, 6, 8, 9])
def test_a_synchronisation_is_made_in_all_groups_or_in_none(fatal: int) -> None:
    def train(backend: Backend) -> int:
        optimizer = make("ZeroOneAdam", backend)
        assert isinstance(optimizer, ZeroOneAdam)
        for number in range(7):
            give_gradients(optimizer, backend.rank, number)
            optimizer.step()
        before, calls, original = Moment.of(optimizer), [], {}

        def failing(name: str) -> Any:
            def call(output: Tensor, input: Tensor) -> Any:
                calls.append(name)
                return 1 / 0 if len(calls) == fatal else original[name](output, input)

            return call

        for name in ("_all_to_all", "_all_gather"):
            original[name] = getattr(backend, name)
            setattr(backend, name, failing(name))
        try:
            optimizer.synchronize()
        except TransportError:
            assert Moment.of(optimizer).fits(before)
        else:
            assert not Moment.of(optimizer).fits(before)
        return len(calls)

    collectives = 8  # two for each of four buckets
    assert run_threads(2, train) == [min(fatal, collectives)] * 2
