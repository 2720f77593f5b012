"""A list of tensors dealt to the ranks of a node as averages on two levels deal them, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from onebit.comm.levels import Levels
from onebit.comm.part import Part
from onebit.comm.planned import plan_buckets
from onebit.comm.scatter import Span
from onebit.comm.shared_memory import share_memory
from onebit.comm.slice_rows import SliceRow, copy_all
from onebit.comm.stats import Stats
from onebit.comm.two_level import TwoLevelPart
from onebit.compress.codec import Codec, Operators

Slice = TypeVar("Slice", Tensor, Tensor | None)


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
        for layout in plan_buckets(codec, numels, inside.size * levels.between.size, bucket_mb):
            slices = [levels.slice_of(layout, rank) for rank in range(inside.size)]
            self._buckets.append([[(s.tensor, s.offset, s.numel) for s in one.segments] for one in slices])
        self.spans = list(chain.from_iterable(self.runs))
        self._runs: list[list[tuple[int, int]]] = [[] for _ in numels]  # of this rank, per tensor
        self._numels = [0] * len(numels)
        self._starts: list[list[int]] = []  # per bucket and run of this rank, where it begins in the tensor's slice
        for spans in self.runs:
            self._starts.append([])
            for tensor, offset, numel in spans:
                self._runs[tensor].append((offset, numel))
                self._starts[-1].append(self._numels[tensor])
                self._numels[tensor] += numel

    @property
    def runs(self) -> list[list[Span]]:
        """The runs of this rank, bucket by bucket."""
        return [bucket[self._inside.rank] for bucket in self._buckets]

    def cut(self, index: int, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor with this number in the list: 1-D, new memory, row-major order, its dtype."""
        flat = tensor.reshape(-1)
        runs = [flat[offset : offset + numel] for offset, numel in self._runs[index]]
        return torch.cat(runs) if runs else flat[:0].clone()

    def pieces(self, slices: Mapping[int, Slice]) -> list[list[Slice]]:
        """Bucket by bucket what this rank's runs are in its slices of some tensors: views.

        Args:
            slices: 1-D, by number in the list; None stands for as many Nones as there are runs.
        """
        return [
            [run_of(slices[t], start, numel) for (t, _, numel), start in zip(spans, starts, strict=True) if t in slices]
            for spans, starts in zip(self.runs, self._starts, strict=True)
        ]

    def own(self, parts: Sequence[Part]) -> list[Part]:
        """This rank's slice of every part of a compressed average of the tensors, each run of it taken for a tensor.

        Args:
            parts: of the average, whose levels, codec and bucket size are those given here; they have `gathered`.
        """
        found = []
        for part in parts:
            assert isinstance(part, TwoLevelPart)
            payloads = part.gathered.view(self._inside.size, -1)[self._inside.rank]
            found.append(replace(part.between.part, gathered=payloads))
        return found

    def decode(self, operators: Operators, parts: Sequence[Part]) -> list[Tensor]:
        """This rank's slices of what has come of a compressed average of the tensors; `parts` as for `own`.

        Returns:
            New 1-D fp32 tensors.
        """
        device = parts[0].gathered.device if parts else None
        slices = [torch.empty(numel, device=device) for numel in self._numels]
        for part, runs in zip(self.own(parts), self.pieces(dict(enumerate(slices))), strict=True):
            if runs:
                part.decode(operators, runs)
        return slices

    def rows(self, like: Mapping[int, Tensor], memory: Sequence[Tensor] | None = None) -> Iterator[SliceRow]:
        """Per bucket what the ranks of the node are to give each other of some tensors.

        Args:
            like: by number in the list, tensors of the same device and dtypes; the same numbers on every rank.
            memory: what `share_rows` has given for such tensors.
        """
        shared = [None] * len(self._buckets) if memory is None else memory
        buckets = zip(self._buckets, shared, strict=True)
        return (SliceRow(bucket, like, self._inside, self._stats, rows) for bucket, rows in buckets)

    def share_rows(self, like: Mapping[int, Tensor]) -> list[Tensor] | None:
        """Memory for `rows` that the ranks of the node share, all of them processes; None: they cannot; collective.

        Raises:
            TransportError: a rank did not take part within the timeout.
        """
        sizes = [row.size for row in self.rows(like)]
        memory = share_memory(self._inside, sum(sizes), 0)
        return None if memory is None else list(torch.split(memory.rows, sizes, dim=1))

    def exchange(self, mine: Mapping[int, Tensor]) -> Iterator[SliceRow]:
        """Per bucket what all ranks of the node have given of some tensors; collective among them as it is asked for.

        Args:
            mine: by number in the list, this rank's slices of the tensors, the same ones on every rank.

        Raises:
            TransportError: a peer is dead or too slow.
        """
        for row, runs in zip(self.rows(mine), self.pieces(mine), strict=True):
            copy_all(row.open(), runs)
            row.exchange()
            yield row

    def gather(self, mine: Mapping[int, Tensor], out: Mapping[int, Tensor]) -> None:
        """Write whole tensors from the slices of all ranks of the node; collective among them.

        Args:
            mine: as for `exchange`.
            out: those tensors, flat and contiguous, of the same dtypes; written.

        Raises:
            TransportError: a peer is dead or too slow; some of `out` may be written.
        """
        for row in self.exchange(mine):
            row.write(out)


def run_of(piece: Slice, start: int, numel: int) -> Slice:
    """A view of some elements of a 1-D tensor, itself if it is all of them; None of None."""
    return piece if piece is None or numel == piece.numel() else piece[start : start + numel]
