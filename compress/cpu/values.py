"""The values of a tensor in its dtype and as fp32: a word of 32 in registers, or a scratch block written back."""

from __future__ import annotations

from typing import Any

import numpy as np

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import BF16, F32, WORD, inline, live_lanes, to_16_bits

_ZERO = np.float32(0.0)
_AHEAD = 2048  # bytes; the hardware's own prefetching stops at each page's end, seven streams have many of them


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


@inline
def store_values(x: int, c: int, dtype: int, n: int, mask: int, stream: bool) -> None:
    """The n values at `x` <- c, 0 where masked, as `stream_word` does; `load_values` of a block is the inverse."""
    size, full = word_bytes(dtype), n >> 5
    for word in range(full):
        value = simd.load_f32(c + word * WORD)
        if mask != 0:
            value = simd.select(live_lanes(n, word, mask), value, simd.splat(_ZERO))
        stream_word(x + size * word, dtype, value, stream)
    if n & 31:
        live = live_lanes(n, full, mask)
        for i in range(32 * full, n):
            one = simd.get_f32(c + 4 * i) if (live >> (i & 31)) & 1 else _ZERO
            if dtype == F32:
                simd.put_f32(x + 4 * i, one)
            else:
                simd.put_u16(x + 2 * i, to_16_bits(one, dtype))
