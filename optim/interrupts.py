"""Ctrl-C comes after what must not be left half done, and not in the midst of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from onebit.optim.exchange import Exchange

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Postponed:
    """A `with` block in which, from `begin` on, the Python handlers of `SIGNALS` wait; they run when it ends.

    Handlers run in the main thread alone, so in others there is nothing to wait.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> Postponed:
        return self

    def begin(self) -> None:
        """Have them wait; a second call changes nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if number not in self._handlers and callable(handler):  # else nothing of Python runs, and nothing raises
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for number, frame in self._came:
            self._handlers[number](number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append((number, frame))


@contextmanager
def whole(exchanges: Sequence[Exchange]) -> Iterator[Callable[[], None]]:
    """A `with` block that makes a step in all of its exchanges or in none, whatever interrupts it.

    Args:
        exchanges: those that there are so far; undone if it raises before the call.

    Yields:
        What it calls when all exchanges can be made or undone: from then on Ctrl-C waits until the block ends.
    """
    begun = False

    def begin() -> None:
        nonlocal begun
        interrupts.begin()
        begun = True

    with Postponed() as interrupts:
        try:
            yield begin
        except BaseException:
            if not begun:
                interrupts.begin()
                for exchange in exchanges:
                    exchange.undo()
            raise
