"""A bucket that is averaged as it is: one all_reduce of float32, in the place of a compressed one among others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.comm.backend import Backend
from onebit.comm.bucket import Bucket
from onebit.comm.part import Part
from onebit.compress.codec import Operators
from onebit.compress.layout import Layout
from onebit.compress.reference import unpack_bits


class PlainPart(Part):
    """`sent` and `gathered` are one buffer of float32 numbers, one after the other; `residual` is left as it is."""

    @property
    def mean(self) -> Tensor:
        """(layout.numel,) float32: what has been gathered."""
        return self.gathered.view(torch.float32)

    def encode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Fill `sent` from the whole list of tensors, row-major; 0 for what is masked."""
        slots = self._slots()
        torch._foreach_copy_(slots, self._pieces(rows))
        if self.mask is not None:
            masked = unpack_bits(self.mask)
            for slot, segment in zip(slots, self.layout.segments, strict=True):
                slot.masked_fill_(masked[self.layout.residual_span(segment)], 0.0)

    def decode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Write the mean to this part of the whole list of tensors, row-major."""
        torch._foreach_copy_(self._pieces(rows), self._slots())

    def undo_encode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Nothing: no error was kept."""

    def _slots(self) -> list[Tensor]:
        return list(torch.split(self.mean, [segment.numel for segment in self.layout.segments]))

    def _pieces(self, rows: Sequence[Tensor]) -> list[Tensor]:
        mine = [rows[index].view(-1) for index in self.used]
        return [mine[s.tensor][s.offset : s.offset + s.numel] for s in self.layout.segments]


class PlainBucket(Bucket):
    """The transport's own sum in place of both phases; the error feedback waits as it is.

    All ranks get the same bits; which ones, depends on the transport. `DenseAllreduce` has the same bits on all.

    Args:
        operators, layout, backend, worker, server, device: as for `Bucket`.
    """

    def __init__(
        self,
        operators: Operators,
        layout: Layout,
        backend: Backend,
        worker: Tensor | None,
        server: Tensor | None,
        device: torch.device,
    ) -> None:
        own, used = layout.of_used_tensors()
        self._backend = backend
        self._sum = torch.zeros(layout.numel, device=device)
        self._exchange = self._gather = None
        self._reduced = self.encoded = False
        numbers = self._sum.view(torch.uint8)
        self.part = PlainPart(
            layout=own,
            used=used,
            residual=worker,
            mask=None,
            sent=numbers,
            gathered=numbers,
            squared=False,
        )

    def exchange(self, in_line: bool) -> None:
        """Start the sum."""
        self._exchange = self._backend.all_reduce(self._sum)

    def reduce_encode(self) -> None:
        """The mean of what came."""
        self._sum.div_(self._backend.size)

    def gather(self, in_line: bool) -> None:
        """Nothing: every rank has the mean."""

    def undo_reduce(self, keep: Tensor | None = None) -> None:
        """Nothing: no error was kept."""
