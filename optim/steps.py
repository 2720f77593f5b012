"""The steps of an optimizer: all groups exchange, then all make the step or none does, as the host or device finds."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit.optim.exchange import DeviceExchange, DraftedExchange, Exchange, StagedExchange
from onebit.optim.interrupts import whole
from onebit.optim.pending import PendingSteps
from onebit.optim.replicas import check_replicas

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer

_log = logging.getLogger(__name__)


class Steps:
    """Makes an optimizer's steps, each in all groups or in none.

    A step is skipped if some rank has a number that is not finite. The host finds that out, and waits for the device
    where there is one; or, if the exchanges of all groups are `DeviceExchange`s, the device does, and the host hears
    of it later.

    Args:
        optimizer: whose they are; not kept alive by this.

    Attributes:
        pending: steps that the host has not heard of.
        skipped: those that were skipped, of all that it has heard of.
    """

    def __init__(self, optimizer: CompressedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._calls = 0
        self.pending = PendingSteps()
        self.skipped = 0

    def make(self, exchange_all: Callable[[list[Exchange]], None], *, on_device: bool = True) -> None:
        """Make a step, or skip it; nothing is changed if it raises, but by an interrupt that comes as it ends.

        Args:
            exchange_all: fills a list with the exchanges of all groups, in order; they are undone if it raises.
            on_device: the device may decide whether it is made.
        """
        optimizer = self._owner()
        exchanges: list[Exchange] = []
        with whole(exchanges) as begin_to_end:
            with optimizer.backend.limited("step"):
                exchange_all(exchanges)
                flags = [exchange.all_finite() for exchange in exchanges]
                settling = _settling(exchanges, flags) if on_device else []
                made = not settling and all(bool(flag) for flag in flags)
                for exchange in exchanges if made else ():
                    if isinstance(exchange, DraftedExchange):
                        exchange.draft()
            if not settling:
                self.pending.wait()
            optimizer.backend.check()
            begin_to_end()
            if settling:
                self._settle(settling, flags[0] if len(flags) == 1 else torch.stack(flags).all())
            else:
                self._decide(exchanges, made)
        optimizer.gradients_averaged = False
        self._calls += 1
        if optimizer._check_every and self._calls % optimizer._check_every == 0:
            check_replicas(optimizer)
        if optimizer._overlap is not None:
            optimizer._overlap.watch()

    def exchange_all(self, exchanges: list[Exchange]) -> None:
        """Exchange what a step needs, one group after the other, and fill the list with the exchanges."""
        self.learn_what_matters()
        optimizer = self._owner()
        for group, reducers in zip(optimizer.param_groups, optimizer._of_groups(), strict=True):
            exchanges.append(optimizer._exchange(group, reducers))
            if isinstance(exchanges[-1], StagedExchange):
                exchanges[-1].sending.finish()

    def learn_what_matters(self) -> None:
        """Hear of the steps whose outcome the next one's collectives depend on, waiting for the device if need be."""
        self.pending.poll()
        if any(self._schedule_depends_on(group, len(self.pending)) for group in self._owner().param_groups):
            self.pending.wait()

    def _schedule_depends_on(self, group: Mapping[str, Any], unknown: int) -> bool:
        """Whether a group's next collectives depend on how many of the last `unknown` steps were made."""
        planned = self._owner()._planned
        return len({planned(group, group["step"] + made) for made in range(unknown + 1)}) > 1

    def _settle(self, exchanges: list[DeviceExchange], made: Tensor) -> None:
        """Leave it to the device whether the step is made."""
        optimizer = self._owner()
        made = optimizer.backend.trusted(made)
        for exchange in exchanges:
            exchange.settle(made)
        optimizer._tell_scaler(made)
        self.pending.add(made, self._learn, list(optimizer.param_groups))

    def _learn(self, made: bool, groups: list[dict[str, Any]]) -> None:
        """Hear what the device has decided about a step of these groups."""
        optimizer = self._owner()
        if not made:
            if optimizer.backend.sound:  # else the step was given up, which is told by an error
                self._skip()
            return
        for group in groups:
            group["step"] += 1
            optimizer._count_made(group)

    def _decide(self, exchanges: list[Exchange], made: bool) -> None:
        """Make the step in all groups, or in none."""
        optimizer = self._owner()
        if made:
            for group, exchange in zip(optimizer.param_groups, exchanges, strict=True):
                group["step"] += 1
                exchange.commit()
        else:
            for exchange in exchanges:
                exchange.undo()
            self._skip()
        optimizer._tell_scaler(torch.tensor(made))

    def _skip(self) -> None:
        self.skipped += 1
        _log.warning(
            "rank %d: step skipped, some rank has a non-finite gradient (%d so far)",
            self._owner().backend.rank,
            self.skipped,
        )

    def _owner(self) -> CompressedOptimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer


def _settling(exchanges: list[Exchange], flags: list[Tensor]) -> list[DeviceExchange]:
    """The exchanges, if the device alone can decide about them all; else none."""
    settling = [exchange for exchange in exchanges if isinstance(exchange, DeviceExchange)]
    together = len(settling) == len(exchanges) and len({flag.device for flag in flags}) == 1
    return settling if together else []
