"""A bucket that is averaged as it is: float32 on the wire, in the place of a compressed one among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from onebit.comm.bucket import Bucket
from onebit.comm.part import Part
from onebit.compress.codec import SignOperators
from onebit.compress.layout import Layout, align, ceil_div
from onebit.compress.reference import unpack_bits


class PlainPart(Part):
    """`sent` and `gathered` hold float32 numbers, one after the other; `residual` is left as it is."""

    @property
    def mean(self) -> Tensor:
        """(layout.numel,) float32: what has been gathered."""
        return self.gathered.view(torch.float32)[: self.layout.numel]

    def encode(self, operators: SignOperators, rows: Sequence[Tensor]) -> None:
        """Fill `sent` from the whole list of tensors, row-major; 0 for what is masked."""
        slots = self._slots(self.sent)
        torch._foreach_copy_(slots, self._pieces(rows))
        if self.mask is not None:
            masked = unpack_bits(self.mask)
            for slot, segment in zip(slots, self.layout.segments, strict=True):
                slot.masked_fill_(masked[self.layout.residual_span(segment)], 0.0)

    def decode(self, operators: SignOperators, rows: Sequence[Tensor]) -> None:
        """Write the mean to this part of the whole list of tensors, row-major."""
        torch._foreach_copy_(self._pieces(rows), self._slots(self.gathered))

    def undo_encode(self, operators: SignOperators, rows: Sequence[Tensor]) -> None:
        """Nothing: no error was kept."""

    def _slots(self, buffer: Tensor) -> list[Tensor]:
        numbers = buffer.view(torch.float32)[: self.layout.numel]
        return list(torch.split(numbers, [segment.numel for segment in self.layout.segments]))

    def _pieces(self, rows: Sequence[Tensor]) -> list[Tensor]:
        mine = [rows[index].view(-1) for index in self.used]
        return [mine[s.tensor][s.offset : s.offset + s.numel] for s in self.layout.segments]


class PlainBucket(Bucket):
    """Sums in rank order, so the mean has the bits of `DenseAllreduce`; the error feedback waits as it is."""

    part_kind: ClassVar[type[Part]] = PlainPart

    @staticmethod
    def payload_bytes(layout: Layout) -> int:
        """Bytes that go to one rank in each phase."""
        return align(4 * ceil_div(layout.numel, layout.chunks))

    def reduce_encode(self) -> None:
        """The mean of what came."""
        first, *others = self._payloads.view(torch.float32)
        for row in others:
            first += row
        torch.div(first, len(others) + 1, out=self._mine.view(torch.float32))

    def undo_reduce(self, keep: Tensor | None = None) -> None:
        """Nothing: no error was kept."""
