"""The public face of a bucket: what it sends and what comes back, for whoever encodes and decodes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebit.compress.codec import Operators
from onebit.compress.layout import Layout
from onebit.compress.reference import unpack_bits


@dataclass(frozen=True, kw_only=True)
class Part:
    """The tensors, or pieces of tensors, of one dtype that travel together. All buffers keep their addresses.

    Attributes:
        layout: how they are laid out, for a list of only the tensors that this part uses.
        used: which those are, as indices into the list that the average was made for.
        residual: (layout.padded_numel,) fp32, error feedback of this rank; whoever encodes updates it in place. None:
            the codec keeps none.
        mask: (layout.padded_numel / 8,) uint8, set where an element takes no part; None: all take part. A later
            `set_mask` makes new parts.
        sent: (layout.chunks · layout.payload_bytes,) uint8, one payload per rank; whoever encodes fills it.
        gathered: of the same size: once the work is finished one payload per chunk, which together are the mean.
        squared: scales of a `SignCodec` are root mean squares, else means of absolute values.
    """

    layout: Layout
    used: tuple[int, ...]
    residual: Tensor | None
    mask: Tensor | None
    sent: Tensor
    gathered: Tensor
    squared: bool

    @property
    def keeps_encoded(self) -> bool:
        """Whether what was encoded is kept here, so that undoing it needs nothing of the caller's."""
        return False

    def encode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Fill `sent` from the whole list of tensors, row-major, and update `residual`."""
        if self.layout.segments:  # else it is padding, of which nothing is said
            operators.encode(self._pick(rows), self.residual, self.mask, self.sent, self.layout)

    def decode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Write the mean to this part of the whole list of tensors, row-major."""
        operators.decode(self.gathered, self.mask, self._pick(rows), self.layout)

    def undo_encode(self, operators: Operators, rows: Sequence[Tensor]) -> None:
        """Put `residual` back to what it was before `encode` of the same list, to within rounding."""
        if self.residual is None or not self.layout.segments:
            return
        rows, layout = self._pick(rows), self.layout
        given = torch.zeros_like(self.residual)
        for s in layout.segments:
            given[layout.residual_span(s)] = rows[s.tensor].view(-1)[s.offset : s.offset + s.numel].float()
        if self.mask is not None:
            given[unpack_bits(self.mask)] = 0.0
        said = self.said(operators)
        # A block that said NaN left its residual as it was.
        self.residual.copy_(torch.where(said.isnan(), self.residual, (self.residual + said) - given))

    def forget(self) -> None:
        """Make the error feedback 0: what it was before `encode` cannot be worked out any more."""
        if self.residual is not None:
            self.residual.zero_()

    def said(self, operators: Operators) -> Tensor:
        """Return what `sent` decodes to, flat fp32 in block order; padding and masked elements are 0."""
        return self._flat(operators, self.sent)

    def received(self, operators: Operators) -> Tensor:
        """Return what `gathered` decodes to, as `said` does."""
        return self._flat(operators, self.gathered)

    def _flat(self, operators: Operators, payloads: Tensor) -> Tensor:
        layout = self.layout.by_segment()
        flat = torch.zeros(layout.padded_numel, device=payloads.device)
        values = [flat[layout.residual_span(s)] for s in layout.segments]
        if values:  # else it is padding, of which nothing was said
            operators.decode(payloads, self.mask, values, layout)
        return flat

    def _pick(self, rows: Sequence[Tensor]) -> Sequence[Tensor]:
        return [rows[i] for i in self.used]
