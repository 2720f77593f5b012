"""Steps that the device has decided about and the host has not heard of yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakMethod

import torch
from torch import Tensor

MOST = 64  # steps; a host further ahead waits, so that what it keeps for them stays small


class _Event(Protocol):
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class _Pending:
    made: Tensor  # 0-dim bool in host memory, valid once `event` has come
    event: _Event | None
    learn: WeakMethod[Callable[..., None]]
    about: tuple[Any, ...]


class PendingSteps:
    """A queue of decisions on their way from the device, told to the host in the order of the steps."""

    def __init__(self) -> None:
        self._queue: deque[_Pending] = deque()

    def __len__(self) -> int:
        """Return the number of steps whose fate the host does not know."""
        return len(self._queue)

    def add(self, made: Tensor, learn: Callable[..., None], *about: Any) -> None:
        """Have `learn` called with the value of `made` and with `about`, by a later `poll` or `wait`.

        Args:
            made: 0-dim bool on any device.
            learn: a method, of what has this queue; it is not kept alive, for what is in a cycle is freed late.
            about: what else it is to be told.
        """
        event: _Event | None = None
        if made.device.type == "cuda":
            stream = torch.cuda.current_stream(made.device)
            made = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(made, non_blocking=True)
            event = stream.record_event()
        self._queue.append(_Pending(made, event, WeakMethod(learn), about))
        while len(self._queue) > MOST:
            self._tell()

    def poll(self) -> None:
        """Tell what has arrived; waits for nothing."""
        while self._queue:
            event = self._queue[0].event
            if event is not None and not event.query():
                return
            self._tell()

    def wait(self) -> None:
        """Tell everything, waiting for the device where it must."""
        while self._queue:
            self._tell()

    def _tell(self) -> None:
        first = self._queue.popleft()
        if first.event is not None:
            first.event.synchronize()
        learn = first.learn()
        assert learn is not None, "who has a queue outlives it"
        learn(bool(first.made), *first.about)
