"""What the ranks of a node give each other of one bucket: every rank its runs of some tensors, in their dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onebit.comm.backend import Backend
from onebit.comm.scatter import Span
from onebit.comm.stats import Stats
from onebit.compress.layout import align


class SliceRow:
    """This rank's runs, to be written and exchanged; then those of all ranks, to be written to tensors.

    Args:
        runs: of every rank, as spans of a list of tensors.
        like: by number in that list, tensors of the device and the dtypes that are wanted; the same numbers on every
            rank.
        inside: the ranks of the node.
        stats: counts what is sent.
        memory: (ranks, size) uint8 that the ranks share, where each writes its row and reads those of the others; None,
            or rows that are too short, as where dtypes were narrower when it was made: rows are sent to all. It may be
            written again when all ranks are known to have written what was there.

    Attributes:
        size: bytes of a row.
    """

    def __init__(
        self,
        runs: Sequence[Sequence[Span]],
        like: Mapping[int, Tensor],
        inside: Backend,
        stats: Stats,
        memory: Tensor | None = None,
    ) -> None:
        self._inside = inside
        self._stats = stats
        self._dtypes = {number: tensor.dtype for number, tensor in like.items()}
        self._device = next((tensor.device for tensor in like.values()), None)
        self._runs = [[span for span in spans if span[0] in like] for spans in runs]
        self._places = [_places(spans, self._dtypes) for spans in self._runs]
        self.size = max(end for _, end in self._places)
        self._memory = None if memory is None or memory.shape[1] < self.size else memory
        self._sent: Tensor | None = None
        self._came: Tensor | None = None

    def open(self) -> list[Tensor]:
        """This rank's runs, 1-D tensors of their dtypes that start on 16 bytes, to be written until `exchange`."""
        rank = self._inside.rank
        if self._memory is None:
            self._sent = torch.empty(self.size, dtype=torch.uint8, device=self._device)
        else:
            self._sent = self._memory[rank]
        return self._views(self._sent, rank)

    def exchange(self) -> None:
        """Give the others what was written, which is let go, and get theirs; collective.

        Raises:
            TransportError: a peer is dead or too slow.
        """
        sent, self._sent = self._sent, None
        assert sent is not None
        if not self.size:
            return
        with self._stats.stage("gather_slices", self._inside, local=True):
            if self._memory is None:
                self._came = self._gathered(sent)
            else:
                self._gathered(torch.zeros(1, dtype=torch.uint8))  # it is there
                self._came = self._memory

    def write(self, out: Mapping[int, Tensor]) -> None:
        """After `exchange`: write the runs of all ranks to flat contiguous tensors, by number in the list."""
        if self._came is None:
            return
        for rank, row in enumerate(self._came):
            targets = [out[tensor][offset : offset + numel] for tensor, offset, numel in self._runs[rank]]
            copy_all(targets, self._views(row, rank))

    def _gathered(self, sent: Tensor) -> Tensor:
        """(ranks, bytes), what every rank sends."""
        came = torch.empty(self._inside.size * sent.numel(), dtype=torch.uint8, device=sent.device)
        self._inside.all_gather(came, sent).wait()
        return came.view(self._inside.size, -1)

    def _views(self, row: Tensor, rank: int) -> list[Tensor]:
        """A rank's runs in a row of bytes, with their dtypes."""
        rows = {dtype: row.view(dtype) for dtype in {*self._dtypes.values()}}
        views = []
        for start, (tensor, _, numel) in zip(self._places[rank][0], self._runs[rank], strict=True):
            dtype = self._dtypes[tensor]
            first = start // dtype.itemsize
            views.append(rows[dtype][first : first + numel])
        return views


def _places(spans: Sequence[Span], dtypes: Mapping[int, torch.dtype]) -> tuple[list[int], int]:
    """The byte at which each run starts in what its rank sends, and where the last one ends."""
    places, end = [], 0
    for tensor, _, numel in spans:
        places.append(end)
        end = align(end + numel * dtypes[tensor].itemsize)
    return places, end


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source to its target, which overlap nowhere."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
