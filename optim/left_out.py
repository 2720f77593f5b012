"""Local steps of 0/1 Adam that a rank took no part in, as it had a number that is not finite."""

from __future__ import annotations

import logging

from torch import Tensor

from onebit.optim.pending import PendingSteps

_log = logging.getLogger(__name__)


class LeftOut:
    """Counts them, and says so in the log; the host need not wait for a device that finds them out.

    Attributes:
        steps: as far as the host has heard of them; `hear` makes that all.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._unheard = PendingSteps()
        self._latest: list[Tensor] = []

    def note(self, taken: Tensor, rank: int) -> None:
        """A local step of one group was taken, or this rank's contribution was left out; 0-dim bool, on any device."""
        self._latest.append(taken)
        self._unheard.add(taken, self._count, rank)
        self._unheard.poll()

    def hear(self) -> None:
        """Wait for the device where it has something to tell."""
        self._unheard.wait()

    def latest(self) -> list[Tensor]:
        """What was noted since this was called last: for every group that made a local step, whether it took part."""
        latest, self._latest = self._latest, []
        return latest

    def _count(self, taken: bool, rank: int) -> None:
        if taken:
            return
        self.steps += 1
        _log.warning(
            "rank %d: it leaves its own contribution to a local step out, as its gradient is not finite (%d so far)",
            rank,
            self.steps,
        )
