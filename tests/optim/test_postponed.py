"""Ctrl-C as a step ends finds it made in all groups or in none, and comes once that is so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.nn import Parameter

from onebit.comm import Backend
from onebit.optim import CompressedOptimizer, ZeroOneAdam, zero_one_adam
from onebit.optim.interrupts import Postponed
from onebit.optim.local_steps import is_open
from tests.comm.launcher import run_ranks
from tests.comm.samples import state_bits
from tests.faults.training import MAKERS
from tests.optim.samples import all_params, bits, values

SHAPES = ((33, 64), (33,), (40, 20))
STEPS = 7


def heed_ctrl_c() -> Any:
    """Let Ctrl-C raise, which it does not in a process that a shell started in its background; the handler before."""
    return signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt."""
    before = heed_ctrl_c()
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def came() -> Iterator[list[int]]:
    """Signals that a handler of Ctrl-C has seen."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGINT, before)


def strike(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_waits_from_the_beginning_to_the_end(came: list[int]) -> None:
    with Postponed() as interrupts:
        strike()
        assert came == [signal.SIGINT]
        interrupts.begin()
        strike()
        interrupts.begin()
        strike()
        assert came == [signal.SIGINT]
    assert len(came) > 1  # two that are alike may come as one
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler)
    handler(signal.SIGINT, None)
    assert came[-1] == signal.SIGINT


@pytest.mark.usefixtures("heeded")
def test_what_it_raises_comes_with_what_the_block_raised() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Postponed() as interrupts:  # noqa: PT012 the block is the subject
        interrupts.begin()
        strike()
        raise ValueError("of the block")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_signal_that_python_does_not_handle_is_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Postponed() as interrupts:
            interrupts.begin()
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            strike(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_have_nothing_to_postpone(came: list[int]) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with Postponed() as interrupts:
                interrupts.begin()
        except BaseException as error:  # signal.signal raises in any thread but the main one
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == []


def endured(backend: Backend, name: str, struck_at: int, ending: str) -> tuple[list[Any], list[int]]:
    """What a rank has after each of some steps; the first group's end of one is struck on rank 0.

    ending: ``"commit"``, or ``"undo"`` of a step that is skipped for a NaN; ``""``: no step is struck.
    """
    heed_ctrl_c()
    params = [Parameter(values(i, shape=shape)) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 2e-2}]
    optimizer: CompressedOptimizer = MAKERS[name](groups, lr=1e-2, backend=backend)
    seen, interrupted = [], []
    for number in range(STEPS):
        for i, p in enumerate(params):
            p.grad = values(i, number, backend.rank, shape=tuple(p.shape))
        if number == struck_at and ending != "commit":
            params[-1].grad.fill_(float("nan"))  # type: ignore[union-attr]
        if number == struck_at and backend.rank == 0 and ending:
            strike_at_the_end(optimizer, ending)
        try:
            optimizer.step()
        except KeyboardInterrupt:
            interrupted.append(number)
        vars(optimizer).pop("_exchange", None)
        seen.append(([bits(p) for p in all_params(optimizer)], optimizer.param_groups[1]["step"], saved(optimizer)))
    return seen, interrupted


def saved(optimizer: CompressedOptimizer) -> Any:
    state = optimizer.state_dict()
    state["onebit"].pop("residuals")  # what is put back is so to within rounding
    return state_bits(state)


def strike_at_the_end(optimizer: CompressedOptimizer, ending: str) -> None:
    """Have Ctrl-C come when the first group's step is half made, or half put back."""
    make = optimizer._exchange

    def striking(group: Any, reducers: Any) -> Any:
        made = make(group, reducers)
        if group is optimizer.param_groups[0]:
            end: Callable[[], None] = getattr(made, ending)
            setattr(made, ending, lambda: (end(), strike(), None)[-1])
        return made

    optimizer._exchange = striking  # type: ignore[method-assign]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("ending", ["commit", "undo"])
@pytest.mark.parametrize("struck_at", [1, 5])
def test_a_step_is_made_in_all_groups_or_in_none(name: str, ending: str, struck_at: int) -> None:
    (seen, interrupted), (others, _) = run_ranks("gloo", 2, endured, name, struck_at, ending)
    undisturbed = run_ranks("gloo", 2, endured, name, struck_at if ending == "undo" else -1, "")[0][0]
    assert interrupted == [struck_at]
    assert [what[:2] for what in seen] == [what[:2] for what in others] or name == "ZeroOneAdam"  # local steps differ
    assert seen == undisturbed


def synchronized(backend: Backend, struck: bool) -> tuple[list[bytes], bool]:
    """Parameters after an interval that `synchronize` has ended, and whether it was interrupted."""
    heed_ctrl_c()
    params = [Parameter(values(i, shape=shape)) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer: ZeroOneAdam = MAKERS["ZeroOneAdam"](groups, lr=1e-2, backend=backend)
    while not all(is_open(optimizer._known(group).states) for group in optimizer.param_groups):
        for i, p in enumerate(params):
            p.grad = values(i, optimizer.param_groups[0]["step"], backend.rank, shape=tuple(p.shape))
        optimizer.step()
    if struck and backend.rank == 0:
        strike_once(zero_one_adam.SyncExchange)
    try:
        optimizer.synchronize()
    except KeyboardInterrupt:
        return [bits(p) for p in params], True
    return [bits(p) for p in params], False


def strike_once(kind: Any) -> None:
    """Have Ctrl-C come when the first exchange of a kind is committed; for processes of their own."""
    commit, committed = kind.commit, []

    def striking(exchange: Any) -> None:
        commit(exchange)
        committed.append(exchange)
        if len(committed) == 1:
            strike()

    kind.commit = striking


def test_an_interval_ends_in_all_groups() -> None:
    (struck, interrupted), (other, _) = run_ranks("gloo", 2, synchronized, True)
    assert interrupted
    assert struck == other
    assert struck == run_ranks("gloo", 2, synchronized, False)[0][0]
