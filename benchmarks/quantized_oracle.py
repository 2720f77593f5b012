"""What the quantizing codecs must give, bit for bit, in NumPy: written from their specification, not from their code.

Codes of integers are integers, so a quantized value is never -0.0; codes of e4m3 keep the sign of what they round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.compress import Layout

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

F = np.float32
LARGEST = {"int8": 127, "int4": 7, "fp8": 448}
BITS = {"int8": 8, "int4": 4, "fp8": 8}
TINY = F(2.0**-100)  # a block whose largest value is below says nothing
LIMIT, LIMIT_ROTATED = F(2.0**127), F(2.0**115)  # what is as large might decode to what is not finite


@dataclass(frozen=True)
class Spec:
    """The options of a codec that decide its bytes."""

    format: Literal["int8", "int4", "fp8"]
    block_size: int
    stochastic: bool = False
    rotate: bool = False
    seed: int = 0

    @property
    def largest(self) -> np.float32:
        """What the largest magnitude of a block becomes."""
        return F(LARGEST[self.format])


class Encoded(NamedTuple):
    """Of k blocks: codes (k, bytes of a block), fp32 scales (k,), and the residual (k, block_size) afterwards."""

    codes: Bytes
    scales: Floats
    residual: Floats


def encode(x: Floats, residual: Floats | None, live: Bools, real: Bools, spec: Spec) -> Encoded:
    """Encode blocks.

    Args:
        x: (k, block_size); what is not live may be anything.
        residual: (k, block_size), left as it is; None: zero, and none comes back that means anything.
        live: elements that are neither padding nor masked.
        real: elements that are not padding.
    """
    with np.errstate(all="ignore"):
        c = np.where(live, x if residual is None else x + residual, F(0)).astype(F)
        v = transformed(c) if spec.rotate else c
        bits = (v.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(1)
        largest = bits.view(F)
        broken, silent = ~(largest < (LIMIT_ROTATED if spec.rotate else LIMIT)), largest < TINY
        scales = np.where(broken, F(np.nan), np.where(silent, F(0), largest / spec.largest)).astype(F)
        scales[broken] = np.array([0x7FC00000], np.uint32).view(F)
        inverse = np.where(broken | silent, F(0), spec.largest / largest).astype(F)
        y = np.where((broken | silent)[:, None], F(0), v * inverse[:, None]).astype(F)
        q = quantized(y, v, largest, spec)
        said = decode(packed(q, y, spec), scales, spec)
        old = np.zeros_like(c) if residual is None else residual
        kept = broken[:, None] | ~real
        return Encoded(packed(q, y, spec), scales, np.where(kept, old, np.where(live, c - said, F(0))).astype(F))


def decode(codes: Bytes, scales: Floats, spec: Spec) -> Floats:
    """(k, block_size): what blocks say, padding and masked elements included."""
    with np.errstate(all="ignore"):
        if not spec.rotate:
            return values(codes, spec) * scales[:, None]
        return doubled(values(codes, spec)) * (scales * root(spec.block_size))[:, None]


def mean(codes: Bytes, scales: Floats, spec: Spec) -> Floats:
    """(k, block_size): the mean of what `codes` (ranks, k, bytes) with `scales` (ranks, k) say."""
    ranks = F(len(codes))
    with np.errstate(all="ignore"):
        total = values(codes[0], spec) * (scales[0] / ranks)[:, None]
        for rank in range(1, len(codes)):
            total = total + values(codes[rank], spec) * (scales[rank] / ranks)[:, None]
        return transformed(total) if spec.rotate else total


def transformed(v: Floats) -> Floats:
    """The Walsh-Hadamard transform of each row, orthonormal."""
    return doubled(v) * root(v.shape[1])


def root(size: int) -> np.float32:
    """1/√size."""
    return F(1 / np.sqrt(size))


def doubled(v: Floats) -> Floats:
    """The transform of each row, stride by stride, before it is scaled."""
    k, size = v.shape
    h = 1
    while h < size:
        pairs = v.reshape(k, size // (2 * h), 2, h)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        v = np.stack([a + b, a - b], axis=2).reshape(k, size)
        h *= 2
    return v


def quantized(y: Floats, v: Floats, largest: Floats, spec: Spec) -> Floats:
    """The values that codes stand for; -0.0 as 0.0."""
    if spec.format == "fp8":
        return e4m3(y)
    if spec.stochastic:
        whole = np.floor(y)
        q = whole + (dither(v, largest, spec.seed) < y - whole)
    else:
        q = np.rint(y)
    clipped: Floats = (np.clip(q, -spec.largest, spec.largest) + F(0)).astype(F)
    return clipped


def dither(v: Floats, largest: Floats, seed: int) -> Floats:
    """Numbers of [0, 1), drawn from what is rounded and from where it stands."""
    block = mix(largest.view(np.uint32) ^ np.uint32(seed & 0xFFFFFFFF))[:, None]
    place = np.arange(v.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B9)
    drawn: Floats = (mix(v.view(np.uint32) ^ (block + place)) >> np.uint32(8)).astype(F) * F(2.0**-24)
    return drawn


def mix(h: Words) -> Words:
    """Scramble 32 bits."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def e4m3(y: Floats) -> Floats:
    """The nearest e4m3 number, ties to an even significand; ±448 at most."""
    y64 = np.clip(y.astype(np.float64), -448, 448)
    _, exponent = np.frexp(np.abs(y64))
    step = np.exp2(np.maximum(exponent - 1, -6) - 3)  # the distance between neighbours: 3 bits after the first
    rounded: Floats = (np.rint(y64 / step) * step).astype(F)
    return rounded


