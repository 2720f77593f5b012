"""Writes a scratch block of fp32 back to a tensor in the tensor's dtype; the codec's `load_values` is its inverse."""

from __future__ import annotations

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import BF16, F32, WORD, inline, to_16_bits


@inline
def store_values(x: int, c: int, dtype: int, n: int) -> None:
    """The n values at `x` <- c, rounded to nearest, ties to even."""
    full = n >> 5
    if dtype == F32:
        for word in range(full):
            simd.store_f32(x + word * 128, simd.load_f32(c + word * WORD))
    elif dtype == BF16:
        for word in range(full):
            simd.store_u16(x + word * 64, simd.to_bf16_lanes(simd.load_f32(c + word * WORD)))
    else:
        for word in range(full):
            simd.store_u16(x + word * 64, simd.to_f16_lanes(simd.load_f32(c + word * WORD)))
    for i in range(32 * full, n):
        value = simd.get_f32(c + 4 * i)
        if dtype == F32:
            simd.put_f32(x + 4 * i, value)
        else:
            simd.put_u16(x + 2 * i, to_16_bits(value, dtype))
