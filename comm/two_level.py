"""A bucket of an average on two levels: fp32 inside a node, compressed between nodes, payloads inside again.

inside    all_to_all of fp32 slices → the mean over the node of my slice, a k-th of the bucket
between   the two phases of a `Bucket` over the ranks with the same slice → one payload per node
inside    all_gather of those payloads → one payload per chunk of the whole bucket → decode
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebit.comm.backend import Work
from onebit.comm.bucket import Bucket
from onebit.comm.levels import Levels
from onebit.comm.part import Part
from onebit.comm.stats import Stage
from onebit.compress.codec import Operators
from onebit.compress.errors import InputError
from onebit.compress.layout import Layout


class NodeMean:
    """The numbers of a bucket inside a node: those of this rank, and of its slice the mean over the node.

    Every slice is summed in the order of ranks by the rank that looks after it, so its bits depend on no transport.

    Args:
        layout: of the whole bucket.
        levels: whose inner one carries it.
        device: where the tensors are.

    Attributes:
        given: (layout.padded_numel,) fp32, this rank's numbers in block order.
        mine: the mean, fp32, one tensor per segment of the slice.
        filled: there are numbers that were not sent yet.
    """

    def __init__(self, layout: Layout, levels: Levels, device: torch.device) -> None:
        given, received = torch.zeros(2, layout.padded_numel, device=device)
        self.given = given
        self._inside = levels.inside
        self._received = received
        self._rows = received.view(levels.inside.size, -1)
        self._next = self._all_to_all = levels.inside.prepare_all_to_all(received, given)
        # A tensor, for CUDA multiplies by the rounded inverse of a number.
        self._ranks = torch.full((), float(levels.inside.size), device=device)
        self._work: Work | None = None
        own = levels.slice_of(layout)
        self._slots = [given[layout.residual_span(s)] for s in layout.segments]
        self.mine = [self._rows[0][own.residual_span(s)] for s in own.segments]
        self.filled = False

    def give(self, pieces: Sequence[Tensor]) -> None:
        """Have these numbers to send, a flat tensor per segment of the layout; one that fills it is sent as it lies."""
        alone = len(pieces) == 1 and pieces[0].dtype == torch.float32 and pieces[0].numel() == self.given.numel()
        if alone:
            self._next = self._inside.prepare_all_to_all(self._received, pieces[0])
        else:
            torch._foreach_copy_(self._slots, list(pieces))
        self.filled = True

    def spoil(self) -> None:
        """Have NaN to send."""
        self.given.fill_(torch.nan)
        self.filled = True

    def start(self, in_line: bool) -> None:
        """Start sending slices to who looks after them."""
        self._work = self._next.start(in_line=in_line)
        self._next, self.filled = self._all_to_all, False

    def finish(self) -> bool:
        """Wait for what was started and take the mean; False where nothing was."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        mean = self._rows[0]
        for row in self._rows[1:]:
            mean += row
        mean.div_(self._ranks)
        return True


@dataclass(frozen=True, kw_only=True)
class TwoLevelPart(Part):
    """`encode` gives numbers and no payloads, and `sent` is a buffer for them; what is encoded is the node's mean.

    Attributes:
        node: the numbers inside the node.
        between: the slice, which is encoded and keeps the error feedback.
    """

    node: NodeMean
    between: Bucket

    def encode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Give the whole list of tensors, row-major; they must stay untouched until the node's mean is taken."""
        picked = self._pick(rows)
        self.node.give([picked[s.tensor].view(-1)[s.offset : s.offset + s.numel] for s in self.layout.segments])

    def undo_encode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Put the slice's error feedback back to what it was before it was encoded, to within rounding."""
        if self.between.encoded:
            self.between.part.undo_encode(operators, self.node.mine)
            self.between.encoded = False

    def said(self, operators: Operators) -> Tensor:
        """As of a `Part`, of the slice."""
        return self.between.part.said(operators)


class TwoLevelBucket(Bucket):
    """A bucket whose exchange is that of a slice, between exchanges inside the node.

    Args:
        operators, device: as for `Bucket`.
        layout: of the whole bucket, with a chunk for every rank.
        levels: what carries it.
        worker, server: as for `Bucket`, of the slice.
    """

    first_stage, last_stage = "local_mean", "local_gather"

    def __init__(
        self,
        operators: Operators,
        layout: Layout,
        levels: Levels,
        worker: Tensor | None,
        server: Tensor | None,
        device: torch.device,
    ) -> None:
        own, used = layout.of_used_tensors()
        self._operators = operators
        self._node = NodeMean(own, levels, device)
        self._slice = levels.slice_of(own)
        self._between = Bucket(operators, self._slice.by_segment(), levels.between, worker, server, device)
        gathered = torch.zeros(own.chunks * own.payload_bytes, dtype=torch.uint8, device=device)
        self._share = levels.inside.prepare_all_gather(gathered, self._between.part.gathered)
        self._shared: Work | None = None
        self._in_line = False
        self.encoded = False
        self.part = TwoLevelPart(
            layout=own,
            used=used,
            residual=None,
            mask=None,
            sent=self._node.given.view(torch.uint8),
            gathered=gathered,
            squared=self._between.part.squared,
            node=self._node,
            between=self._between,
        )

    def set_mask(self, masks: Sequence[Tensor] | None) -> None:
        """As of a `Bucket`."""
        super().set_mask(masks)
        if masks is not None:
            flat = [masks[i].reshape(-1) for i in self.part.used]
            masks = [flat[s.tensor][s.offset : s.offset + s.numel] for s in self._slice.segments]
        self._between.set_mask(masks)

    def encode(self, encode: Callable[[Part], None]) -> None:
        """Have numbers given; the slice is encoded when the node's mean is there.

        Raises:
            InputError: none were given, for `encode` writes payloads.
        """
        self._between.begin()
        encode(self.part)
        if not self._node.filled:
            raise InputError(
                "start_with() with local_group= takes an encode that calls the one of encoding() for every part, since "
                "what is encoded is the mean of the node; average without local_group, or call start()"
            )
        self.encoded = True

    def spoil(self) -> None:
        """Have NaN sent."""
        self._between.begin()
        self._node.spoil()

    def exchange(self, in_line: bool) -> None:
        """Start the exchange inside the node."""
        self._in_line = in_line
        self._node.start(in_line)

    def send_on(self, stages: Mapping[str, Stage]) -> None:
        """Encode the node's mean, when it is there, and start phase 1 between nodes."""
        with stages["local_mean"]:
            here = self._node.finish()
        if here:
            with stages["encode"]:
                self._between.encode(lambda part: part.encode(self._operators, self._node.mine))
            with stages["all_to_all"]:
                self._between.exchange(self._in_line)

    def wait_exchange(self) -> None:
        """Wait for phase 1 between nodes."""
        self._between.wait_exchange()

    def reduce_encode(self) -> None:
        """Encode the mean over nodes of what came."""
        self._between.reduce_encode()

    def gather(self, in_line: bool) -> None:
        """Start phase 2 between nodes."""
        self._between.gather(in_line)

    def bring_home(self, stages: Mapping[str, Stage]) -> None:
        """Wait for phase 2 between nodes, and start handing its payloads to the ranks of the node."""
        with stages["all_gather"]:
            self._between.wait_gather()
        with stages["local_gather"]:
            self._shared = self._share.start(in_line=self._in_line)

    def wait_gather(self) -> None:
        """Wait for the payloads of all chunks."""
        if self._shared is not None:
            self._shared.wait()

    def undo_reduce(self, keep: Tensor | None = None) -> None:
        """As of a `Bucket`."""
        self._between.undo_reduce(keep)
