"""What a rank still knows of the order of its group's collectives, and how a failure of one ends the group's use."""

from __future__ import annotations

import time
from dataclasses import dataclass

from onebit.comm.errors import BackendError, TransportError


@dataclass
class Order:
    """Whether this rank still makes its collectives of a group in the same order as the others.

    Ranks match their collectives by order alone. If a rank has given up on one and starts another, a peer that was only
    late takes it for the one that it has come to itself, and what is averaged does not belong together.

    Attributes:
        broken_by: the collective that failed on this rank; None: all have completed.
        given_up: what was aborted, if it was none that the host waited for, and the seconds until then.
    """

    broken_by: str | None = None
    given_up: tuple[str, float] | None = None


class Guard:
    """Turns what a transport raises inside a `with` block into a `TransportError`; later blocks then raise too."""

    def __init__(self, rank: int, order: Order, operation: str) -> None:
        self._rank = rank
        self._order = order
        self._operation = operation

    def __enter__(self) -> None:
        self._since = time.monotonic()
        broken_by = self._order.broken_by
        if broken_by is not None:
            detail = f"an earlier {broken_by} of this group failed, and what comes after it would not be matched; "
            raise TransportError(self._rank, self._operation, 0.0, detail + "start again with a new group of ranks")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, BackendError):  # which says that nothing was started
            return
        if self._order.broken_by is None:
            self._order.broken_by = self._operation
        if isinstance(error, Exception) and not isinstance(error, TransportError):
            detail = f"{type(error).__name__}: {error}".strip().rstrip(".")
            raise TransportError(self._rank, self._operation, time.monotonic() - self._since, detail) from error
