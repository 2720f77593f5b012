"""One bucket of a compressed average on its way: the two collectives, and the server's side between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from onebit.comm.backend import Backend, Work
from onebit.comm.part import Part
from onebit.comm.stats import Stage
from onebit.compress.codec import Operators
from onebit.compress.layout import Layout
from onebit.compress.masks import pack_mask
from onebit.compress.sign import SignOperators


class Bucket:
    """The part of a list of contiguous tensors that travels together, as one payload per rank.

    Args:
        operators: encode the mean.
        layout: its part of the list; segments count tensors of the whole list.
        backend: what carries it.
        worker: (layout.padded_numel,) fp32, updated in place; None: no error is kept.
        server: (layout.chunk_numel,) fp32, updated in place; None: no error is kept.
        device: where the tensors are.
        gathered: (ranks · payload_bytes,) uint8, what phase 2 brings; None: a new buffer.
        lasting: it is worth while to have the backend's own memory for what comes.

    Attributes:
        part: what others see of it.
        payloads: (ranks, payload_bytes) uint8, what phase 1 brings: every rank's payload of this rank's chunk.
        mine: (payload_bytes,) uint8, what phase 2 sends.
        server: as given.
        encoded: it has been encoded, and neither consumed nor undone since.
        first_stage, last_stage: of `Stats.seconds`, in which it is first sent and in which all of it comes.
        lags: `send_on` is best called when the next one has been sent, for this one is on its way until then.
    """

    first_stage, last_stage = "all_to_all", "all_gather"
    lags = False

    def __init__(
        self,
        operators: Operators,
        layout: Layout,
        backend: Backend,
        worker: Tensor | None,
        server: Tensor | None,
        device: torch.device,
        gathered: Tensor | None = None,
        lasting: bool = True,
    ) -> None:
        self._operators = operators
        self._rank = backend.rank
        self.server = server
        ranks, size = backend.size, layout.payload_bytes
        sent = torch.zeros(ranks * size, dtype=torch.uint8, device=device)
        new = partial(backend.buffer, sent.numel(), device) if lasting else partial(torch.zeros_like, sent)
        self._received = new()
        if gathered is None:
            gathered = new()
        self.payloads = self._received.view(ranks, size)
        self.mine = torch.zeros(size, dtype=torch.uint8, device=device)
        self._all_to_all = backend.prepare_all_to_all(self._received, sent)
        self._all_gather = backend.prepare_all_gather(gathered, self.mine)
        self._exchange: Work | None = None
        self._gather: Work | None = None
        self._reduced = False
        self.encoded = False
        own, used = layout.of_used_tensors()
        self.part = Part(
            layout=own,
            used=used,
            residual=worker,
            mask=None,
            sent=sent,
            gathered=gathered,
            squared=isinstance(operators, SignOperators) and operators.squared,
        )

    def set_mask(self, masks: Sequence[Tensor] | None) -> None:
        """Take elements out of the bucket; `masks` as for `CompressedAllreduce.set_mask`."""
        part = self.part
        mask = None if masks is None else pack_mask([masks[i] for i in part.used], part.layout)
        self.part = replace(part, mask=mask)

    def encode(self, encode: Callable[[Part], None]) -> None:
        """Have the send buffer filled and the worker's error feedback updated."""
        encode(self.part)
        self.encoded, self._reduced = True, False

    def encode_mean(self, encode: Callable[[], None]) -> None:
        """Have `mine` filled and the server's error feedback updated, where there was no phase 1."""
        encode()
        self.encoded, self._reduced = True, False

    def begin(self) -> None:
        """What was encoded before is over."""
        self.encoded = self._reduced = False

    def spoil(self) -> None:
        """Have the send buffer say NaN, in place of `encode`."""
        self.part.sent.fill_(0xFF)
        self._reduced = False

    def exchange(self, in_line: bool) -> None:
        """Start phase 1; `in_line` as for `Collective.start`."""
        self._exchange = self._all_to_all.start(in_line=in_line)

    def send_on(self, stages: Mapping[str, Stage]) -> None:
        """Start what comes between `exchange` and `wait_exchange`, once: nothing on one level."""

    def wait_exchange(self) -> None:
        """Wait for phase 1."""
        if self._exchange is not None:
            self._exchange.wait()

    def reduce_encode(self) -> None:
        """Encode the mean of what came."""
        mask, layout = self.part.mask, self.part.layout
        self._operators.reduce_encode(self.payloads, self.server, mask, self.mine, layout, self._rank)
        self._reduced = True

    def gather(self, in_line: bool) -> None:
        """Start phase 2; `in_line` as for `Collective.start`."""
        self._gather = self._all_gather.start(in_line=in_line)

    def bring_home(self, stages: Mapping[str, Stage]) -> None:
        """Start what comes between `gather` and `wait_gather`: nothing on one level."""

    def wait_gather(self) -> None:
        """Wait for phase 2."""
        if self._gather is not None:
            self._gather.wait()

    def undo_reduce(self, keep: Tensor | None = None) -> None:
        """Put the server's error feedback back to what it was, to within rounding.

        Args:
            keep: 0-dim bool on the bucket's device: where it is true nothing is put back; None: it is put back.
        """
        if self._reduced and self.server is not None:
            mask, layout, rank = self.part.mask, self.part.layout, self._rank
            self._operators.undo_reduce(self.payloads, self.server, mask, self.mine, layout, rank, keep)
        self._reduced = False
