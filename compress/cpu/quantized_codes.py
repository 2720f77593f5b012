"""From 32 numbers to 32 codes of a quantizing codec, and back.

Arguments: `form` is one of the formats below; `codes` the address of a block's codes; `v` and `w` those of blocks of
fp32, which may be one; `words` the block size / 32; `scale` what a code's unit is worth, and `inverse` one over that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onebit.compress.cpu import integers, simd
from onebit.compress.cpu.block import WORD, inline

INT8, INT4, FP8 = 0, 1, 2

_ROUNDER = np.float32(1.5 * 2**23)  # added to |y| < 2²², it leaves y rounded to an integer, in the sum's low bits
_ULP = np.float32(2.0**-24)
_GOLDEN = np.uint32(0x9E3779B9)
# fp8 e4m3: 3 bits of mantissa, exponents from 2⁻⁶; a power of two that is 2²⁰ times a number's own rounds it to these.
_EXPONENT, _LEAST_EXPONENT = np.uint32(0x7F800000), np.uint32((127 - 6) << 23)
_TO_ROUNDER, _LEAST_ROUNDER = np.uint32(20 << 23), np.uint32((127 - 6 + 20) << 23)
_SUBNORMAL = np.float32(2.0**-6)


@inline
def largest_code(form: int) -> Any:
    """What the largest element of a block becomes before it is rounded."""
    if form == INT8:
        return np.float32(127.0)
    if form == INT4:
        return np.float32(7.0)
    return np.float32(448.0)


@inline
def mix(h: Any) -> Any:
    """A hash of every lane; the constants are those of C. Wellons' lowbias32."""
    h = integers.bit_xor(h, integers.shift_right(h, np.uint32(16)))
    h = integers.multiply(h, integers.splat(np.uint32(0x7FEB352D)))
    h = integers.bit_xor(h, integers.shift_right(h, np.uint32(15)))
    h = integers.multiply(h, integers.splat(np.uint32(0x846CA68B)))
    return integers.bit_xor(h, integers.shift_right(h, np.uint32(16)))


@inline
def draw(x: Any, place: Any) -> Any:
    """Numbers of [0, 1), drawn from the bits of x and from where it stands: 24 bits each."""
    drawn = integers.shift_right(mix(integers.bit_xor(integers.bits_of(x), place)), np.uint32(8))
    return simd.multiply(integers.to_floats(drawn), simd.splat(_ULP))


@inline
def put_integers(form: int, codes: int, w: int, word: int, q: Any, step: Any) -> None:
    """Write integers q to their codes, and q · step to w."""
    shifted = simd.add(q, simd.splat(_ROUNDER))
    if form == INT4:
        integers.store_4(codes + 16 * word, integers.bits_of(shifted))
    else:
        integers.store_8(codes + 32 * word, integers.bits_of(shifted))
    whole = simd.subtract(shifted, simd.splat(_ROUNDER))
    simd.store_f32(w + word * WORD, simd.multiply(whole, step))


@inline
def quantize_nearest(form: int, codes: int, v: int, w: int, words: int, scale: float, inverse: float) -> None:
    """Write v · inverse, rounded to the nearest integer, to `codes`, and what it decodes to to w, which may be v.

    Nothing is clamped: the largest |y| is the largest code to within two roundings, which this one undoes.
    """
    by, step = simd.splat(inverse), simd.splat(scale)
    for word in range(words):
        put_integers(form, codes, w, word, simd.multiply(simd.load_f32(v + word * WORD), by), step)


@inline
def quantize_stochastic(
    form: int, codes: int, v: int, w: int, words: int, scale: float, inverse: float, key: int
) -> None:
    """As `quantize_nearest`, but up with the probability of what is above the integer below; `key` seeds the draws."""
    by, step = simd.splat(inverse), simd.splat(scale)
    one, top = simd.splat(np.float32(1.0)), largest_code(form)
    golden = integers.splat(_GOLDEN)
    place = integers.add(mix(integers.splat(np.uint32(key))), integers.multiply(integers.lane_numbers(), golden))
    for word in range(words):
        x = simd.load_f32(v + word * WORD)
        y = simd.multiply(x, by)
        below = simd.floor(y)
        up = simd.less(draw(x, place), simd.subtract(y, below))
        q = simd.select(up, simd.add(below, one), below)
        put_integers(form, codes, w, word, simd.clamp(q, -top, top), step)
        place = integers.add(place, integers.shift_left(golden, np.uint32(5)))


@inline
def quantize_fp8(codes: int, v: int, w: int, words: int, scale: float, inverse: float) -> None:
    """As `quantize_nearest`, to the nearest e4m3 number, ties to the even mantissa."""
    by, step = simd.splat(inverse), simd.splat(scale)
    exponent, least = integers.splat(_EXPONENT), integers.splat(_LEAST_EXPONENT)
    sign = integers.splat(np.uint32(0x80000000))
    for word in range(words):
        y = simd.multiply(simd.load_f32(v + word * WORD), by)
        minus = integers.bit_and(integers.bits_of(y), sign)
        power = integers.larger(integers.bit_and(integers.bits_of(y), exponent), least)
        rounder = integers.add(power, integers.splat(_TO_ROUNDER))
        shifted = simd.add(simd.absolute(y), integers.as_floats(rounder))
        binade = integers.shift_right(integers.subtract(rounder, integers.splat(_LEAST_ROUNDER)), np.uint32(20))
        code = integers.add(binade, integers.subtract(integers.bits_of(shifted), rounder))
        integers.store_8(codes + 32 * word, integers.bit_or(code, integers.shift_right(minus, np.uint32(24))))
        size = integers.bits_of(simd.subtract(shifted, integers.as_floats(rounder)))
        simd.store_f32(w + word * WORD, simd.multiply(integers.as_floats(integers.bit_or(size, minus)), step))


@inline
def load_codes(form: int, codes: int, word: int) -> Any:
    """The numbers that 32 codes stand for, in units of the scale."""
    if form == INT8:
        return integers.to_floats(integers.load_i8(codes + 32 * word))
    if form == INT4:
        return integers.to_floats(integers.load_i4(codes + 16 * word))
    code = integers.load_u8(codes + 32 * word)
    size = integers.bit_and(code, integers.splat(np.uint32(0x7F)))
    minus = integers.shift_left(integers.bit_and(code, integers.splat(np.uint32(0x80))), np.uint32(24))
    bits = integers.add(integers.shift_left(size, np.uint32(20)), integers.splat(np.uint32(120 << 23)))
    hidden = integers.as_floats(integers.add(bits, integers.splat(np.uint32(1 << 23))))
    small = simd.subtract(hidden, simd.splat(_SUBNORMAL))  # 2⁻⁶ is the bit that a number below it does not have
    value = simd.select(integers.less(size, integers.splat(np.uint32(8))), small, integers.as_floats(bits))
    return integers.as_floats(integers.bit_or(integers.bits_of(value), minus))
