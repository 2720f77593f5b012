"""A list of tensors dealt to the ranks of a node as averages on two levels deal them, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onebit.comm.levels import Levels
from onebit.comm.part import Part
from onebit.comm.planned import plan_buckets
from onebit.comm.scatter import Span
from onebit.comm.stats import Stats
from onebit.compress.codec import Codec, Operators
from onebit.compress.layout import Layout, align


class Slices:
    """The slice of every bucket that each rank of a node looks after, seen as runs of the tensors' elements.

    A rank's slice of a tensor is its runs one after the other; it may be all of the tensor or nothing. Runs start on
    blocks of the codec, so the k-th block of a slice is a block of the tensor.

    Args:
        numels: elements of every tensor.
        codec, bucket_mb: those of the average.
        levels: the ranks of the node, and how many nodes there are.
        stats: counts what is sent; None: nothing does.

    Attributes:
        spans: the runs of this rank, tensor by tensor.
    """

    def __init__(
        self, numels: Sequence[int], codec: Codec, bucket_mb: float, levels: Levels, stats: Stats | None = None
    ) -> None:
        inside = self._inside = levels.inside
        self._stats = Stats() if stats is None else stats
        self._buckets: list[list[list[Span]]] = []
        self._layouts: list[Layout] = []  # per bucket that of this rank's slice, every run taken for a tensor
        for layout in plan_buckets(codec, numels, inside.size * levels.between.size, bucket_mb):
            slices = [levels.slice_of(layout, rank) for rank in range(inside.size)]
            self._buckets.append([[(s.tensor, s.offset, s.numel) for s in one.segments] for one in slices])
            self._layouts.append(slices[inside.rank].by_segment())
        self.spans = [span for bucket in self._buckets for span in bucket[inside.rank]]
        self._runs: list[list[tuple[int, int]]] = [[] for _ in numels]  # of this rank, per tensor
        self._numels = [0] * len(numels)
        self._starts: list[list[int]] = []  # per bucket and run of this rank, where it begins in the tensor's slice
        for bucket in self._buckets:
            self._starts.append([])
            for tensor, offset, numel in bucket[inside.rank]:
                self._runs[tensor].append((offset, numel))
                self._starts[-1].append(self._numels[tensor])
                self._numels[tensor] += numel

    def cut(self, index: int, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor with this number in the list: 1-D, new memory, row-major order, its dtype."""
        flat = tensor.reshape(-1)
        runs = [flat[offset : offset + numel] for offset, numel in self._runs[index]]
        return torch.cat(runs) if runs else flat[:0].clone()

    def decode(self, operators: Operators, parts: Sequence[Part]) -> list[Tensor]:
        """This rank's slices of what has come of a compressed average of the tensors.

        Args:
            parts: of the average, whose levels, codec and bucket size are those given here; they have `gathered`.

        Returns:
            New 1-D fp32 tensors.
        """
        device = parts[0].gathered.device if parts else None
        slices = [torch.empty(numel, device=device) for numel in self._numels]
        for spans, starts, layout, part in zip(self._buckets, self._starts, self._layouts, parts, strict=True):
            rank = self._inside.rank
            payloads = _share(part.gathered, rank, layout.chunks * layout.payload_bytes)
            mask = None if part.mask is None else _share(part.mask, rank, layout.padded_numel // 8)
            runs = [slices[t][start : start + numel] for (t, _, numel), start in zip(spans[rank], starts, strict=True)]
            if runs:
                operators.decode(payloads, mask, runs, layout)
        return slices

    def gather(self, mine: Mapping[int, Tensor], out: Mapping[int, Tensor]) -> None:
        """Write whole tensors from the slices of all ranks of the node; collective among them.

        Args:
            mine: by number in the list, this rank's slices of some of the tensors, the same ones on every rank.
            out: those tensors, flat and contiguous, of the same dtypes; written.

        Raises:
            TransportError: a peer is dead or too slow; some of `out` may be written.
        """
        for bucket, starts in zip(self._buckets, self._starts, strict=True):
            wanted = [[span for span in spans if span[0] in out] for spans in bucket]
            rows = [_places(spans, out) for spans in wanted]
            size = max(end for _, end in rows)
            if not size:
                continue
            device = next(iter(out.values())).device
            sent = torch.empty(size, dtype=torch.uint8, device=device)
            came = torch.empty(self._inside.size * size, dtype=torch.uint8, device=device)
            rank = self._inside.rank
            own = zip(bucket[rank], starts, strict=True)
            given = [mine[t][start : start + numel] for (t, _, numel), start in own if t in out]
            _copy(_views(sent, wanted[rank], rows[rank][0], out), given)
            with self._stats.stage("gather_slices", self._inside, local=True):
                self._inside.all_gather(came, sent).wait()
            for spans, (places, _), row in zip(wanted, rows, came.view(-1, size), strict=True):
                targets = [out[tensor][offset : offset + numel] for tensor, offset, numel in spans]
                _copy(targets, _views(row, spans, places, out))


def _share(whole: Tensor, rank: int, size: int) -> Tensor:
    """The bytes of a bucket that belong to a rank's slice."""
    return whole[rank * size : (rank + 1) * size]


def _places(spans: Sequence[Span], kinds: Mapping[int, Tensor]) -> tuple[list[int], int]:
    """The byte at which each run starts in what its rank sends, and where the last one ends."""
    places, end = [], 0
    for tensor, _, numel in spans:
        places.append(end)
        end = align(end + numel * kinds[tensor].element_size())
    return places, end


def _views(row: Tensor, spans: Sequence[Span], places: Sequence[int], kinds: Mapping[int, Tensor]) -> list[Tensor]:
    """The runs in a row of bytes, with their dtypes."""
    return [
        row[place : place + numel * kinds[tensor].element_size()].view(kinds[tensor].dtype)
        for (tensor, _, numel), place in zip(spans, places, strict=True)
    ]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
