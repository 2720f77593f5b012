"""A device that does not get on, and a host that waits for it, are given up at the time limit, and not before."""

from __future__ import annotations

import gc
import threading
import time

import torch

from onebit.comm.watch import TICK, Watch

LIMIT = 0.4  # seconds
SLACK = 5.0  # seconds that a busy machine may be late


class Given:
    """Notes what was given up."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []
        self.happened = threading.Event()
        self.watch = Watch(lambda: LIMIT, self.note)

    def note(self, operation: str, waited: float) -> None:
        self.calls.append((operation, waited))
        self.happened.set()


def marker(value: bool = False) -> torch.Tensor:
    return torch.tensor(value)


def test_a_step_that_the_device_does_not_come_to_is_given_up_once_and_what_follows_is_not_trusted() -> None:
    given = Given()
    assert bool(given.watch.trusted(marker(True)))
    given.watch.expect(marker())
    assert given.happened.wait(LIMIT + SLACK)
    time.sleep(3 * TICK)
    ((operation, waited),) = given.calls
    assert operation == "step"
    assert LIMIT < waited < LIMIT + SLACK
    assert not given.watch.trusted(marker(True))


def test_a_host_that_waits_in_a_step_is_given_up_too() -> None:
    given = Given()
    with given.watch.limited("step"):
        assert given.happened.wait(LIMIT + SLACK)
    assert given.calls[0][0] == "step"


def test_steps_that_come_one_after_the_other_may_take_longer_than_the_limit_together() -> None:
    given = Given()
    markers = [marker() for _ in range(8)]
    for one in markers:
        given.watch.expect(one)
    for one in markers:
        time.sleep(LIMIT / 4)
        one.fill_(True)
        with given.watch.limited("step"):
            pass
    time.sleep(LIMIT + 4 * TICK)
    assert given.calls == []


def test_a_watch_ends_with_who_has_it() -> None:
    given = Given()
    given.watch.expect(marker())
    thread = given.watch._thread
    del given
    gc.collect()
    assert thread is not None
    thread.join(SLACK)
    assert not thread.is_alive()
