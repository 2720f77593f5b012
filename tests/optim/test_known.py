"""What a group's steps look up is kept from step to step, yet never used once something else is there."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam, ZeroOneAdam
from onebit.optim.fused import FusedMomentum
from onebit.optim.known import Known
from tests.comm.samples import bits, state_bits
from tests.optim.samples import gradients, parameters, step, through_a_file, values

States = defaultdict[Tensor, dict[str, Any]]
FREEZE = 2


def some(n: int = 4) -> tuple[list[Parameter], States]:
    """Parameters, the third of which has no variance, and their states."""
    params = [Parameter(torch.zeros(3)) for _ in range(n)]
    states: States = defaultdict(dict)
    for i, p in enumerate(params):
        if i != 2:
            states[p] = {"step": torch.tensor(float(i)), "variance_step": torch.ones(()), "exp_avg_sq": torch.ones(3)}
    return params, states


def test_a_step_counts_for_each_of_the_parameters_that_have_a_variance() -> None:
    params, states = some()
    known = Known(params, states)
    assert known.indices == [0, 1, 3]
    assert all(p is params[i] for p, i in zip(known.params, known.indices, strict=True))
    known.count()
    assert [float(states[p]["step"]) for p in known.params] == [1.0, 2.0, 4.0]
    states[params[1]]["step"].add_(5.0)  # by somebody else
    known.count()
    assert [float(states[p]["step"]) for p in known.params] == [2.0, 8.0, 5.0]
    assert list(known.of([None, None, torch.ones(3), torch.zeros(3)])[:2]) == [None, None]
    assert len(states) == 3, "looking must add no entry"


CHANGES: dict[str, Callable[[list[Parameter], States], object]] = {
    "another parameter": lambda params, states: params.__setitem__(0, Parameter(torch.zeros(3))),
    "one more parameter": lambda params, states: params.append(Parameter(torch.zeros(3))),
    "one parameter less": lambda params, states: params.pop(),
    "another order": lambda params, states: params.reverse(),
    "another state": lambda params, states: states.__setitem__(params[0], dict(states[params[0]])),
    "another count": lambda params, states: states[params[3]].__setitem__("step", torch.zeros(())),
    "another count of the variance's": lambda params, states: states[params[3]].__setitem__(
        "variance_step", torch.ones(())
    ),
    "no count": lambda params, states: states[params[3]].pop("step"),
    "no state": lambda params, states: states.pop(params[1]),
    "a first variance": lambda params, states: states[params[2]].update(
        step=torch.zeros(()), exp_avg_sq=torch.zeros(3)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_else_is_there_is_noticed(change: Callable[[list[Parameter], States], object]) -> None:
    params, states = some()
    known = Known(params, states)
    assert known.still(params, states)
    known.count()
    assert known.still(list(params), states)
    change(params, states)
    assert not known.still(params, states)


def test_an_entry_that_was_empty_is_noticed_when_it_is_filled() -> None:
    params, states = some()
    entry = states[params[2]]  # made by looking
    known = Known(params, states)
    assert known.indices == [0, 1, 3]
    entry.update(step=torch.zeros(()), exp_avg_sq=torch.zeros(3))
    assert not known.still(params, states)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [OnebitAdam, ZeroOneAdam])
def test_what_moves_between_steps_is_read_and_written_where_it_is_then(kind: type[Any], fused: bool) -> None:
    """A twin keeps its memory; the other's is exchanged before every step, in every way that keeps the numbers."""

    def train(backend: Backend) -> None:
        params, twins = parameters(), parameters()
        codec = SignCodec() if fused else SignCodec(kernels="reference")
        frozen = {"freeze_step" if kind is OnebitAdam else "var_freeze_step": FREEZE}
        made = [kind(ps, lr=1e-2, **frozen, backend=backend, codec=codec) for ps in (params, twins)]
        for number in range(FREEZE + 6):
            if number > FREEZE:
                move(made[0], number)
            for optimizer, ps in zip(made, (params, twins), strict=True):
                step(optimizer, gradients(ps, backend.rank, number))
            assert bits(params) == bits(twins), number
            assert [optimizer.param_groups[0]["step"] for optimizer in made] == [number + 1] * 2
            saved = [optimizer.state_dict()["state"] for optimizer in made]
            assert state_bits(saved[0]) == state_bits(saved[1]), number
            assert {float(state["step"]) for state in saved[0].values()} == {number + 1.0}

    def move(optimizer: Any, number: int) -> None:
        params = optimizer.param_groups[0]["params"]
        for p in params:
            state = optimizer.state[p]
            if number % 3 == 0:
                optimizer.state[p] = {key: v.clone() if isinstance(v, Tensor) else v for key, v in state.items()}
            elif number % 3 == 1:
                state["step"] = state["step"].clone()
                p.data = p.data.clone()
            else:
                state["exp_avg_sq"] = state["exp_avg_sq"].clone()
        optimizer.param_groups[0]["params"] = list(params)

    run_threads(2, train)


