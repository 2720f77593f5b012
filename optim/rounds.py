"""One step's exchanges, sent bucket by bucket while backward goes on: in one order on all ranks, and all or nothing.

Buckets are sent in the order in which gradients became ready on rank 0 in a first backward, whatever is ready first
later: a bucket waits until those before it were sent. After a bucket is sent, the one before it is passed on. So ranks
make the same collectives one after the other, also where one of them has no gradient for a bucket, which it then sends
in `step`. The last bucket is always sent in `step`: until then a rank can still say, by NaN in its place, that the step
is not to be made, and every rank hears of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit.compress import InputError
from onebit.optim.exchange import CompressedSending, Exchange, Sending, StagedExchange

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer

Place = tuple[int, int]  # a parameter: its group, and its index there


@dataclass
class _Bucket:
    """One bucket of one group's exchange, its parameters, and those whose gradients it still waits for."""

    index: int
    sending: Sending
    places: Sequence[Place]
    missing: set[Place] = field(default_factory=set)


class Round:
    """The exchanges of one step on their way: made by the first gradient of a backward, finished by `step`.

    Args:
        optimizer: whose step it is; its ranks agree, and its buckets' order is known.
        order: per parameter the number at which its gradient is expected; see `Overlap`.

    Attributes:
        sent_early: buckets that were sent before `finish`.
        buckets: all of them, in order.
    """

    def __init__(self, optimizer: CompressedOptimizer, order: dict[Place, int]) -> None:
        groups = optimizer.param_groups
        self._optimizer = optimizer
        self._gradients: list[list[Tensor | None]] = [[None] * len(group["params"]) for group in groups]
        self._versions: dict[Place, int] = {}
        self._ready: set[Place] = set()
        self._waiting: dict[Place, list[_Bucket]] = {}
        self._exchanges: list[Exchange | None] = []
        self._side: torch.cuda.Stream | None = None
        self._streams: set[torch.cuda.Stream] = set()
        self._sent = 0
        self.sent_early = 0
        self.buckets: list[_Bucket] = []
        optimizer._steps.learn_what_matters()
        optimizer._lent = {id(group): given for group, given in zip(groups, self._gradients, strict=True)}
        try:
            for group, reducers in zip(groups, optimizer._of_groups(), strict=True):
                staged = optimizer._is_staged(group)
                self._exchanges.append(optimizer._exchange(group, reducers) if staged else None)
        except BaseException:
            self.undo()
            raise
        finally:
            optimizer._lent = {}
        self._line_up(order)

    def ready(self, place: Place, side: torch.cuda.Stream | None) -> None:
        """The gradient of a parameter is there; `side`: where exchanges run beside backward, on CUDA.

        Raises:
            InputError: for the second time in this round; it has been added to already.
            TransportError: a peer is dead or too slow.
        """
        if place in self._ready:
            raise InputError(
                f"{self._who()}: parameter {place[1]} of group {place[0]} has got a second gradient before step(), and "
                "the first may have been sent; put all backward passes of a step but the last in optimizer.no_sync(), "
                "and drop gradients by optimizer.zero_grad()"
            )
        self._ready.add(place)
        self._side = side
        if side is not None:
            self._streams.add(torch.cuda.current_stream(side.device))
        for bucket in self._waiting.get(place, ()):
            bucket.missing.discard(place)
        while self._sent < self._may_be_sent and not self.buckets[self._sent].missing:
            self._send_next()
            self.sent_early += 1

    def altered(self) -> str | None:
        """What has happened since to gradients that were sent; None: nothing."""
        for place, version in self._versions.items():
            group, index = place
            sent, now = self._gradients[group][index], self._param(place).grad
            if now is not sent or (sent is not None and sent._version != version):
                return f"the gradient of parameter {index} of group {group} was changed, replaced or dropped"
        return None

    def finish(self, exchanges: list[Exchange], spoil: bool = False) -> None:
        """Send what is left, and have all groups' exchanges complete.

        Args:
            exchanges: filled, in the order of groups; what is in it has to be undone if this raises.
            spoil: send NaN for what is left, and have forgotten what cannot be undone.
        """
        exchanges.extend(exchange for exchange in self._exchanges if exchange is not None)
        if spoil:
            self._forget_overwritten()
        for group, params in enumerate(self._gradients):  # also those without elements, which are in no bucket
            self._read([(group, index) for index in range(len(params))])
        while self._sent < len(self.buckets):
            self._send_next(spoil)
        with self._beside():
            if self.buckets:
                self._pass_on(len(self.buckets) - 1)
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        self._complete(exchanges, spoil)

    def undo(self) -> None:
        """Put error feedback back, where something has failed."""
        for exchange in self._exchanges:
            if exchange is not None:
                exchange.undo()

    def _line_up(self, order: dict[Place, int]) -> None:
        """Put the buckets in the order in which their last gradient is expected; what only `step` knows comes last."""
        keys: list[tuple[bool, int, int, int]] = []
        for group, exchange in enumerate(self._exchanges):
            if not isinstance(exchange, StagedExchange):
                continue
            late = set(exchange.sending.late)
            for index, used in enumerate(exchange.sending.buckets):
                places = [(group, i) for i in used]
                missing = {place for place in places if self._param(place).requires_grad}
                keys.append((index in late, max((order[place] for place in places), default=0), -group, -index))
                self.buckets.append(_Bucket(index, exchange.sending, places, missing))
        self.buckets = [self.buckets[i] for i in sorted(range(len(keys)), key=keys.__getitem__)]
        self._may_be_sent = min(len(keys) - sum(key[0] for key in keys), len(keys) - 1)
        for bucket in self.buckets:
            for place in bucket.missing:
                self._waiting.setdefault(place, []).append(bucket)

    def _send_next(self, spoil: bool = False) -> None:
        """Send a bucket, and pass on the one before it, whose bytes have had time to travel."""
        bucket = self.buckets[self._sent]
        self._sent += 1
        if not spoil:
            self._read(bucket.places)
        with self._beside():
            (bucket.sending.spoil if spoil else bucket.sending.send)(bucket.index)
            if self._sent > 1:
                self._pass_on(self._sent - 2)

    def _pass_on(self, number: int) -> None:
        self.buckets[number].sending.pass_on(self.buckets[number].index)

    def _read(self, places: Sequence[Place]) -> None:
        """Take the gradients as they are now: these are sent, and by these error feedback is put back."""
        for place in places:
            if place not in self._versions:
                group, index = place
                g = self._gradients[group][index] = self._param(place).grad
                self._versions[place] = -1 if g is None else g._version

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Queue work beside backward's, after what backward has queued so far."""
        if self._side is None:
            yield
            return
        for stream in self._streams | {torch.cuda.current_stream(self._side.device)}:
            self._side.wait_stream(stream)
        self._streams.clear()
        with torch.cuda.stream(self._side):
            yield

    def _forget_overwritten(self) -> None:
        """Error feedback of buckets whose gradients are no more what was sent cannot be worked out any more."""
        over = {
            (group, index)
            for (group, index), version in self._versions.items()
            if (g := self._gradients[group][index]) is not None and g._version != version
        }
        for bucket in self.buckets[: self._sent]:
            if over.intersection(bucket.places):
                bucket.sending.forget(bucket.index)

    def _complete(self, exchanges: list[Exchange], spoil: bool) -> None:
        """Finish what is staged, then make the exchanges that are not, which send everything at once."""
        optimizer = self._optimizer
        pairs = list(zip(optimizer.param_groups, optimizer._of_groups(), strict=True))
        for (group, reducers), exchange, given in zip(pairs, self._exchanges, self._gradients, strict=True):
            if isinstance(exchange, StagedExchange):
                if isinstance(exchange.sending, CompressedSending):
                    optimizer._look_at_others(group, reducers, given)
                exchange.sending.finish()
        for number, (group, reducers) in enumerate(pairs):
            if self._exchanges[number] is None:
                optimizer._lent = {id(group): self._spoilt(group)} if spoil else {}
                try:
                    made = self._exchanges[number] = optimizer._exchange(group, reducers)
                finally:
                    optimizer._lent = {}
                exchanges.append(made)
                if isinstance(made, StagedExchange):
                    made.sending.finish()
        exchanges[:] = [exchange for exchange in self._exchanges if exchange is not None]

    def _spoilt(self, group: Mapping[str, Any]) -> list[Tensor | None]:
        """Gradients of a group of which no step can be made."""
        states = self._optimizer.state
        return [torch.full_like(p, torch.nan) if states.get(p) else None for p in group["params"]]

    def _param(self, place: Place) -> Tensor:
        p: Tensor = self._optimizer.param_groups[place[0]]["params"][place[1]]
        return p

    def _who(self) -> str:
        return f"rank {self._optimizer.backend.rank}: {type(self._optimizer).__name__}(overlap=True)"
