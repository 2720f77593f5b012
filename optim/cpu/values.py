"""The values of a tensor in its dtype and as fp32: a word of 32 in registers, or a scratch block written back."""

from __future__ import annotations

from typing import Any

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import BF16, F32, WORD, inline, to_16_bits

_AHEAD = 2048  # bytes; the hardware's own prefetching stops at each page's end, seven streams have many of them


@inline
def store_values(x: int, c: int, dtype: int, n: int) -> None:
    """The n values at `x` <- c, rounded to nearest, ties to even; the codec's `load_values` is the inverse."""
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


@inline
def word_bytes(dtype: int) -> int:
    """Bytes of a word."""
    return 128 if dtype == F32 else 64


@inline
def prefetch_word(address: int, dtype: int) -> None:
    """Ask for the word that will be needed some words later; an address that nothing lies at is no error."""
    simd.prefetch(address + _AHEAD)
    if dtype == F32:
        simd.prefetch(address + _AHEAD + 64)


@inline
def factor(address: int) -> Any:
    """The fp32 number at an address, in every lane."""
    return simd.splat(simd.get_f32(address))


@inline
def load_word(address: int, dtype: int) -> Any:
    """The 32 values at an address."""
    if dtype == F32:
        return simd.load_f32(address)
    if dtype == BF16:
        return simd.load_bf16(address)
    return simd.load_f16(address)


@inline
def store_word(address: int, dtype: int, value: Any) -> None:
    """The 32 values at an address <- value, rounded to nearest, ties to even."""
    if dtype == F32:
        simd.store_f32(address, value)
    elif dtype == BF16:
        simd.store_u16(address, simd.to_bf16_lanes(value))
    else:
        simd.store_u16(address, simd.to_f16_lanes(value))


@inline
def stream_word(address: int, dtype: int, value: Any, stream: bool) -> None:
    """As `store_word`; with `stream` past the cache where the address allows it, and then a fence must follow."""
    if not stream or address & 63 != 0:
        store_word(address, dtype, value)
    elif dtype == F32:
        simd.stream_f32(address, value)
    elif dtype == BF16:
        simd.stream_u16(address, simd.to_bf16_lanes(value))
    else:
        simd.stream_u16(address, simd.to_f16_lanes(value))
