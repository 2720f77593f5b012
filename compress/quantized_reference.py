"""The operators of the quantizing codecs in plain torch: the specification, and what runs where nothing faster does.

A block of B numbers v, the elements or their transform, has the scale s = A / M, where A is the largest magnitude in
it and M the largest of the format. Every number y = v·(M / A) is rounded to a number q of the format; the block says
q·s. Where it is transformed, it says Hq·(s / √B): the sums Hq of integers are exact, whatever their order. Numbers
below 2⁻¹⁰⁰ alone say nothing: their block has the scale 0. All is fp32, each operation rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebit.compress import blockwise
from onebit.compress.blockwise import BlockFormat
from onebit.compress.layout import Layout
from onebit.compress.quantizer import Quantizer
from onebit.compress.reference import all_finite

__all__ = ["all_finite", "decode", "encode", "reduce_encode", "undo_reduce"]

name = "reference"

TINY = 2.0**-100  # a block whose largest magnitude is below has the scale 0, so that M / A is finite
WORD = 0xFFFFFFFF


def encode(
    tensors: Sequence[Tensor], residual: Tensor | None, mask: Tensor | None, out: Tensor, layout: Layout, how: Quantizer
) -> None:
    """Write one payload per chunk to `out`; update `residual` (padded, or ending with the last real element)."""
    blockwise.encode(tensors, residual, mask, out, layout, QuantizedBlocks(how))


def reduce_encode(
    payloads: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    how: Quantizer,
) -> None:
    """Write the payload of the mean of `payloads` (ranks, payload_bytes), all of `chunk`, to `out`."""
    blockwise.reduce_encode(payloads, residual, mask, out, layout, chunk, QuantizedBlocks(how))


def undo_reduce(
    payloads: Tensor,
    residual: Tensor,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    keep: Tensor | None,
    how: Quantizer,
) -> None:
    """Put `residual` (chunk_numel,) back to what it was before `reduce_encode` wrote `out`, to within rounding.

    Args:
        keep: 0-dim bool on the same device: nothing is put back where it is true; None: it is put back.
    """
    blockwise.undo_reduce(payloads, residual, mask, out, layout, chunk, keep, QuantizedBlocks(how))


def decode(payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout, how: Quantizer) -> None:
    """Write the elements of all chunks of `payloads` (chunks · payload_bytes,) to `tensors`."""
    blockwise.decode(payloads, mask, tensors, layout, QuantizedBlocks(how))


@dataclass(frozen=True)
class QuantizedBlocks(BlockFormat):
    """What becomes of a block; see the top of this file."""

    how: Quantizer

    def encode(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """As `BlockFormat.encode`."""
        v = hadamard(c) if self.how.rotate else c
        bits = (v.view(torch.int32) & 0x7FFFFFFF).amax(1)
        largest = bits.view(torch.float32)
        broken, silent = ~(largest < self.how.bound), largest < TINY
        limit = torch.full_like(largest, self.how.largest)
        scales = torch.where(broken, torch.nan, torch.where(silent, 0.0, largest / limit))
        without = (broken | silent)[:, None]
        y = torch.where(without, 0.0, v * (limit / largest)[:, None])
        if self.how.format == "fp8":
            return y.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8), scales
        q = self._rounded(y, v, largest).clamp(-self.how.largest, self.how.largest).to(torch.int8).view(torch.uint8)
        return (q if self.how.format == "int8" else (q[:, 0::2] & 15) | (q[:, 1::2] << 4)), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """As `BlockFormat.decode`."""
        return self._numbers(codes) * scales[:, None]

    def restore(self, decoded: Tensor) -> Tensor:
        """As `BlockFormat.restore`: the transform is its own inverse."""
        return hadamard(decoded) if self.how.rotate else decoded

    def said(self, codes: Tensor, scales: Tensor) -> Tensor:
        """As `BlockFormat.said`."""
        if not self.how.rotate:
            return self.decode(codes, scales)
        q = self._numbers(codes)
        return sums_and_differences(q) * (scales * root(q.shape[1]))[:, None]

    def _numbers(self, codes: Tensor) -> Tensor:
        if self.how.format == "fp8":
            return codes.view(torch.float8_e4m3fn).float()
        if self.how.format == "int8":
            return codes.view(torch.int8).float()
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(codes.shape[0], -1).to(torch.int8)
        return torch.where(nibbles > 7, nibbles - 16, nibbles).float()

    def _rounded(self, y: Tensor, v: Tensor, largest: Tensor) -> Tensor:
        if not self.how.stochastic:
            return y.round()
        whole = y.floor()
        return whole + (dither(v, largest, self.how.seed) < y - whole)


def hadamard(v: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of each row of (k, B), B a power of two, in one fixed order of sums."""
    return sums_and_differences(v) * root(v.shape[1])


def sums_and_differences(v: Tensor) -> Tensor:
    """√B times the transform of each row of (k, B).

    Strides h = 1, 2, ..., B/2, one after the other: of two elements that are h apart the first becomes their sum and
    the second their difference.
    """
    k, size = v.shape
    h = 1
    while h < size:
        a, b = v.view(k, -1, 2, h).unbind(2)
        v = torch.stack([a + b, a - b], dim=2).view(k, size)
        h *= 2
    return v


def root(size: int) -> float:
    """1/√B, which fp32 numbers are multiplied by as its nearest in fp32."""
    return 1 / math.sqrt(size)


def dither(v: Tensor, largest: Tensor, seed: int) -> Tensor:
    """(k, B) fp32 in [0, 1), drawn from each number's bits and place, its block's largest magnitude, and `seed`.

    So the same input gives the same bytes, with no state to keep.
    """
    block = _mix((largest.view(torch.int32).long() & WORD) ^ seed)[:, None]
    place = torch.arange(v.shape[1], device=v.device) * 0x9E3779B9
    drawn = _mix((v.view(torch.int32).long() & WORD) ^ ((block + place) & WORD))
    return (drawn >> 8).float() * 2.0**-24


def _mix(h: Tensor) -> Tensor:
    """Scramble 32 bits, held in int64: a product of two such wraps, which leaves its lower 32 bits right."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & WORD
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & WORD
    return h ^ (h >> 16)
