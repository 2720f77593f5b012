"""`BoundOperators`: the functions of one implementation with the options of one codec, as averages call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from onebit.compress import blockwise
from onebit.compress.blockwise import BlockFormat
from onebit.compress.layout import Layout

How = TypeVar("How")
HowTaken = TypeVar("HowTaken", contravariant=True)


class Functions(Protocol[HowTaken]):
    """One implementation of every operator, told `how`; `blockwise` says what each does, and nothing is checked."""

    def encode(
        self,
        tensors: Sequence[Tensor],
        residual: Tensor | None,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        how: HowTaken,
    ) -> None:
        """Tensors to one payload per chunk."""

    def reduce_encode(
        self,
        payloads: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        chunk: int,
        how: HowTaken,
    ) -> None:
        """Every rank's payload of one chunk to the payload of their mean."""

    def undo_reduce(
        self,
        payloads: Tensor,
        residual: Tensor,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        chunk: int,
        keep: Tensor | None,
        how: HowTaken,
    ) -> None:
        """The residual as it was before reduce_encode, unless `keep`."""

    def all_finite(self, payloads: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
        """Whether all scales are finite, 0-dim bool on the device."""

    def decode(
        self, payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout, how: HowTaken
    ) -> None:
        """One payload per chunk to tensors."""


@dataclass(frozen=True)
class BoundOperators(Generic[How]):
    """The `Operators` of a codec, from an implementation and what it is told; a layout without blocks is left alone."""

    kernels: Functions[How]
    how: How

    def encode(
        self, tensors: Sequence[Tensor], residual: Tensor | None, mask: Tensor | None, out: Tensor, layout: Layout
    ) -> None:
        """As `Codec.encode`."""
        if layout.blocks:
            self.kernels.encode(tensors, residual, mask, out, layout, self.how)

    def reduce_encode(
        self,
        payloads: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        chunk: int,
    ) -> None:
        """As `Codec.reduce_encode`."""
        if layout.blocks:
            self.kernels.reduce_encode(payloads, residual, mask, out, layout, chunk, self.how)

    def undo_reduce(
        self,
        payloads: Tensor,
        residual: Tensor,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        chunk: int,
        keep: Tensor | None = None,
    ) -> None:
        """As `Operators.undo_reduce`."""
        if layout.blocks:
            self.kernels.undo_reduce(payloads, residual, mask, out, layout, chunk, keep, self.how)

    def all_finite(self, payloads: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
        """As `Operators.all_finite`."""
        if not any(layout.blocks for layout in layouts):
            return torch.ones((), dtype=torch.bool, device=payloads[0].device)
        return self.kernels.all_finite(payloads, layouts)

    def decode(self, payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout) -> None:
        """As `Codec.decode`."""
        if layout.blocks:
            self.kernels.decode(payloads, mask, tensors, layout, self.how)


class BlockOperators(BoundOperators[BlockFormat]):
    """The `Operators` of a codec that a `BlockFormat` describes, in plain torch, on tensors of any device."""

    def __init__(self, form: BlockFormat) -> None:
        super().__init__(blockwise, form)
