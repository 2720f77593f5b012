"""What can go wrong between ranks: no such backend, ranks that disagree, a peer that does not answer."""

from __future__ import annotations

from onebit.compress.errors import OnebitError


class BackendError(OnebitError):
    """A backend is unknown, its package is absent, or it cannot carry the tensors it was given."""


class MismatchError(OnebitError):
    """Ranks do not agree on what they are about to exchange, before any payload moves, or on what all of them hold.

    Raised on every rank.
    """


class TransportError(OnebitError):
    """A collective did not complete: a peer is dead, slow beyond the timeout, or the transport failed.

    Attributes:
        rank: the rank that raised.
        operation: the collective that did not complete, such as ``"all_to_all"``.
        waited: seconds that this rank waited for it.
    """

    def __init__(self, rank: int, operation: str, waited: float, detail: str) -> None:
        super().__init__(
            f"rank {rank}: {operation} did not complete after {waited:.1f} s: {detail}. "
            "A peer may have died, have made fewer calls, or be slower than the timeout; see its log, or pass a larger "
            "timeout= to make_backend"
        )
        self.rank = rank
        self.operation = operation
        self.waited = waited
