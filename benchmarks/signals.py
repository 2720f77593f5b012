"""Signals that wait for a good moment, so that what has been started is known and can be ended."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back inside the block; main thread only.

    Yields:
        A function that raises what has come in the meantime: KeyboardInterrupt, or SystemExit with 128 + the signal's
        number. It is called once more when the block is left without an exception.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    def release() -> None:
        if seen:
            number = seen.pop()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield release
        release()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
