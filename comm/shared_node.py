"""A bucket inside a node through memory that its ranks share: what others need is written once and read where it lies.

A rank writes the slices that others look after, and takes the mean of its own slice from theirs and from its tensors as
they are. Payloads arrive from other nodes in the same memory, where all decode them. The backend of the node only tells
that something is there, a byte for each rank, so its time limit and what it knows of dead ranks hold here, too.

Nobody writes to what another still reads. Numbers of the next average come after all ranks have told that the payloads
of this one are there, for which they had read the numbers; payloads of the next after all have told that its numbers
are there, for which they had read the payloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onebit.comm.levels import Levels
from onebit.comm.node import CarriedNode, Node
from onebit.comm.part import Part
from onebit.comm.shared_memory import share_memory
from onebit.compress.codec import Operators
from onebit.compress.kernels import kernels_for
from onebit.compress.layout import Layout
from onebit.compress.sign import SignOperators

_CPU = torch.device("cpu")
SHARED = "shared memory"  # the transport of such a node
SLAB = 1 << 16  # elements that are summed and divided while they stay in the L2 cache


class SharedNode(Node):
    """See above.

    Args:
        layout: of the whole bucket.
        levels: whose inner one it is.
        numbers: (2, ranks, ranks - 1, slice elements) fp32 in shared memory: from each rank the slices of the others,
            in turns, so that a mean can be taken once more while others give numbers for the next.
        gathered: (chunks · payload_bytes,) uint8 in shared memory.
        mine: (slice elements,) fp32, for means that are not encoded as they are taken.
    """

    keeps_mean = False
    travels = False

    def __init__(self, layout: Layout, levels: Levels, numbers: Tensor, gathered: Tensor, mine: Tensor) -> None:
        from onebit.compress.cpu.stream import copier  # Numba is imported where it is first used

        inside = levels.inside
        rank, ranks = inside.rank, inside.size
        tell = inside.prepare_all_to_all(*torch.zeros(2, ranks, dtype=torch.uint8))
        super().__init__(
            ranks,
            transport=SHARED,
            gathered=gathered,
            own=gathered.view(ranks, -1)[rank],
            exchange=tell,
            share=tell,
        )
        self._inside = inside
        others = [number for number in range(ranks) if number != rank]
        slices = [(_place(number, rank), levels.slice_of(layout, number)) for number in others]
        self._given = numbers[:, rank]
        self._to_others = [
            [(s, row[place][part.residual_span(s)]) for place, part in slices for s in part.segments]
            for row in self._given
        ]
        self._from_others = [[turn[number, _place(rank, number)] for number in others] for turn in numbers]
        own = levels.slice_of(layout)
        self._segments = own.segments
        self._spans = [own.residual_span(s) for s in own.segments]
        self._chunks = own.chunks
        self._filled: Tensor | None = None  # made when it is first needed
        self._mine = [mine[span] for span in self._spans]
        self._write = copier(4 * self._given[0].numel())
        self._to_give, self._to_read = 0, 1
        self._own: Sequence[Tensor] | None = None  # what was given of this rank's own slice, per segment

    def give(self, tensors: Sequence[Tensor]) -> None:
        self._check_sound()
        for s, place in self._to_others[self._to_give]:
            self._write(place, tensors[s.tensor].view(-1)[s.offset : s.offset + s.numel])
        self._own = self._pieces(tensors)
        self.filled = True

    def fill(self, write: Callable[[Sequence[Tensor]], None]) -> None:
        self._check_sound()
        rows = [*self._given[self._to_give]]
        rows.insert(self._inside.rank, self._own_numbers())
        write([chunk for row in rows for chunk in row.view(self._chunks, -1)])
        self._own = self._pieces(None)
        self.filled = True

    def spoil(self) -> None:
        self._check_sound()
        self._given[self._to_give].fill_(torch.nan)
        self._own = None
        self.filled = True

    def start(self, in_line: bool) -> None:
        super().start(in_line)
        self._to_give, self._to_read = self._to_read, self._to_give

    def encode(self, operators: Operators, part: Part) -> None:
        given, self._own = self._own, None
        if given is None:
            part.encode(operators, [torch.full_like(mine, torch.nan) for mine in self._mine])
        elif isinstance(operators, SignOperators) and operators.kernels is kernels_for(_CPU, "cpu") and self._segments:
            from onebit.compress.cpu.mean import encode_mean  # Numba is imported where it is first used

            theirs, rank = self._from_others[self._to_read], self._inside.rank
            encode_mean(given, theirs, rank, part.residual, part.mask, part.sent, part.layout, part.squared)
        else:
            part.encode(operators, self._mean(given))

    def mean_of(self, tensors: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return self._mean(self._pieces(tensors))

    def _mean(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        theirs, rank = self._from_others[self._to_read], self._inside.rank
        for given, span, mine in zip(pieces, self._spans, self._mine, strict=True):
            for start in range(0, mine.numel(), SLAB):
                slab = slice(start, start + SLAB)
                rows = [row[span][slab] for row in theirs]
                rows.insert(rank, given[slab])
                mean = mine[slab].copy_(rows[0])
                for row in rows[1:]:
                    mean += row
                mean.div_(self._ranks)
        return self._mine

    def _check_sound(self) -> None:
        """Raise TransportError where a collective has failed: others may be behind, and read what was given before."""
        with self._inside.guard("all_to_all"):
            pass

    def _pieces(self, tensors: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Of this rank's own slice, a flat tensor per segment; None: as it was filled."""
        if tensors is None:
            return [self._own_numbers()[span] for span in self._spans]
        return [tensors[s.tensor].view(-1)[s.offset : s.offset + s.numel] for s in self._segments]

    def _own_numbers(self) -> Tensor:
        """Where `fill` has the numbers of this rank's own slice written, (slice elements,) fp32."""
        if self._filled is None:
            self._filled = torch.zeros(self._given.shape[-1])
        return self._filled


def _place(slice_of: int, held_by: int) -> int:
    """Where in its row a rank has the slice of another: its own is left out."""
    return slice_of - (slice_of > held_by)


def make_nodes(layouts: Sequence[Layout], levels: Levels, device: torch.device) -> Sequence[Node]:
    """What carries these buckets inside a node: memory that its processes share, for CPU tensors; else its backend.

    Collective.

    Args:
        layouts: of whole buckets, of only the tensors that each uses.
        levels: whose inner one it is.
        device: where the tensors are.

    Raises:
        TransportError: a rank did not take part within the timeout.
    """
    memory = None
    ranks = levels.inside.size
    slices = [layout.padded_numel // ranks for layout in layouts]
    row_bytes = [2 * 4 * (ranks - 1) * numel for numel in slices]
    payload_bytes = [layout.chunks * layout.payload_bytes for layout in layouts]
    if device.type == "cpu" and levels.inside.in_processes and layouts:
        memory = share_memory(levels.inside, sum(row_bytes), sum(payload_bytes))
    if memory is None:
        return [CarriedNode(layout, levels, device) for layout in layouts]
    mine = torch.zeros(max(slices))
    rows = torch.split(memory.rows, row_bytes, dim=1)
    nodes = []
    for layout, numel, row, gathered in zip(
        layouts, slices, rows, torch.split(memory.common, payload_bytes), strict=True
    ):
        numbers = row.view(torch.float32).view(ranks, 2, ranks - 1, numel).transpose(0, 1)
        nodes.append(SharedNode(layout, levels, numbers, gathered, mine[:numel]))
    return nodes
