"""What the codec must give, block by block in float64 NumPy: written from the design, not from the code.

A check compares the fp32 scale that came with the float64 one, within a derived bound, and then demands every bit:
signs do not depend on the scale, and the residual is c - s·sign(c), one fp32 operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

SHARED_BLOCK = 1024  # elements per block of bits where all blocks of a tensor have one scale
UNIT = 2.0**-24  # half the distance of 1.0 to the next fp32 number: the relative error of one operation
SMALLEST = 2.0**-149  # the smallest positive fp32 number


class Block(NamedTuple):
    """Elements [start, stop) of a tensor; a block of padding has none."""

    tensor: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


PADDING = Block(-1, 0, 0)


@dataclass(frozen=True)
class Geometry:
    """Which elements fill the blocks of each chunk's payload."""

    block_size: int
    shared: bool  # all blocks of a tensor have one scale
    chunks: list[list[Block]]

    @property
    def blocks(self) -> list[Block]:
        return [block for chunk in self.chunks for block in chunk]

    @property
    def chunk_blocks(self) -> int:
        return len(self.chunks[0])

    @property
    def scales_start(self) -> int:
        return round_up(self.chunk_blocks * self.block_size // 8, 16)

    @property
    def payload_bytes(self) -> int:
        return self.scales_start + round_up(4 * self.chunk_blocks, 16)


def round_up(n: int, to: int) -> int:
    return math.ceil(n / to) * to


def geometry(numels: Sequence[int], block_size: int | None, chunks: int = 1) -> Geometry:
    """One bucket: each tensor starts a block; with a scale per tensor each tensor is dealt to the chunks by itself."""
    size = block_size or SHARED_BLOCK
    per_tensor = [
        [Block(t, start, min(start + size, numel)) for start in range(0, numel, size)] for t, numel in enumerate(numels)
    ]
    if block_size is None:
        parts = [
            [
                block
                for blocks in per_tensor
                for block in blocks[k * len(blocks) // chunks : (k + 1) * len(blocks) // chunks]
            ]
            for k in range(chunks)
        ]
    else:
        flat = [block for blocks in per_tensor for block in blocks]
        each = math.ceil(len(flat) / chunks)
        parts = [flat[k * each : (k + 1) * each] for k in range(chunks)]
    most = max(len(part) for part in parts)
    return Geometry(size, block_size is None, [part + [PADDING] * (most - len(part)) for part in parts])


def unpack(packed: Bytes) -> Bools:
    return np.unpackbits(packed, bitorder="little").astype(bool)


def pack(bits: Bools) -> Bytes:
    return np.packbits(bits, bitorder="little")


def parse(payloads: Bytes, shape: Geometry, chunks: int) -> tuple[Bools, Floats]:
    """Signs (blocks, block_size) and scales (blocks,) of `chunks` payloads that follow each other."""
    rows = payloads.reshape(chunks, shape.payload_bytes)
    n_bits, n_scales = shape.chunk_blocks * shape.block_size // 8, 4 * shape.chunk_blocks
    bits = unpack(rows[:, :n_bits].copy().reshape(-1)).reshape(-1, shape.block_size)
    return bits, rows[:, shape.scales_start : shape.scales_start + n_scales].copy().view(np.float32).reshape(-1)


def build(bits: Bools, scales: Floats, shape: Geometry, chunks: int) -> Bytes:
    """The inverse of `parse`; the bytes between the sections are 0."""
    rows = np.zeros((chunks, shape.payload_bytes), np.uint8)
    n_bits, n_scales = shape.chunk_blocks * shape.block_size // 8, 4 * shape.chunk_blocks
    rows[:, :n_bits] = pack(bits.reshape(-1)).reshape(chunks, n_bits)
    scale_bytes = scales.astype(np.float32).view(np.uint8).reshape(chunks, n_scales)
    rows[:, shape.scales_start : shape.scales_start + n_scales] = scale_bytes
    return rows


@dataclass(frozen=True)
class Expected:
    """c of every place of some blocks, (blocks, block_size), and the scale that must come of it, (blocks,)."""

    c: Floats
    old: Floats
    real: Bools
    live: Bools
    scales: npt.NDArray[np.float64]
    slack: npt.NDArray[np.float64]

    def check_payload(self, bits: Bools, scales: Floats) -> None:
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(bits, self.live & (self.c >= 0), "signs")
        np.testing.assert_array_equal(np.isnan(scales), np.isnan(self.scales), "scales that are NaN")
        error = np.abs(np.nan_to_num(scales.astype(np.float64)) - np.nan_to_num(self.scales))
        assert np.all(error <= self.slack), f"scales off by {error - self.slack} beyond the bound"

    def check_residual(self, residual: Floats, scales: Floats) -> None:
        """`residual`: (blocks, block_size), bit for bit."""
        with np.errstate(all="ignore"):
            step = np.where(self.c >= 0, scales[:, None], -scales[:, None])
            new = np.where(self.live, self.c - step, np.float32(0))
        untouched = ~self.real | np.isnan(self.scales)[:, None]
        expected = np.where(untouched, self.old.view(np.uint32), new.view(np.uint32))
        np.testing.assert_array_equal(residual.view(np.uint32), expected, "residual")


def encode(
    tensors: Sequence[Floats], residual: Floats | None, mask: Bools | None, shape: Geometry, scale: str
) -> Expected:
    """`residual` and `mask`: (blocks, block_size), padding included."""
    return _expect(_scatter(tensors, shape.blocks, shape.block_size), residual, mask, shape, shape.blocks, scale)


def reduce_encode(
    payloads: Sequence[Bytes], residual: Floats | None, mask: Bools | None, shape: Geometry, chunk: int, scale: str
) -> Expected:
    """`residual` and `mask` are those of the chunk; the mean is the sum, rank after rank, of ± (scale / ranks)."""
    mean: Floats | None = None
    for payload in payloads:
        bits, scales = parse(payload, shape, 1)
        share = scales / np.float32(len(payloads))
        part = np.where(bits, share[:, None], -share[:, None])
        with np.errstate(all="ignore"):
            mean = part if mean is None else mean + part
    assert mean is not None
    return _expect(mean, residual, mask, shape, shape.chunks[chunk], scale)


def decode(payloads: Bytes, mask: Bools | None, shape: Geometry, numels: Sequence[int]) -> list[Floats]:
    """fp32 values of every tensor, before they are rounded to its dtype."""
    bits, scales = parse(payloads, shape, len(shape.chunks))
    tensors = [np.full(n, np.nan, np.float32) for n in numels]
    for b, block in enumerate(shape.blocks):
        for i in range(block.numel):
            dead = mask is not None and mask[b, i]
            tensors[block.tensor][block.start + i] = 0.0 if dead else scales[b] if bits[b, i] else -scales[b]
    return tensors


def _scatter(tensors: Sequence[Floats], blocks: Sequence[Block], block_size: int) -> Floats:
    values = np.zeros((len(blocks), block_size), np.float32)
    for row, block in zip(values, blocks, strict=True):
        if block.numel:
            row[: block.numel] = tensors[block.tensor][block.start : block.stop]
    return values


def _expect(
    values: Floats, residual: Floats | None, mask: Bools | None, shape: Geometry, blocks: Sequence[Block], scale: str
) -> Expected:
    real = np.zeros(values.shape, bool)
    for row, block in zip(real, blocks, strict=True):
        row[: block.numel] = True
    live = real if mask is None else real & ~mask
    old = np.zeros_like(values) if residual is None else residual
    with np.errstate(all="ignore"):
        c = values if residual is None else values + residual
    scales, slack = np.zeros(len(blocks)), np.zeros(len(blocks))
    for group in _groups(blocks, shape):
        members = c[group][live[group]].astype(np.float64)
        scales[group] = _scale(members, scale)
        slack[group] = _slack(scales[group][0], scale, shape.block_size, len(group))
    return Expected(c, old, real, live, scales, slack)


def _groups(blocks: Sequence[Block], shape: Geometry) -> list[list[int]]:
    """Blocks that share a scale: each its own, or all of a tensor that are here."""
    if not shape.shared:
        return [[b] for b in range(len(blocks))]
    tensors = {block.tensor for block in blocks if block.numel}
    return [[b for b, block in enumerate(blocks) if block.tensor == tensor] for tensor in tensors]


def _scale(values: npt.NDArray[np.float64], scale: str) -> float:
    if not values.size:
        return 0.0
    if not np.isfinite(values).all():
        return math.nan
    if scale == "mean":
        return math.fsum(np.abs(values)) / values.size
    return math.sqrt(math.fsum(values * values) / values.size)


def _slack(scale: float, kind: str, block_size: int, blocks: int) -> float:
    """How far an fp32 scale may be from the exact one.

    A sum adds rows of 128 values one after the other and then 128 partial sums in 7 levels, so no value passes more
    than rows + 7 roundings; block sums are added the same way where a tensor has one scale. All terms are positive, so
    each rounding is a relative error of UNIT of the whole at most. The mean adds a division. The root mean square adds
    a product before, and takes a root, which halves what came so far and rounds once more.

    fp32 sums of small numbers are exact, but a quotient may land among the denormal numbers (off by SMALLEST / 2), and
    so may products: the mean square is then off by SMALLEST at most, its root by the root of that. The second sum of
    values whose plain sum overflows scales by a power of two, which is exact for all that is not negligible.
    """
    roundings = math.ceil(block_size / 128) + 7 + (math.ceil(blocks / 128) + 7 if blocks > 1 else 0) + 1
    if kind == "mean":
        absolute = SMALLEST / 2
    else:
        roundings = (roundings + 1) / 2 + 1
        absolute = math.sqrt(SMALLEST)
    return 0.0 if math.isnan(scale) else scale * roundings * UNIT / (1 - roundings * UNIT) + absolute
