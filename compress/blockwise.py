"""A codec's operators in plain torch, from nothing but what becomes of the numbers of one block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.compress.blocks import codes_of, gathered, mask_of, real_elements, scales_of, scatter
from onebit.compress.errors import InputError
from onebit.compress.layout import Layout
from onebit.compress.reference import all_finite, unpack_bits

__all__ = ["BlockFormat", "all_finite", "decode", "encode", "reduce_encode", "undo_reduce"]


class BlockFormat(ABC):
    """What the numbers of a block become on the wire: codes and one scale, in which all that is said is linear.

    Blocks are rows. The rest of a codec, such as residuals, padding and masks, is `BlockOperators`'.
    """

    @abstractmethod
    def encode(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Turn blocks into codes and scales.

        Args:
            c: (k, block_size) fp32, 0 where an element is padding or masked; any number may be not finite.

        Returns:
            (k, block_size · bits / 8) uint8, and (k,) fp32, NaN for a block with a number that is not finite.
        """

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Turn codes and scales back into (k, block_size) fp32, each proportional to its scale, NaN where that is."""

    def restore(self, decoded: Tensor) -> Tensor:
        """Turn what `decode` returned, or a sum of it over ranks, into the blocks' own numbers."""
        return decoded

    def said(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Turn codes and scales into the blocks' own numbers, to within rounding what `restore` makes of `decode`."""
        return self.restore(self.decode(codes, scales))


@torch.no_grad()
def encode(
    tensors: Sequence[Tensor],
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    how: BlockFormat,
) -> None:
    """Write one payload per chunk to `out`; update `residual` (padded, or ending with the last real element)."""
    values = gathered(tensors, layout, out.device)
    real = real_elements(layout, layout.segments, layout.blocks, out.device)
    _encode(values, residual, real, mask, out.view(layout.chunks, -1), layout, how)


@torch.no_grad()
def reduce_encode(
    payloads: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    how: BlockFormat,
) -> None:
    """Write the payload of the mean of `payloads` (ranks, payload_bytes), all of `chunk`, to `out`."""
    real = real_elements(layout, layout.chunk_segments(chunk), layout.chunk_blocks, out.device)
    mean = _mean(payloads, layout, how).view(-1)
    _encode(mean, residual, real, mask_of(mask, layout, chunk), out.view(1, -1), layout, how)


@torch.no_grad()
def undo_reduce(
    payloads: Tensor,
    residual: Tensor,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    keep: Tensor | None,
    how: BlockFormat,
) -> None:
    """Put `residual` (chunk_numel,) back to what it was before `reduce_encode` wrote `out`, to within rounding.

    Args:
        keep: 0-dim bool on the same device: nothing is put back where it is true; None: it is put back.
    """
    real = real_elements(layout, layout.chunk_segments(chunk), layout.chunk_blocks, out.device)
    unchanged = ~scales_of(out.view(1, -1), layout).isfinite().view(-1, 1) | ~real
    dead = mask_of(mask, layout, chunk)
    if dead is not None:
        unchanged |= unpack_bits(dead).view(unchanged.shape)
    if keep is not None:
        unchanged |= keep
    said = how.said(*_sections(out.view(1, -1), layout))
    now = residual.view(unchanged.shape)
    now.copy_(torch.where(unchanged, now, (now + said) - _mean(payloads, layout, how)))


@torch.no_grad()
def decode(payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout, how: BlockFormat) -> None:
    """Write the elements of all chunks of `payloads` (chunks · payload_bytes,) to `tensors`."""
    codes, scales = _sections(payloads.view(layout.chunks, -1), layout)
    values = how.said(codes, scales).view(-1)
    if mask is not None:
        values = torch.where(unpack_bits(mask), 0.0, values)
    scatter(values, tensors, layout)


def _encode(
    values: Tensor,
    residual: Tensor | None,
    real: Tensor,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    how: BlockFormat,
) -> None:
    """Finish encode and reduce_encode: `values` is flat and padded, `real` (blocks, block_size) bool."""
    live = real if mask is None else real & ~unpack_bits(mask).view(real.shape)
    old = torch.zeros_like(values)
    if residual is not None:
        held = min(residual.numel(), old.numel())
        old[:held] = residual[:held]
        values = values + old
    c = torch.where(live, values.view(live.shape), 0.0)
    codes, scales = how.encode(c)
    _check_written(how, codes, scales, (len(c), layout.block_bytes))
    payloads = out.shape[0]
    codes_of(out, layout).copy_(codes.view(payloads, -1))
    scales_of(out, layout).copy_(scales.view(payloads, -1))
    if residual is not None:
        said = how.said(codes, scales)
        kept = ~scales.isfinite()[:, None] | ~real
        new = torch.where(kept, old.view(live.shape), torch.where(live, c - said, 0.0))
        residual[:held] = new.view(-1)[:held]


def _check_written(how: BlockFormat, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> None:
    """Raise InputError unless a format's codes are uint8 of `shape` and its scales are one per block."""
    if codes.dtype != torch.uint8 or codes.shape != shape or scales.shape != shape[:1]:
        raise InputError(
            f"{type(how).__name__}.encode must return codes, uint8 {shape}, and scales, {shape[:1]}; got "
            f"{str(codes.dtype).removeprefix('torch.')} {tuple(codes.shape)} and {tuple(scales.shape)}: let it write "
            "the codec's `bits` per element, and one scale per block"
        )


def _mean(payloads: Tensor, layout: Layout, how: BlockFormat) -> Tensor:
    """(chunk_blocks, block_size) fp32: the mean of what payloads (ranks, payload_bytes) of one chunk decode to."""
    # Divided by a tensor, as torch multiplies by the reciprocal of a number on some devices.
    ranks = torch.full((layout.chunk_blocks,), float(payloads.shape[0]), device=payloads.device)
    total = None
    for rank in range(payloads.shape[0]):
        codes, scales = _sections(payloads[rank : rank + 1], layout)
        share = how.decode(codes, scales / ranks)
        total = share if total is None else total + share
    assert total is not None
    return how.restore(total)


def _sections(payloads: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Split (k, payload_bytes) into the codes (blocks, block_bytes) uint8 and the scales (blocks,) fp32 of k chunks."""
    codes = codes_of(payloads, layout).reshape(-1, layout.block_bytes)
    return codes, scales_of(payloads, layout).reshape(-1)