def test_a_gradient_in_other_memory_of_other_strides_or_none_is_taken_as_it_is() -> None:
    def train(backend: Backend) -> None:
        params, twins = ([Parameter(values(1, shape=(40, 60))), Parameter(values(2, shape=(7,)))] for _ in range(2))
        made = [OnebitAdam(ps, lr=1e-2, freeze_step=FREEZE, backend=backend) for ps in (params, twins)]
        for number in range(FREEZE + 8):
            given = gradients(params, backend.rank, number)
            for p, g in zip(twins, given, strict=True):
                p.grad = None if g is None or number % 4 == 3 else g.clone()
            for p, g in zip(params, given, strict=True):
                if number % 4 == 3:
                    p.grad = None
                elif number % 4 == 2 and p.grad is not None and g is not None:
                    p.grad.copy_(g)
                elif g is not None:
                    p.grad = g.t().contiguous().t() if number % 4 else g
            for optimizer in made:
                optimizer.step()
            assert bits(params) == bits(twins), number

    run_threads(2, train)


def test_counts_that_share_memory_are_saved_and_loaded_one_by_one() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=FREEZE, backend=backend)
        for number in range(FREEZE + 2):
            step(optimizer, gradients(params, backend.rank, number))
        saved = through_a_file(optimizer.state_dict())
        others = parameters()
        other = OnebitAdam(others, freeze_step=FREEZE, backend=backend)
        other.load_state_dict(saved)
        for optimizer_, ps, steps in ((other, others, 1), (optimizer, params, 3)):
            for number in range(steps):
                step(optimizer_, gradients(ps, backend.rank, number))
            counts = {float(state["step"]) for state in optimizer_.state.values()}
            assert counts == {FREEZE + 2.0 + steps}
        assert {float(state["step"]) for state in saved["state"].values()} <= {FREEZE + 2.0, FREEZE + 3.0}

    run_threads(2, train)


@pytest.mark.parametrize("settles", [False, True])
def test_a_step_keeps_no_gradient_and_a_loaded_state_nothing_of_the_one_before(
    settles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: what waits for the garbage collector is memory of the device meanwhile."""
    original = FusedMomentum.__init__

    def made(self: FusedMomentum, *arguments: Any) -> None:
        original(self, *arguments)
        self.settles = settles

    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=FREEZE, backend=backend)
        saved = [through_a_file(optimizer.state_dict())]
        for number in range(FREEZE + 4):
            given = gradients(params, backend.rank, number)
            if number == FREEZE + 2 and given[0] is not None:
                given[0].fill_(torch.nan)
            step(optimizer, given)
            if number >= FREEZE:
                of_step = [weakref.ref(p.grad) for p in params]
                del given
                optimizer.zero_grad()
                assert not any(reference() is not None for reference in of_step), number
        before = [weakref.ref(state["exp_avg_sq"]) for state in optimizer.state.values()]
        optimizer.load_state_dict(saved.pop())
        assert not any(reference() is not None for reference in before)

    monkeypatch.setattr(FusedMomentum, "__init__", made)
    gc.disable()
    try:
        run_threads(2, train)
    finally:
        gc.enable()