def packed(q: Floats, y: Floats, spec: Spec) -> Bytes:
    """(k, bytes): values as codes; `y` has the sign of a zero of e4m3."""
    if spec.format == "int8":
        return q.astype(np.int8).view(np.uint8)
    if spec.format == "int4":
        nibbles = q.astype(np.int8).view(np.uint8) & 15
        pairs: Bytes = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).astype(np.uint8)
        return pairs
    codes: Bytes = (np.where(np.signbit(y), 0x80, 0) | np.searchsorted(E4M3, np.abs(q))).astype(np.uint8)
    return codes


def values(codes: Bytes, spec: Spec) -> Floats:
    """(k, block_size): codes as values."""
    if spec.format == "int8":
        return codes.view(np.int8).astype(F)
    if spec.format == "int4":
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), 2 * codes.shape[1]).astype(np.int8)
        return np.where(nibbles > 7, nibbles - 16, nibbles).astype(F)
    magnitudes = E4M3[codes & 127]
    signed: Floats = np.where(codes & 128, -magnitudes, magnitudes)
    return signed


def _e4m3_magnitudes() -> Floats:
    """The value of every code without a sign but the last, which is NaN."""
    code = np.arange(127)
    exponent, significand = code >> 3, code & 7
    normal = (8 + significand) * np.exp2(exponent.astype(np.float64) - 10)
    magnitudes: Floats = np.where(exponent == 0, significand * 2.0**-9, normal).astype(F)
    return magnitudes


E4M3 = _e4m3_magnitudes()


def payloads(encoded: Encoded, layout: Layout) -> Bytes:
    """(payloads, bytes): blocks dealt to payloads ``[codes | fp32 scales]``, both sections filled up to 16 bytes."""
    chunk_blocks = layout.chunk_blocks
    count = len(encoded.scales) // chunk_blocks
    codes = encoded.codes.reshape(count, -1)
    scales = encoded.scales.reshape(count, -1).view(np.uint8)
    return np.concatenate([_filled(codes), _filled(scales)], axis=1)


def taken_apart(rows: Bytes, layout: Layout, spec: Spec) -> tuple[Bytes, Floats]:
    """Codes (payloads, chunk_blocks, bytes of a block) and scales (payloads, chunk_blocks) of payloads."""
    block_bytes = spec.block_size * BITS[spec.format] // 8
    end = layout.chunk_blocks * block_bytes
    start = -(-end // 16) * 16
    codes = rows[:, :end].reshape(len(rows), layout.chunk_blocks, block_bytes)
    scales = np.ascontiguousarray(rows[:, start : start + 4 * layout.chunk_blocks]).view(F)
    return codes, scales


def _filled(section: Bytes) -> Bytes:
    return np.pad(section, ((0, 0), (0, -section.shape[1] % 16)))
