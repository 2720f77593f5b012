"""What becomes of a bucket inside a node: the mean of a slice, and payloads for all ranks of the node."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onebit.comm.backend import Collective, Work
from onebit.comm.levels import Levels
from onebit.comm.part import Part
from onebit.compress.codec import Operators
from onebit.compress.layout import Layout


class Node(ABC):
    """The contract of what carries a bucket inside a node, and what every such class has in common.

    Every slice is summed in the order of ranks by the rank that looks after it, so its bits depend on no transport.

    Args:
        ranks: how many the node has.
        transport: what numbers and payloads travel by.
        gathered: (chunks · payload_bytes,) uint8, for the payloads of all chunks.
        own: the payloads of this rank's slice, which it brings.
        exchange: gives the others what they need for their mean.
        share: gives the others what is in `own`.

    Attributes:
        transport: what numbers and payloads travel by.
        gathered, own: as given.
        filled: there are numbers that were not sent yet.
        keeps_mean: `mean_of` needs no tensors.
        travels: numbers are on their way between `start` and `finish`, when something else can be done; False: they are
            there as soon as all ranks have given theirs.
    """

    keeps_mean: bool
    travels: bool

    def __init__(
        self,
        ranks: int,
        *,
        transport: str,
        gathered: Tensor,
        own: Tensor,
        exchange: Collective,
        share: Collective,
    ) -> None:
        self.transport = transport
        self.gathered = gathered
        self.own = own
        self.filled = False
        self._exchange = exchange
        self._share = share
        self._work: Work | None = None
        # A tensor, for CUDA multiplies by the rounded inverse of a number.
        self._ranks = torch.full((), float(ranks), device=gathered.device)

    @abstractmethod
    def give(self, tensors: Sequence[Tensor]) -> None:
        """Have these numbers to send, those of the layout's tensors; they must stay untouched until `finish`."""

    @abstractmethod
    def fill(self, write: Callable[[Sequence[Tensor]], None]) -> None:
        """Instead of `give`: have `write` put the numbers where they are needed.

        Args:
            write: is given a flat fp32 tensor for each chunk of the layout, in the order of its blocks; what it leaves
                in padding is not read.
        """

    @abstractmethod
    def spoil(self) -> None:
        """Have NaN to send."""

    def start(self, in_line: bool) -> None:
        """Start the exchange; `in_line` as for `Collective.start`."""
        self._work = self._exchange.start(in_line=in_line)
        self.filled = False

    def finish(self) -> bool:
        """Wait for what was started; False where nothing was."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return True

    @abstractmethod
    def encode(self, operators: Operators, part: Part) -> None:
        """After `finish`: encode the mean of the slice, of which `part` is what is sent."""

    @abstractmethod
    def mean_of(self, tensors: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """After `finish`: the mean of these tensors, which were given, and of what the others gave.

        Args:
            tensors: None: the numbers are those that `fill` had written.

        Returns:
            A flat fp32 tensor per segment of the slice, to be used before anything else is asked of a node.
        """

    def share(self, in_line: bool) -> Work:
        """Start handing `own` to the others; when the work is done all of `gathered` is here."""
        return self._share.start(in_line=in_line)


class CarriedNode(Node):
    """Slices and payloads travel over the backend of the node, from and to buffers of this rank.

    Args:
        layout: of the whole bucket.
        levels: whose inner one carries it.
        device: where the tensors are.
    """

    keeps_mean = True
    travels = True

    def __init__(self, layout: Layout, levels: Levels, device: torch.device) -> None:
        inside = levels.inside
        given, received = torch.zeros(2, layout.padded_numel, device=device)
        gathered = torch.zeros(layout.chunks * layout.payload_bytes, dtype=torch.uint8, device=device)
        own = levels.between.buffer(gathered.numel() // inside.size, device)
        self._inside = inside
        self._given, self._received = given, received
        self._chunks = given.view(layout.chunks, -1).unbind()
        self._rows = received.view(inside.size, -1)
        self._slots = [given[layout.residual_span(s)] for s in layout.segments]
        self._segments = layout.segments
        own_slice = levels.slice_of(layout)
        self._mine = [self._rows[0][own_slice.residual_span(s)] for s in own_slice.segments]
        self._all_to_all = inside.prepare_all_to_all(received, given)
        super().__init__(
            inside.size,
            transport=inside.name,
            gathered=gathered,
            own=own,
            exchange=self._all_to_all,
            share=inside.prepare_all_gather(gathered, own),
        )

    def give(self, tensors: Sequence[Tensor]) -> None:
        pieces = [tensors[s.tensor].view(-1)[s.offset : s.offset + s.numel] for s in self._segments]
        if len(pieces) == 1 and pieces[0].dtype == torch.float32 and pieces[0].numel() == self._given.numel():
            self._exchange = self._inside.prepare_all_to_all(self._received, pieces[0])  # it is sent as it lies
        else:
            torch._foreach_copy_(self._slots, pieces)
        self.filled = True

    def fill(self, write: Callable[[Sequence[Tensor]], None]) -> None:
        write(self._chunks)
        self.filled = True

    def spoil(self) -> None:
        self._given.fill_(torch.nan)
        self.filled = True

    def start(self, in_line: bool) -> None:
        super().start(in_line)
        self._exchange = self._all_to_all

    def finish(self) -> bool:
        here = super().finish()
        if here:
            mean = self._rows[0]
            for row in self._rows[1:]:
                mean += row
            mean.div_(self._ranks)
        return here

    def encode(self, operators: Operators, part: Part) -> None:
        part.encode(operators, self._mine)

    def mean_of(self, tensors: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return self._mine
