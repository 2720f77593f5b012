"""Steps that the device decides about: counted when the host has learnt of them, in order, and never needed twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakMethod

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import pending
from onebit.optim.base import CompressedOptimizer
from onebit.optim.dense import MeanGradients
from onebit.optim.exchange import Exchange, GroupReducers
from onebit.optim.pending import PendingSteps
from tests.comm.samples import bits
from tests.optim.samples import step


class Arriving:
    """An event of a device that comes when the test says so."""

    def __init__(self) -> None:
        self.here = False
        self.waited = 0

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.waited += not self.here
        self.here = True


class LatePending(PendingSteps):
    """As if every decision were on its way from a device."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Arriving] = []

    def add(self, made: Tensor, learn: Any, *about: Any) -> None:
        event = Arriving()
        self.events.append(event)
        self._queue.append(pending._Pending(made, event, WeakMethod(learn), about))


class Descent(CompressedOptimizer):
    """x <- x - mean gradient, decided about by the device in groups that settle."""

    def __init__(self, params: Any, backend: Backend, settles: bool = True) -> None:
        super().__init__(params, {"settles": settles, "lr": 1.0}, backend=backend)
        self._steps.pending = LatePending()
        self.counted = 0

    def _check_options(self, group: Mapping[str, Any]) -> None: ...

    def _planned(self, group: Mapping[str, Any], step: int) -> str:
        return f"step {step}"

    def _count_made(self, group: dict[str, Any]) -> None:
        self.counted += 1

    def _exchange(self, group: dict[str, Any], reducers: GroupReducers) -> Exchange:
        mean = MeanGradients(group["params"], self._gradients(group), reducers)
        return _Settling(group, mean) if group["settles"] else _Deciding(group, mean)


class _Deciding:
    def __init__(self, group: Mapping[str, Any], mean: MeanGradients) -> None:
        self._params = group["params"]
        self._mean = self.sending = mean

    def all_finite(self) -> Tensor:
        return self._mean.all_finite()

    def commit(self) -> None:
        torch._foreach_sub_(self._params, self._mean.means)

    def undo(self) -> None: ...


class _Settling(_Deciding):
    def settle(self, finite: Tensor) -> None:
        for p, g in zip(self._params, self._mean.means, strict=True):
            p.sub_(torch.where(finite, g, 0.0))


def make(backend: Backend, settles: tuple[bool, ...] = (True, True)) -> tuple[Descent, list[Parameter], LatePending]:
    params = [Parameter(torch.zeros(3)) for _ in settles]
    groups = [{"params": [p], "settles": s} for p, s in zip(params, settles, strict=True)]
    optimizer = Descent(groups, backend)
    late = optimizer._steps.pending
    assert isinstance(late, LatePending)
    return optimizer, params, late


def steps_of(optimizer: Descent) -> list[int]:
    return [group["step"] for group in optimizer.param_groups]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_is_made_at_once_and_counted_when_the_device_has_told(world_size: int) -> None:
    def train(backend: Backend) -> None:
        optimizer, params, late = make(backend)
        optimizer._steps._schedule_depends_on = lambda group, unknown: False  # type: ignore[method-assign]
        for number in range(3):
            step(optimizer, [torch.ones(3), torch.ones(3)])
            assert bits(params) == bits([torch.full((3,), -1.0 - number)] * 2)
            assert steps_of(optimizer) == [0, 0]
        late.events[1].here = True  # in order: the first has not come
        step(optimizer, [torch.ones(3), torch.ones(3)])
        assert steps_of(optimizer) == [0, 0]
        late.events[0].here = True
        step(optimizer, [torch.ones(3), torch.ones(3)])
        assert (steps_of(optimizer), optimizer.counted) == ([2, 2], 4)
        assert sum(event.waited for event in late.events) == 0

    run_threads(world_size, train)


def test_a_step_that_the_device_did_not_make_is_skipped_in_all_groups_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def train(backend: Backend) -> None:
        optimizer, params, _ = make(backend)
        for number in range(6):
            bad = torch.full((3,), math.nan if backend.rank == 1 and number % 2 else 1.0)
            step(optimizer, [torch.ones(3), bad])
        assert bits(params) == bits([torch.full((3,), -3.0)] * 2)
        assert optimizer.skipped_steps == 3
        assert (steps_of(optimizer), optimizer.counted) == ([3, 3], 6)

    run_threads(2, train)
    assert len([r for r in caplog.records if "step skipped" in r.getMessage()]) == 2 * 3


def test_what_needs_the_count_waits_for_it() -> None:
    def train(backend: Backend) -> None:
        optimizer, _, late = make(backend)
        step(optimizer, [torch.ones(3)] * 2)
        assert optimizer.state_dict()["param_groups"][0]["step"] == 1
        step(optimizer, [torch.ones(3)] * 2)
        state = optimizer.state_dict()
        step(optimizer, [torch.full((3,), math.inf)] * 2)
        optimizer.load_state_dict(state)
        assert optimizer.skipped_steps == 0  # what was pending belongs to what was there before
        assert steps_of(optimizer) == [2, 2]
        step(optimizer, [torch.ones(3)] * 2)
        step(optimizer, [torch.ones(3)] * 2)  # the schedule of this optimizer may depend on the step
        assert len(late) == 1
        assert steps_of(optimizer) == [3, 3]

    run_threads(1, train)


def test_one_group_that_must_know_makes_all_decide_on_the_host_in_the_order_of_the_steps() -> None:
    def train(backend: Backend) -> None:
        optimizer, params, late = make(backend)
        step(optimizer, [torch.ones(3)] * 2)
        added = Parameter(torch.zeros(3))
        optimizer.add_param_group({"params": [added], "settles": False})
        step(optimizer, [torch.ones(3)] * 3)
        assert len(late) == 0
        assert steps_of(optimizer) == [2, 2, 1]
        step(optimizer, [torch.ones(3), torch.ones(3), torch.full((3,), math.nan)])
        assert (steps_of(optimizer), optimizer.skipped_steps) == ([2, 2, 1], 1)
        assert bits([*params, added]) == bits([torch.full((3,), -2.0)] * 2 + [torch.full((3,), -1.0)])

    run_threads(2, train)


class Told(list[bool]):
    def learn(self, made: bool) -> None:
        self.append(made)


def test_a_host_far_ahead_waits_for_the_oldest() -> None:
    queue = PendingSteps()
    told = Told()
    events = [Arriving() for _ in range(pending.MOST + 3)]
    for number, event in enumerate(events):
        queue._queue.append(pending._Pending(torch.tensor(number % 2 == 0), event, WeakMethod(told.learn), ()))
    queue.add(torch.tensor(False), told.learn)
    assert told == [True, False, True, False]
    assert [event.waited for event in events] == [1] * 4 + [0] * (pending.MOST - 1)
    assert len(queue) == pending.MOST
    queue.wait()
    assert told[-2:] == [True, False]
    assert len(queue) == 0
