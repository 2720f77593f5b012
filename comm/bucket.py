"""One bucket of a compressed average: its buffers, and the steps that fill and empty them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.comm.backend import Backend, Work
from onebit.compress import SignCodec
from onebit.compress.layout import Layout
from onebit.compress.masks import pack_mask
from onebit.compress.reference import unpack_bits


class Bucket:
    """The part of a list of contiguous tensors that travels together, as one payload per rank.

    Args:
        codec: encodes and decodes it.
        layout: its part of the list; segments count tensors of the whole list.
        backend: what carries it.
        worker: (layout.padded_numel,) fp32, updated in place.
        server: (layout.chunk_numel,) fp32, updated in place.
    """

    def __init__(self, codec: SignCodec, layout: Layout, backend: Backend, worker: Tensor, server: Tensor) -> None:
        self._codec = codec
        self._operators = codec.unchecked(worker.device)
        self._layout, self._used = layout.of_used_tensors()
        self._backend = backend
        self._worker = worker
        self._server = server
        self._mask: Tensor | None = None
        ranks, size = backend.size, layout.payload_bytes
        device = worker.device
        self._sent, self._received, self._gathered = torch.zeros(3, ranks * size, dtype=torch.uint8, device=device)
        self._mine = torch.zeros(size, dtype=torch.uint8, device=device)
        self._exchange: Work | None = None
        self._gather: Work | None = None
        self._encoded = False
        self._reduced = False

    def set_mask(self, masks: Sequence[Tensor] | None) -> None:
        """Take elements out of the bucket; `masks` as for `CompressedAllreduce.set_mask`."""
        self._mask = None if masks is None else pack_mask([masks[i] for i in self._used], self._layout)

    def encode(self, tensors: Sequence[Tensor]) -> None:
        """Fill the send buffer from the whole list of tensors."""
        self._operators.encode(self._parts(tensors), self._worker, self._mask, self._sent, self._layout)
        self._encoded, self._reduced = True, False

    def exchange(self) -> None:
        """Start phase 1."""
        self._exchange = self._backend.all_to_all(self._received, self._sent)

    def wait_exchange(self) -> None:
        """Wait for phase 1."""
        if self._exchange is not None:
            self._exchange.wait()

    def reduce_encode(self) -> None:
        """Encode the mean of what came."""
        payloads = self._received.view(self._backend.size, -1)
        self._operators.reduce_encode(payloads, self._server, self._mask, self._mine, self._layout, self._backend.rank)
        self._reduced = True

    def gather(self) -> None:
        """Start phase 2."""
        self._gather = self._backend.all_gather(self._gathered, self._mine)

    def wait_gather(self) -> None:
        """Wait for phase 2."""
        if self._gather is not None:
            self._gather.wait()

    def all_finite(self) -> Tensor:
        """0-dim bool: what was gathered is finite."""
        return self._codec.all_finite(self._gathered, self._layout)

    def decode(self, tensors: Sequence[Tensor]) -> None:
        """Write the mean to this bucket's part of the whole list of tensors."""
        self._operators.decode(self._gathered, self._mask, self._parts(tensors), self._layout)
        self._encoded = False

    def undo(self, tensors: Sequence[Tensor]) -> None:
        """Put both residuals back to what they were before `encode`, to within rounding; nothing if it is decoded."""
        if not self._encoded:
            return
        self._encoded = False
        parts, layout = self._parts(tensors), self._layout
        given = torch.zeros_like(self._worker)
        for s in layout.segments:
            given[layout.residual_span(s)] = parts[s.tensor].view(-1)[s.offset : s.offset + s.numel].float()
        if self._mask is not None:
            given[unpack_bits(self._mask)] = 0.0
        _take_back(self._worker, self._values(self._sent), given)
        if self._reduced:
            heard = torch.zeros_like(self._server)
            for payload in self._received.view(self._backend.size, -1):
                heard += self._values(payload, self._backend.rank) / self._backend.size
            _take_back(self._server, self._values(self._mine, self._backend.rank), heard)

    def _values(self, payloads: Tensor, chunk: int | None = None) -> Tensor:
        """Decode all payloads, or that of one chunk, to flat fp32 in block order; padding and masked elements are 0."""
        layout, mask = self._layout.by_segment(chunk), self._mask
        if chunk is not None and mask is not None:
            mask = mask[chunk * layout.chunk_numel // 8 : (chunk + 1) * layout.chunk_numel // 8]
        flat = torch.zeros(layout.padded_numel, device=payloads.device)
        self._codec.decode(payloads, [flat[layout.residual_span(s)] for s in layout.segments], layout=layout, mask=mask)
        return flat

    def _parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self._used]


def _take_back(residual: Tensor, said: Tensor, given: Tensor) -> None:
    """residual <- residual + said - given; a block that said NaN left its residual as it was."""
    residual.copy_(torch.where(said.isnan(), residual, (residual + said) - given))
