"""What is done with one block: load, add the residual, find the scale, pack, update; everything stays in the L1 cache.

Arguments: `c` is the address of a scratch block of fp32; `n` the number of real elements; `words` the block size / 32;
`mask` the address of the block's mask bits, or 0; `r` the address of its residual, or 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from onebit.compress.cpu import simd
from onebit.compress.reference import LARGEST, RESCUE

F32, BF16, F16 = 0, 1, 2  # dtype codes of the kernels
WORD = 128  # bytes of 32 fp32 values

_ALL = np.uint32(0xFFFFFFFF)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_NAN = np.float32(np.nan)
_LARGEST = np.float32(LARGEST)
_RESCUE = np.float32(RESCUE)
_UNDO_RESCUE = np.float32(1 / RESCUE)

# Float arithmetic is IEEE in the order written: no fastmath, or the bytes would differ between implementations.
inline = njit(error_model="numpy", nogil=True)


@inline
def real_lanes(n: int) -> Any:
    """The lowest min(n, 32) bits, for any n."""
    if n >= 32:
        return _ALL
    if n <= 0:
        return np.uint32(0)
    return np.uint32((1 << n) - 1)


@inline
def live_lanes(n: int, word: int, mask: int) -> Any:
    """The lanes of a word that take part: real and not masked."""
    lanes = real_lanes(n - 32 * word)
    if mask != 0:
        lanes = np.uint32(lanes & ~simd.get_word(mask + 4 * word))
    return lanes


@inline
def count_live(n: int, words: int, mask: int) -> int:
    """Number of elements that take part."""
    if mask == 0:
        return n
    count = 0
    for word in range(words):
        count += simd.count_ones(live_lanes(n, word, mask))
    return count


@inline
def load_values(c: int, x: int, dtype: int, n: int, words: int) -> None:
    """c <- the n values at `x`, then zeros."""
    full = n >> 5
    if dtype == F32:
        for word in range(full):
            simd.store_f32(c + word * WORD, simd.load_f32(x + word * 128))
    elif dtype == BF16:
        for word in range(full):
            simd.store_f32(c + word * WORD, simd.load_bf16(x + word * 64))
    else:
        for word in range(full):
            simd.store_f32(c + word * WORD, simd.load_f16(x + word * 64))
    for word in range(full, words):
        simd.store_f32(c + word * WORD, simd.splat(_ZERO))
    for i in range(32 * full, n):
        if dtype == F32:
            simd.put_f32(c + 4 * i, simd.get_f32(x + 4 * i))
        elif dtype == BF16:
            simd.put_f32(c + 4 * i, simd.get_bf16(x + 2 * i))
        else:
            simd.put_f32(c + 4 * i, simd.get_f16(x + 2 * i))


@inline
def load_mean(c: int, payloads: int, stride: int, shares: int, ranks: int, words: int) -> None:
    """c <- the sum over ranks of ± shares[rank], signs from the words at payloads + rank · stride."""
    for word in range(words):
        share = simd.splat(simd.get_f32(shares))
        total = simd.select(simd.get_word(payloads + 4 * word), share, simd.splat(-simd.get_f32(shares)))
        for rank in range(1, ranks):
            s = simd.get_f32(shares + 4 * rank)
            bits = simd.get_word(payloads + rank * stride + 4 * word)
            total = simd.add(total, simd.select(bits, simd.splat(s), simd.splat(-s)))
        simd.store_f32(c + word * WORD, total)


@inline
def add_residual(c: int, r: int, n: int, words: int, mask: int) -> None:
    """c <- c + r on the elements that take part, 0 elsewhere."""
    full = n >> 5
    if r != 0:
        for word in range(full):
            total = simd.add(simd.load_f32(c + word * WORD), simd.load_f32(r + word * WORD))
            simd.store_f32(c + word * WORD, total)
        for i in range(32 * full, n):
            simd.put_f32(c + 4 * i, simd.get_f32(c + 4 * i) + simd.get_f32(r + 4 * i))
    if mask != 0 or n < 32 * words:
        zero = simd.splat(_ZERO)
        for word in range(words):
            live = simd.select(live_lanes(n, word, mask), simd.load_f32(c + word * WORD), zero)
            simd.store_f32(c + word * WORD, live)


@inline
def block_sum(c: int, words: int, squared: bool, factor: float) -> Any:
    """Sum of |factor · c|, or of its square, in the order of `reference.ordered_sum`."""
    by = simd.splat(factor)
    s0 = s1 = s2 = s3 = simd.splat(_ZERO)
    for word in range(0, words & ~3, 4):
        a = c + word * WORD
        v0, v1 = simd.multiply(simd.load_f32(a), by), simd.multiply(simd.load_f32(a + WORD), by)
        v2, v3 = simd.multiply(simd.load_f32(a + 2 * WORD), by), simd.multiply(simd.load_f32(a + 3 * WORD), by)
        if squared:
            s0, s1 = simd.add(s0, simd.multiply(v0, v0)), simd.add(s1, simd.multiply(v1, v1))
            s2, s3 = simd.add(s2, simd.multiply(v2, v2)), simd.add(s3, simd.multiply(v3, v3))
        else:
            s0, s1 = simd.add(s0, simd.absolute(v0)), simd.add(s1, simd.absolute(v1))
            s2, s3 = simd.add(s2, simd.absolute(v2)), simd.add(s3, simd.absolute(v3))
    for word in range(words & ~3, words):  # the last row is not full
        v = simd.multiply(simd.load_f32(c + word * WORD), by)
        term = simd.multiply(v, v) if squared else simd.absolute(v)
        if word & 3 == 0:
            s0 = simd.add(s0, term)
        elif word & 3 == 1:
            s1 = simd.add(s1, term)
        else:
            s2 = simd.add(s2, term)
    return simd.fold(s0, s1, s2, s3)


@inline
def block_scale(c: int, words: int, count: int, squared: bool) -> Any:
    """The scale of a block as `reference.scales_from_sums` defines it."""
    if count == 0:
        return _ZERO
    total = block_sum(c, words, squared, _ONE)
    if np.isfinite(total):
        mean = total / np.float32(count)
        return np.sqrt(mean) if squared else mean
    total = block_sum(c, words, squared, _RESCUE)
    if not np.isfinite(total):
        return _NAN
    mean = total / np.float32(count)
    return min((np.sqrt(mean) if squared else mean) * _UNDO_RESCUE, _LARGEST)


@inline
def quantize(c: int, r: int, bits: int, scale: float, n: int, words: int, mask: int) -> None:
    """Write the signs of c to `bits` and c - scale · sign(c) to r; r stays as it is when the scale is NaN."""
    up, down = simd.splat(scale), simd.splat(-scale)
    keep = r == 0 or np.isnan(scale)
    if mask == 0 and n == 32 * words:
        for word in range(words):
            v = simd.load_f32(c + word * WORD)
            positive = simd.signs(v)
            simd.put_word(bits + 4 * word, positive)
            if not keep:
                simd.store_f32(r + word * WORD, simd.subtract(v, simd.select(positive, up, down)))
        return
    zero = simd.splat(_ZERO)
    for word in range(words):
        live = live_lanes(n, word, mask)
        v = simd.load_f32(c + word * WORD)
        positive = np.uint32(simd.signs(v) & live)
        simd.put_word(bits + 4 * word, positive)
        if not keep:
            rest = simd.select(live, simd.subtract(v, simd.select(positive, up, down)), zero)
            if n - 32 * word >= 32:
                simd.store_f32(r + word * WORD, rest)
            else:  # the residual may end with the last real element
                simd.store_f32(c + word * WORD, rest)
                for i in range(32 * word, n):
                    simd.put_f32(r + 4 * i, simd.get_f32(c + 4 * i))


@inline
def to_bf16(value: float) -> Any:
    """The bits of an fp32 value in bf16, to nearest, ties to even; NaN stays NaN."""
    word = simd.bits_of(value)
    if np.isnan(value):
        return np.uint16((word >> 16) | 0x0040)
    return np.uint16((word + 0x7FFF + ((word >> 16) & 1)) >> 16)


@inline
def to_16_bits(value: float, dtype: int) -> Any:
    """The bits of an fp32 value in bf16 or fp16."""
    return to_bf16(value) if dtype == BF16 else simd.to_f16(value)


@inline
def write_f32(x: int, bits: int, scale: float, n: int, mask: int, stream: bool) -> None:
    """x <- ± scale, 0 where masked, n fp32 elements."""
    up, down, zero = simd.splat(scale), simd.splat(-scale), simd.splat(_ZERO)
    full = n >> 5
    stream = stream and x & 63 == 0
    for word in range(full):
        v = simd.select(simd.get_word(bits + 4 * word), up, down)
        if mask != 0:
            v = simd.select(live_lanes(n, word, mask), v, zero)
        if stream:
            simd.stream_f32(x + word * 128, v)
        else:
            simd.store_f32(x + word * 128, v)
    if n & 31:
        positive, live = simd.get_word(bits + 4 * full), live_lanes(n, full, mask)
        for i in range(n & 31):
            v = scale if (positive >> i) & 1 else -scale
            simd.put_f32(x + 4 * (32 * full + i), v if (live >> i) & 1 else _ZERO)


@inline
def write_16(x: int, bits: int, scale: float, dtype: int, n: int, mask: int, stream: bool) -> None:
    """x <- ± scale, 0 where masked, n bf16 or fp16 elements."""
    plus, minus = to_16_bits(scale, dtype), to_16_bits(-scale, dtype)
    up, down, zero = simd.splat_u16(plus), simd.splat_u16(minus), simd.splat_u16(np.uint16(0))
    full = n >> 5
    stream = stream and x & 63 == 0
    for word in range(full):
        v = simd.select_u16(simd.get_word(bits + 4 * word), up, down)
        if mask != 0:
            v = simd.select_u16(live_lanes(n, word, mask), v, zero)
        if stream:
            simd.stream_u16(x + word * 64, v)
        else:
            simd.store_u16(x + word * 64, v)
    if n & 31:
        positive, live = simd.get_word(bits + 4 * full), live_lanes(n, full, mask)
        for i in range(n & 31):
            v = plus if (positive >> i) & 1 else minus
            simd.put_u16(x + 2 * (32 * full + i), v if (live >> i) & 1 else np.uint16(0))
