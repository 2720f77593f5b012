"""Gives up on NCCL collectives that a peer has left unfinished, so that they end in an error and not with the process.

NCCL's kernels wait for a peer for ever, and all that is queued behind them waits too; PyTorch's watchdog then ends the
process. Told not to, it leaves the device waiting, and this thread ends that: it marks the group as broken, in host
memory that the device reads when it comes so far, and then aborts the communicators, which lets the kernels return.
What they leave behind is worthless, and `Watch.trusted` is false for it, so that steps made of it are not made.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TICK = 0.05  # seconds between two looks


class Watch:
    """Watches whether the device, and a host that waits for it, still get on.

    Args:
        limit: tells how many seconds nothing may happen for.
        give_up: called once, by a thread of its own, with what was not done and after how many seconds; it must let
            the device go on.
    """

    def __init__(self, limit: Callable[[], float], give_up: Callable[[str, float], None]) -> None:
        self._limit = limit
        self._give_up = give_up
        self._pinned = torch.cuda.is_available()
        self._broken = torch.zeros((), dtype=torch.bool, pin_memory=self._pinned)
        self._markers: deque[Tensor] = deque()
        self._waiting: tuple[str, float] | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def trusted(self, made: Tensor) -> Tensor:
        """Return `made`, 0-dim bool, but false if collectives queued before were given up; the host does not wait.

        That the device comes so far is watched from now on.
        """
        broken = torch.empty_like(made).copy_(self._broken, non_blocking=True)
        marker = torch.zeros((), dtype=torch.bool, pin_memory=self._pinned)
        marker.copy_(torch.ones_like(made), non_blocking=True)
        self.expect(marker)
        return made & ~broken

    def expect(self, marker: Tensor) -> None:
        """Watch that `marker`, 0-dim bool in host memory, becomes true, in its turn."""
        with self._lock:
            while self._markers and self._markers[0]:  # not in the thread: freeing pinned memory asks the device
                self._markers.popleft()
            self._markers.append(marker)
        self._start()

    @contextlib.contextmanager
    def limited(self, operation: str) -> Iterator[None]:
        """Watch that the host comes to the end of a `with` block in which it may wait for the device."""
        self._waiting = (operation, time.monotonic())
        self._start()
        try:
            yield
        finally:
            self._waiting = None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), name="onebit watch", daemon=True)
            self._thread.start()

    def _first(self) -> Tensor | None:
        with self._lock:
            return next((marker for marker in self._markers if not marker), None)

    def _trip(self, operation: str, waited: float) -> None:
        self._broken.fill_(True)  # first, for then the kernels return
        self._give_up(operation, waited)


def _run(reference: weakref.ref[Watch]) -> None:
    """Look every so often, as long as there is somebody to look for."""
    oldest, since = None, time.monotonic()
    while True:
        time.sleep(TICK)
        watch = reference()
        if watch is None:
            return
        first, waiting, now = watch._first(), watch._waiting, time.monotonic()
        if first is None or first is not oldest:
            oldest, since = first, now
        if first is not None and now - since > watch._limit():
            return watch._trip("step", now - since)
        if waiting is not None and now - waiting[1] > watch._limit():
            return watch._trip(waiting[0], now - waiting[1])
        del watch, first
