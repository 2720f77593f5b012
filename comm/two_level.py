"""A bucket of an average on two levels: fp32 inside a node, compressed between nodes, payloads inside again.

inside    fp32 slices to who looks after them → the mean over the node of my slice, a k-th of the bucket
between   the two phases of a `Bucket` over the ranks with the same slice → one payload per node
inside    those payloads to all → one payload per chunk of the whole bucket → decode

A `Node` carries what stays inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebit.comm.backend import Work
from onebit.comm.bucket import Bucket
from onebit.comm.levels import Levels
from onebit.comm.node import Node
from onebit.comm.part import Part
from onebit.comm.stats import Stage
from onebit.compress.codec import Operators
from onebit.compress.errors import InputError
from onebit.compress.layout import Layout


@dataclass(frozen=True, kw_only=True)
class TwoLevelPart(Part):
    """`encode` gives numbers and no payloads; what is encoded is the node's mean, and `sent` that of the slice.

    Attributes:
        node: what carries the numbers inside the node.
        between: the slice, which is encoded and keeps the error feedback.
    """

    node: Node
    between: Bucket

    @property
    def keeps_encoded(self) -> bool:
        """Whether the node's mean is kept."""
        return self.node.keeps_mean

    def encode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Give the whole list of tensors, row-major; they must stay untouched until the node's mean is taken."""
        self.node.give(self._pick(rows))

    def fill(self, write: Callable[[Sequence[Tensor]], None]) -> None:
        """Instead of `encode`: have `write` put the numbers where they are needed; see `Node.fill`."""
        self.node.fill(write)

    def undo_encode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Put the slice's error feedback back to what it was before it was encoded, to within rounding."""
        if self.between.encoded:
            self.between.part.undo_encode(operators, self.node.mean_of(self._pick(rows)))
            self.between.encoded = False

    def forget(self) -> None:
        """As of a `Part`, of the slice."""
        self.between.part.forget()
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
        node: what carries it inside the node.
        worker, server: as for `Bucket`, of the slice.
    """

    first_stage, last_stage = "local_mean", "local_gather"

    def __init__(
        self,
        operators: Operators,
        layout: Layout,
        levels: Levels,
        node: Node,
        worker: Tensor | None,
        server: Tensor | None,
        device: torch.device,
    ) -> None:
        own, used = layout.of_used_tensors()
        self._operators = operators
        self._node = node
        self.lags = node.travels
        self._slice = levels.slice_of(own)
        self._between = Bucket(operators, self._slice.by_segment(), levels.between, worker, server, device, node.own)
        self._shared: Work | None = None
        self._in_line = False
        self.encoded = False
        self.part = TwoLevelPart(
            layout=own,
            used=used,
            residual=None,
            mask=None,
            sent=self._between.part.sent,
            gathered=node.gathered,
            squared=self._between.part.squared,
            node=node,
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
                "start_with() with local_group= takes an encode that calls the one of encoding(), or the part's "
                "fill(), for every part, since what is encoded is the mean of the node; average without local_group, "
                "or call start()"
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
                self._between.encode(lambda part: self._node.encode(self._operators, part))
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
            self._shared = self._node.share(self._in_line)

    def wait_gather(self) -> None:
        """Wait for the payloads of all chunks."""
        if self._shared is not None:
            self._shared.wait()

    def undo_reduce(self, keep: Tensor | None = None) -> None:
        """As of a `Bucket`."""
        self._between.undo_reduce(keep)
