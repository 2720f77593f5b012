"""One compressed average under way: its parts are sent, passed on, received, and then decoded, accepted or undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onebit.comm.bucket import Bucket
from onebit.comm.part import Part
from onebit.comm.plain import PlainPart
from onebit.comm.tensors import Tensors, all_finite, as_list, check_same, check_targets
from onebit.compress.errors import InputError

if TYPE_CHECKING:
    from onebit.comm.allreduce import CompressedAllreduce


class CompressedWork:
    """One compressed average under way; it ends with one of `wait`, `decode`, `accept`, `undo` and `settle_server`."""

    def __init__(
        self,
        owner: CompressedAllreduce,
        encode: Callable[[Part], None],
        undo_encode: Callable[[Part], None] | None,
        given: Sequence[Tensor] | None = None,
    ) -> None:
        self._owner = owner
        self._buckets = owner._buckets
        self._encode = encode
        self._undo_encode = undo_encode
        self._given = given
        self._to_send = set(range(len(self._buckets)))
        self._to_pass_on = set(self._to_send)
        self._lost: set[int] = set()
        self._in_line = False
        self._received = False
        self._stages = owner._stages

    def send(self, index: int) -> None:
        """Encode one part and start sending it, where `start_with` was told not to; every rank in the same order.

        Raises:
            TransportError: the transport refused to start; the error feedback of all parts is as before.
        """
        self._send(index, in_line=False)

    def spoil(self, index: int) -> None:
        """Instead of `send`: send NaN for this part and encode nothing, so that `all_finite` is false on all ranks.

        Where no element of the part takes part, as all are masked, the others do not hear of it.
        """
        self._to_send.discard(index)
        self._buckets[index].spoil()
        with self._stages[self._buckets[index].first_stage]:
            self._buckets[index].exchange(in_line=False)

    def pass_on(self, index: int) -> None:
        """Wait for phase 1 of a part that was sent and start phase 2; `finish` does it for those that are left.

        Raises:
            TransportError: a peer is dead or too slow; the error feedback of all parts is as before.
        """
        in_line = len(self._buckets) == 1  # what follows waits for it
        bucket = self._buckets[index]
        self._to_pass_on.discard(index)
        bucket.send_on(self._stages)
        with self._stages["all_to_all"]:
            bucket.wait_exchange()
        with self._stages["reduce_encode"]:
            bucket.reduce_encode()
        with self._stages["all_gather"]:
            bucket.gather(in_line)

    def forget(self, index: int) -> None:
        """What this part has encoded has been overwritten since: an undoing makes its error feedback 0.

        With `local_group` the node's mean was encoded; if that is kept, as where a backend brings it, all is put back.
        """
        self._lost.add(index)

    def wait(self) -> None:
        """Replace the tensors given to `start` by their mean over ranks.

        Raises:
            InputError: `start_with` made this work, so there are no tensors; nothing was changed.
            TransportError: a peer is dead or too slow. Buckets that were complete are averaged, the others keep their
                values, and their error feedback is as before `start` to within rounding.
        """
        if self._given is None:
            raise InputError(
                f"rank {self._owner.backend.rank}: wait() has no tensors to write to, as start_with() was called; "
                "call finish(), then decode(out) or accept()"
            )
        rows = self._owner._rows(self._given, copy=False) if self._buckets else self._given
        if not self._received:
            self._reduce()
        for bucket in self._buckets:
            if not self._received:
                bucket.bring_home(self._stages)
                self._receive(bucket)
            self._decode(bucket, rows)
        self._owner._done(self._given, rows)

    def finish(self) -> None:
        """Return when every payload is here and nothing but the error feedback has changed; then end the work.

        Raises:
            TransportError: a peer is dead or too slow; the error feedback is as before to within rounding.
        """
        self._reduce()
        for bucket in self._buckets:
            bucket.bring_home(self._stages)
        for bucket in self._buckets:
            self._receive(bucket)
        self._received = True

    def all_finite(self) -> Tensor:
        """After `finish`: 0-dim bool, the same on all ranks, False if any rank sent a non-finite number.

        With one rank nothing is sent, and the tensors themselves are looked at. Masked elements may be anything.
        """
        if self._buckets:
            plain = [part.mean for part in self._owner.parts if isinstance(part, PlainPart)]
            signs = [part for part in self._owner.parts if not isinstance(part, PlainPart)]
            if not signs:
                return all_finite(plain)
            finite = self._owner._operators.all_finite([p.gathered for p in signs], [p.layout for p in signs])
            return finite & all_finite(plain) if plain else finite
        if self._given is None:
            return torch.ones((), dtype=torch.bool, device=self._owner._device)
        return all_finite(self._owner._taking_part(self._given))

    def decode(self, out: Tensors) -> None:
        """After `finish`: write the mean to `out`, shaped as the tensors given to `start`, which may be the same.

        Raises:
            InputError: other shapes, dtypes or device, or elements that share memory; nothing was changed.
        """
        targets = as_list(out)
        check_targets(self._owner.backend.rank, targets, self._owner._like)
        rows = self._owner._rows(targets, copy=False) if self._buckets else self._given or targets
        for bucket in self._buckets:
            self._decode(bucket, rows)
        self._owner._done(targets, rows)

    def accept(self) -> None:
        """After `finish`, instead of `decode`: the caller has consumed `gathered` of every part by itself."""
        for bucket in self._buckets:
            bucket.encoded = False
        self._owner._flight = None

    def undo(self, tensors: Tensors | None = None) -> None:
        """Instead of `decode` or `accept`: put the error feedback back to what it was before `start`.

        It is recomputed from what was sent and from what was encoded, so it is the old one to within rounding (a few
        units in the last place of the largest of the numbers involved); no copy is kept for it. Buckets that are
        decoded or accepted stay as they are.

        Args:
            tensors: what was encoded, shaped as the tensors that the average was made for. None: what was given to
                `start`, which must be as it was; or `start_with` was told how to undo.

        Raises:
            InputError: `start_with` was not told how to undo and `tensors` is None, or they do not fit; nothing was
                changed.
        """
        undo_encode = self._undo_encode
        if tensors is not None:
            listed = as_list(tensors)
            check_same(self._owner.backend.rank, listed, self._owner._like)
            _, undo_encode = self._owner.encoding(self._owner._rows(listed, copy=True))
        elif undo_encode is None and any(bucket.encoded for bucket in self._buckets):
            raise InputError(
                f"rank {self._owner.backend.rank}: undo() does not know what was encoded; give it the tensors, or tell "
                "start_with() how to undo"
            )
        self._put_back(undo_encode)

    def settle_server(self, finite: Tensor) -> None:
        """After `finish`: end the work where the host does not know whether the step will be made; never waits.

        The server's error feedback is put back where `finite` is false. That of this rank, `residual` of the parts, is
        the caller's to put back.

        Args:
            finite: 0-dim bool on the device of the tensors, the same on every rank.
        """
        for bucket in self._buckets:
            bucket.undo_reduce(keep=finite)
        self.accept()

    def _send_all(self, wait: bool) -> None:
        """Send what was not yet; `wait`: also from node to node, which waits for the others of this one."""
        for index in sorted(self._to_send):
            self._send(index, self._in_line)
            here = index - self._buckets[index].lags
            if wait and here >= 0:
                self._buckets[here].send_on(self._stages)

    def _send(self, index: int, in_line: bool) -> None:
        """Phase 1 of a part up to the transport."""
        self._to_send.discard(index)
        bucket = self._buckets[index]
        with self._stages["encode"]:
            bucket.encode(self._encode)
        with self._stages[bucket.first_stage]:
            bucket.exchange(in_line)

    def _reduce(self) -> None:
        self._send_all(wait=True)
        for index in sorted(self._to_pass_on):
            self._buckets[index].send_on(self._stages)
        for index in sorted(self._to_pass_on):
            self.pass_on(index)

    def _receive(self, bucket: Bucket) -> None:
        with self._stages[bucket.last_stage]:
            bucket.wait_gather()

    def _decode(self, bucket: Bucket, rows: Sequence[Tensor]) -> None:
        with self._stages["decode"]:
            bucket.part.decode(self._owner._operators, rows)
        bucket.encoded = False

    def _put_back(self, undo_encode: Callable[[Part], None] | None) -> None:
        """Undo what is encoded; the worker's side only if it is known how."""
        for index, bucket in enumerate(self._buckets):
            lost = index in self._lost and not bucket.part.keeps_encoded
            if bucket.encoded and lost:
                bucket.part.forget()
            elif bucket.encoded and undo_encode is not None:
                undo_encode(bucket.part)
            if bucket.encoded:
                bucket.undo_reduce()
            bucket.encoded = False
        self._owner._flight = None
