"""What is done with one block of a quantizing codec: find the scale, write codes, and keep what they do not say.

Arguments as in `block.py` and `quantized_codes.py`: `c` is the address of a scratch block of fp32, `w` of another; `n`
the number of real elements; `mask` the address of the block's mask bits, or 0; `r` that of its residual, or 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onebit.compress.cpu import integers, simd
from onebit.compress.cpu.block import WORD, inline, live_lanes
from onebit.compress.cpu.quantized_codes import (
    FP8,
    largest_code,
    load_codes,
    quantize_fp8,
    quantize_nearest,
    quantize_stochastic,
)
from onebit.compress.cpu.rotation import root_of, rotate

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_NAN = np.float32(np.nan)
_ABSOLUTE = np.uint32(0x7FFFFFFF)
_LEAST = np.uint32((127 - 100) << 23)  # the bits of 2⁻¹⁰⁰; a block of smaller numbers says 0
# The bits of `Quantizer.bound`, without a rotation and with one.
_BOUND = np.uint32((127 + 127) << 23)
_BOUND_ROTATED = np.uint32((127 + 115) << 23)


@inline
def largest_bits(v: int, words: int) -> Any:
    """The bits of the largest |v|; those of something that is not finite are larger than all others."""
    absolute = integers.splat(_ABSOLUTE)
    top = integers.bit_and(integers.bits_of(simd.load_f32(v)), absolute)
    for word in range(1, words):
        top = integers.larger(top, integers.bit_and(integers.bits_of(simd.load_f32(v + word * WORD)), absolute))
    return integers.largest(top)


@inline
def fill(c: int, words: int, value: float) -> None:
    """c <- the value in every place."""
    for word in range(words):
        simd.store_f32(c + word * WORD, simd.splat(value))


@inline
def load_block(c: int, form: int, codes: int, scale: float, words: int, rotated: int) -> None:
    """c <- what one payload says of a block."""
    if np.isnan(scale):
        fill(c, words, scale)
        return
    step = simd.splat(_ONE if rotated != 0 else scale)
    for word in range(words):
        simd.store_f32(c + word * WORD, simd.multiply(load_codes(form, codes, word), step))
    if rotated != 0:
        rotate(c, c, words, scale * root_of(words))


@inline
def load_mean(c: int, form: int, codes: int, stride: int, shares: int, ranks: int, words: int, rotated: int) -> None:
    """c <- the sum over ranks of code · shares[rank], of codes at `codes` + rank · stride."""
    for word in range(words):
        total = simd.multiply(load_codes(form, codes, word), simd.splat(simd.get_f32(shares)))
        for rank in range(1, ranks):
            share = simd.splat(simd.get_f32(shares + 4 * rank))
            total = simd.add(total, simd.multiply(load_codes(form, codes + rank * stride, word), share))
        simd.store_f32(c + word * WORD, total)
    if rotated != 0:
        rotate(c, c, words, root_of(words))


@inline
def finish_block(
    c: int,
    w: int,
    r: int,
    codes: int,
    scale: int,
    n: int,
    words: int,
    block_bytes: int,
    mask: int,
    form: int,
    stochastic: int,
    rotated: int,
    seed: int,
) -> None:
    """What encode and reduce_encode have in common once c is there: the scale at address `scale`, codes, residual."""
    v = c
    if rotated != 0:
        rotate(w, c, words, root_of(words))
        v = w
    top = largest_bits(v, words)
    broken = top >= (_BOUND_ROTATED if rotated != 0 else _BOUND)
    if broken or top < _LEAST:
        simd.put_f32(scale, _NAN if broken else _ZERO)
        for byte in range(0, block_bytes, 4):
            simd.put_word(codes + byte, np.uint32(0))
        if r != 0 and not broken:
            fill(w, words, _ZERO)
            keep_rest(r, c, w, n, words, mask)
        return
    amax, most = simd.float_of(top), largest_code(form)
    step, inverse = amax / most, most / amax
    simd.put_f32(scale, step)
    unit = _ONE if rotated != 0 else step
    if form == FP8:
        quantize_fp8(codes, v, w, words, unit, inverse)
    elif stochastic != 0:
        quantize_stochastic(form, codes, v, w, words, unit, inverse, np.uint32(top ^ np.uint32(seed)))
    else:
        quantize_nearest(form, codes, v, w, words, unit, inverse)
    if r != 0:
        if rotated != 0:
            rotate(w, w, words, step * root_of(words))
        keep_rest(r, c, w, n, words, mask)


@inline
def keep_rest(r: int, c: int, w: int, n: int, words: int, mask: int) -> None:
    """r <- c - w on the elements that take part, 0 where masked."""
    zero = simd.splat(_ZERO)
    for word in range((n + 31) >> 5):
        rest = simd.subtract(simd.load_f32(c + word * WORD), simd.load_f32(w + word * WORD))
        if mask != 0:
            rest = simd.select(live_lanes(n, word, mask), rest, zero)
        if n - 32 * word >= 32:
            simd.store_f32(r + word * WORD, rest)
        else:  # the residual may end with the last real element
            simd.store_f32(w + word * WORD, rest)
            for byte in range(4 * (n - 32 * word)):
                simd.copy_byte(r + word * WORD + byte, w + word * WORD + byte)
