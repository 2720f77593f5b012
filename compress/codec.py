"""`Codec`: what turns tensors into payloads and back, whatever is in them; its public face checks every argument."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from onebit.compress.checks import (
    check_residual,
    checked_numel,
    dense_tensors,
    full_mask,
    one_device,
    payload_output,
    payload_rows,
)
from onebit.compress.errors import InputError
from onebit.compress.layout import Layout, plan


class Operators(Protocol):
    """What a codec does to tensors, with nothing checked; the methods of `Codec` say what the arguments must be.

    Here `mask` has layout.padded_numel / 8 bytes, a residual is padded or ends with the last real element, and payloads
    are (ranks, payload_bytes).
    """

    def encode(
        self, tensors: Sequence[Tensor], residual: Tensor | None, mask: Tensor | None, out: Tensor, layout: Layout
    ) -> None:
        """As `Codec.encode`."""

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
        """Put `residual` back to what it was before `reduce_encode` of the same arguments, to within rounding.

        Args:
            keep: 0-dim bool on the same device: nothing is put back where it is true, and the host need not know; None:
                it is put back.
        """

    def all_finite(self, payloads: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
        """As `Codec.all_finite`, of several buffers on one device, at least one, each with its layout."""

    def decode(self, payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout) -> None:
        """As `Codec.decode`."""


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """What goes on the wire: `bits` per element and one fp32 scale per block of consecutive elements of a tensor.

    A codec is a frozen dataclass of its options, and equal codecs write equal bytes. It says in `unchecked` how it
    encodes; all else stands here. It conserves, on every element that takes part, input + old residual = decoded + new
    residual. A block with a number that is not finite says so by a scale that is not finite, decodes to NaN, and leaves
    its residual as it was.

    Attributes:
        block_size: consecutive elements of one tensor that share a scale, a multiple of 32; None: all elements of a
            tensor share one, where a codec can do that.
        kernels: name of the implementation to use; None: the fastest for the device of the tensors.
        bits: of an element's code in a payload.
        error_feedback: averages keep what was not said and add it to what they encode next.
        unbiased: what a payload says is right on average.

    Raises:
        InputError: an attribute has a value other than these.
    """

    bits: ClassVar[int]

    block_size: int | None = 1024
    kernels: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        size = self.block_size
        if size is not None and (type(size) is not int or size < 32 or size % 32):
            raise InputError(
                f"{type(self).__name__}: block_size must be a positive multiple of 32, or None for a scale per tensor, "
                f"got {size!r}"
            )

    @property
    def error_feedback(self) -> bool:
        """Whether averages keep what was not said and add it to what they encode next."""
        return True

    @property
    def unbiased(self) -> bool:
        """Whether what a payload says is right on average, over whatever the codec draws at random."""
        return False

    @abstractmethod
    def kernels_on(self, device: torch.device | str) -> str:
        """Return the name of the implementation that runs for tensors on `device`."""

    @abstractmethod
    def unchecked(self, device: torch.device) -> Operators:
        """Return the operators without checks, for who makes the same call again and again."""

    def plan(
        self, tensors: Sequence[Tensor | int], chunks: int = 1, bucket_numel: int | None = None
    ) -> tuple[Layout, ...]:
        """Lay out tensors (or their sizes) for `chunks` ranks, in buckets of about `bucket_numel` elements.

        Returns:
            One layout per bucket; at least one.
        """
        numels = [t if isinstance(t, int) else t.numel() for t in tensors]
        return plan(numels, self.block_size, chunks, bucket_numel, self.bits)

    def encode(
        self,
        x: Tensor | Sequence[Tensor],
        residual: Tensor | None = None,
        *,
        layout: Layout | None = None,
        mask: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Encode `x` + `residual`; what the payload does not say goes into `residual`.

        Args:
            x: a contiguous tensor of any shape, fp32, bf16 or fp16, or the list of them that `layout` was planned for.
            residual: fp32, updated in place. For one tensor at least x.numel() elements, with a layout of several
                tensors `layout.padded_numel`. None: nothing is added and the error is dropped.
            layout: from `plan`; None: one payload of `x` alone.
            mask: uint8, one bit per element in the layout's block order (for one tensor: element order),
                little-endian. A set bit takes the element out: it counts in no scale, holds no residual and decodes
                to 0.
            out: (chunks · payload_bytes,) uint8 to write to; None: a new one. Must not overlap the other arguments.

        Returns:
            `out`: one payload per chunk, each ``[codes | fp32 scales]``.

        Raises:
            InputError: a wrong dtype, size, device or layout; nothing was changed.
        """
        tensors = dense_tensors(x, "encode")
        layout = self._layout(layout, tensors, "encode")
        device = one_device(tensors, "encode")
        check_residual(residual, layout.padded_numel, layout, device)
        mask = full_mask(mask, layout, device)
        out = payload_output(out, layout.chunks, layout, device)
        self.unchecked(device).encode(tensors, residual, mask, out, layout)
        return out

    def reduce_encode(
        self,
        payloads: Tensor,
        residual: Tensor | None = None,
        *,
        numel: int | None = None,
        layout: Layout | None = None,
        chunk: int = 0,
        mask: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Encode the mean of several ranks' payloads of one chunk, plus `residual`.

        Args:
            payloads: (ranks, payload_bytes) or flat, uint8, contiguous.
            residual: fp32 of that chunk, updated in place: for one tensor at least `numel` elements, else
                `layout.chunk_numel`.
            numel: number of elements, in place of `layout`, for payloads of one tensor.
            layout, mask, out: as for `encode`; `out` is (payload_bytes,).
            chunk: which chunk of the layout the payloads are of.

        Returns:
            `out`.

        Raises:
            InputError: a wrong dtype, size, device or layout; nothing was changed.
        """
        layout = self._layout(layout, numel, "reduce_encode")
        if not 0 <= chunk < layout.chunks:
            raise InputError(f"reduce_encode: chunk must be in [0, {layout.chunks}), got {chunk}")
        device = payloads.device
        rows = payload_rows(payloads, layout.payload_bytes, "reduce_encode")
        check_residual(residual, layout.chunk_numel, layout, device, chunk)
        mask = full_mask(mask, layout, device)
        out = payload_output(out, 1, layout, device)
        self.unchecked(device).reduce_encode(rows, residual, mask, out, layout, chunk)
        return out

    def decode(
        self,
        payloads: Tensor,
        out: Tensor | Sequence[Tensor] | None = None,
        *,
        numel: int | None = None,
        layout: Layout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | Sequence[Tensor]:
        """Turn one payload per chunk back into numbers.

        Args:
            payloads: (chunks, payload_bytes) or flat, uint8, contiguous.
            out: the contiguous tensor, or list of them, to write; rounded to its dtype. None: a new (numel,) fp32
                tensor.
            numel: number of elements when `out` is None.
            layout, mask: as given to `encode`.

        Returns:
            `out`.

        Raises:
            InputError: a wrong dtype, size, device or layout; nothing was changed.
        """
        if out is None:
            if numel is None:
                raise InputError("decode: give out=, the tensor to write, or numel=, the elements of a new one")
            out = torch.empty(checked_numel(numel, "decode"), device=payloads.device)
        tensors = dense_tensors(out, "decode")
        layout = self._layout(layout, tensors, "decode")
        device = one_device([payloads, *tensors], "decode")
        rows = payload_rows(payloads, layout.payload_bytes, "decode")
        if layout.blocks and rows.shape[0] != layout.chunks:
            raise InputError(f"decode: expected {layout.chunks} payloads, one per chunk, got {rows.shape[0]}")
        mask = full_mask(mask, layout, device)
        self.unchecked(device).decode(rows, mask, tensors, layout)
        return out

    def all_finite(self, payloads: Tensor, layout: Layout) -> Tensor:
        """Tell whether payloads decode to finite numbers, from their scales alone.

        Args:
            payloads: any number of payloads of `layout`, (k, payload_bytes) or flat, uint8, contiguous.

        Returns:
            0-dim bool on the device of `payloads`, without a synchronisation.

        Raises:
            InputError: a wrong dtype or size.
        """
        rows = payload_rows(payloads, layout.payload_bytes, "all_finite")
        return self.unchecked(payloads.device).all_finite([rows], [layout])

    def _layout(self, layout: Layout | None, content: Sequence[Tensor] | int | None, operation: str) -> Layout:
        """The layout given, checked against the tensors; or the one of a single tensor."""
        if layout is None:
            if content is None:
                raise InputError(f"{operation}: give numel= (payloads of one tensor) or layout= (of several)")
            sizes = [t.numel() for t in content] if isinstance(content, list) else [checked_numel(content, operation)]
            return self.plan(sizes)[0]
        if layout.shared_scale != (self.block_size is None) or self.block_size not in (None, layout.block_size):
            raise InputError(f"{operation}: the layout was planned with another block_size than {self.block_size}")
        if layout.bits != self.bits:
            raise InputError(
                f"{operation}: the layout was planned for {layout.bits} bits per element, {type(self).__name__} takes "
                f"{self.bits}; plan with the codec that runs"
            )
        if not isinstance(content, int) and content is not None:
            for s in layout.segments:
                if s.tensor >= len(content) or content[s.tensor].numel() < s.offset + s.numel:
                    raise InputError(
                        f"{operation}: the layout expects at least {s.offset + s.numel} elements in tensor {s.tensor}, "
                        f"got {content[s.tensor].numel() if s.tensor < len(content) else 'no such tensor'}; plan again "
                        "when shapes change"
                    )
        return layout


def as_codec(codec: Codec | None) -> Codec:
    """Return `codec`, or the default one, a `SignCodec`, for None.

    Raises:
        InputError: it is something else.
    """
    from onebit.compress.sign import SignCodec  # which is made of what stands above

    if codec is None:
        return SignCodec()
    if not isinstance(codec, Codec):
        raise InputError(f"a codec must be a Codec, such as SignCodec(block_size=1024), or None, got {codec!r}")
    return codec
