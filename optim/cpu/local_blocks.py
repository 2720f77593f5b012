"""The loops over blocks of a local step of 0/1 Adam; 32 elements at a time, in registers.

Addresses are int64. `tensors`, `offsets` and `counts` are the layout's tables: which tensor, offset and count a block
has. A row of `table` is one tensor, COLUMNS names its entries; `rows` (tensors, 4) has its share, rate, kept and root,
`factors` β₁, α and ε. Plain functions here, as in `compress.cpu.kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import F32, WORD, inline, load_values
from onebit.compress.cpu.values import factor, load_word, prefetch_word, store_values, stream_word, word_bytes

# int64. "begins" and "copies" are 0 or 1: the mean counts as 0; y is the parameter, and is written to the start.
COLUMNS = (
    *("grad", "param", "momentum", "mean", "start", "variance"),
    *("grad_dtype", "param_dtype", "begins", "copies"),
)
NO_GRADIENT = 3  # a dtype code beside those of values

_ROW = 8 * len(COLUMNS)
_SCALAR_ROW = 4 * 4
_ALL = np.uint32(0xFFFFFFFF)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_LARGE = np.float32(2.0**126)  # a gradient below makes no finite momentum one that is not
_INFINITY = np.float32(np.inf)


def look_blocks(
    first: int, last: int, tensors: int, offsets: int, counts: int, table: int, factors: int, spoilt: int
) -> None:
    """The word at `spoilt` becomes 1 where a gradient makes some m' not finite; nothing else is written."""
    scratch = np.empty(3 * 32, np.float32)
    g1 = scratch.ctypes.data
    m1, v1 = g1 + WORD, g1 + 2 * WORD
    large, infinity = simd.splat(_LARGE), simd.splat(_INFINITY)
    finite = _ALL
    for block in range(first, last):
        n, tensor = simd.get_i32_at(counts, block), simd.get_i32_at(tensors, block)
        offset = simd.get_i64_at(offsets, block)
        row = table + _ROW * tensor
        g_dtype = simd.get_i64_at(row, 6)
        if g_dtype == NO_GRADIENT:
            continue
        g_bytes = word_bytes(g_dtype)
        g = simd.get_i64_at(row, 0) + (g_bytes >> 5) * offset
        usual = _ALL
        for word in range(n >> 5):
            gw = g + word * g_bytes
            prefetch_word(gw, g_dtype)
            usual = np.uint32(usual & simd.less(simd.absolute(load_word(gw, g_dtype)), large))
        if usual == _ALL and n & 31 == 0:
            continue
        m, v = simd.get_i64_at(row, 2) + 4 * offset, simd.get_i64_at(row, 5) + 4 * offset
        for word in range((n + 31) >> 5):
            left = min(n - 32 * word, 32)
            load_values(g1, g + word * g_bytes, g_dtype, left, 1)
            load_values(m1, m + word * WORD, F32, left, 1)
            load_values(v1, v + word * WORD, F32, left, 1)
            following = _following(simd.load_f32(m1), simd.load_f32(g1), simd.load_f32(v1), factors)
            finite = np.uint32(finite & simd.less(simd.absolute(following), infinity))
    if finite != _ALL:
        simd.put_word(spoilt, np.uint32(1))
    scratch[0] = 0.0  # the last use


def step_blocks(
    first: int,
    last: int,
    tensors: int,
    offsets: int,
    counts: int,
    table: int,
    factors: int,
    spoilt: int,
    rows: int,
    stream: int,
) -> None:
    """Make the step; if the word at `spoilt` is not 0 without gradients: m stays, and a becomes a·(1 - share).

    The word after it becomes 1 where some m' is not finite all the same, as m was not; that m and its a stay. What is
    written and not read goes past the cache if `stream` is 1.
    """
    scratch = np.empty(6 * 32, np.float32)
    stage = scratch.ctypes.data
    g1, p1, m1 = stage, stage + WORD, stage + 2 * WORD
    a1, y1, v1 = stage + 3 * WORD, stage + 4 * WORD, stage + 5 * WORD
    finite, taken = _ALL, simd.get_word(spoilt) == 0
    for block in range(first, last):
        n, tensor = simd.get_i32_at(counts, block), simd.get_i32_at(tensors, block)
        offset = simd.get_i64_at(offsets, block)
        row, scalars = table + _ROW * tensor, rows + _SCALAR_ROW * tensor
        g_dtype, p_dtype = simd.get_i64_at(row, 6), simd.get_i64_at(row, 7)
        begins, copies = simd.get_i64_at(row, 8), simd.get_i64_at(row, 9)
        g_bytes, p_bytes = word_bytes(g_dtype), word_bytes(p_dtype)
        words, rest = n >> 5, n & 31
        g = simd.get_i64_at(row, 0) + (g_bytes >> 5) * offset
        p = simd.get_i64_at(row, 1) + (p_bytes >> 5) * offset
        m, a = simd.get_i64_at(row, 2) + 4 * offset, simd.get_i64_at(row, 3) + 4 * offset
        y, v = simd.get_i64_at(row, 4) + 4 * offset, simd.get_i64_at(row, 5) + 4 * offset
        for word in range(words):
            at = word * WORD
            gw, pw = g + word * g_bytes, p + word * p_bytes
            prefetch_word(gw, g_dtype)
            prefetch_word(m + at, F32)
            prefetch_word(v + at, F32)
            if begins == 0:
                prefetch_word(a + at, F32)
            if copies == 0:
                prefetch_word(y + at, F32)
            if copies != 0 or stream == 0:
                prefetch_word(pw, p_dtype)
            there = (gw, pw, m + at, a + at, y + at, v + at)
            finite = np.uint32(
                finite & _step_word(*there, g_dtype, p_dtype, begins, copies, scalars, factors, taken, stream)
            )
        if rest != 0:
            at = words * WORD
            g, p = g + words * g_bytes, p + words * p_bytes
            if g_dtype != NO_GRADIENT:
                load_values(g1, g, g_dtype, rest, 1)
            load_values(p1, p, p_dtype, rest, 1)
            load_values(m1, m + at, F32, rest, 1)
            load_values(a1, a + at, F32, rest, 1)
            load_values(y1, y + at, F32, rest, 1)
            load_values(v1, v + at, F32, rest, 1)  # of what is not there v is 0, and m' with it
            kind = NO_GRADIENT if g_dtype == NO_GRADIENT else F32
            staged = (g1, p1, m1, a1, y1, v1)
            finite = np.uint32(finite & _step_word(*staged, kind, F32, begins, copies, scalars, factors, taken, 0))
            store_values(m + at, m1, F32, rest, 0, False)
            store_values(a + at, a1, F32, rest, 0, False)
            store_values(y + at, y1, F32, rest, 0, False)
            store_values(p, p1, p_dtype, rest, 0, False)
    simd.fence()
    if finite != _ALL:
        simd.put_word(spoilt + 4, np.uint32(1))
    scratch[0] = 0.0  # the last use; see compress/cpu/kernels.py


@inline
def _step_word(
    g: int,
    p: int,
    m: int,
    a: int,
    y: int,
    v: int,
    g_dtype: int,
    p_dtype: int,
    begins: int,
    copies: int,
    scalars: int,
    factors: int,
    taken: bool,
    stream: int,
) -> Any:
    """Make the step of 32 elements; returns the lanes whose m' is finite."""
    zero, share, finite = simd.splat(_ZERO), simd.get_f32(scalars), _ALL
    variance = simd.load_f32(v)
    mean = zero if begins != 0 else simd.load_f32(a)
    if copies != 0:
        start = load_word(p, p_dtype)
        stream_word(y, F32, start, stream != 0)
    else:
        start = simd.load_f32(y)
    if taken:
        momentum = simd.load_f32(m)
        gradient = zero if g_dtype == NO_GRADIENT else load_word(g, g_dtype)
        following = _following(momentum, gradient, variance, factors)
        finite = simd.less(simd.absolute(following), simd.splat(_INFINITY))
        added = simd.multiply(simd.splat(share), simd.subtract(following, mean))
        mean = simd.select(finite, simd.add(mean, added), mean)
        simd.store_f32(m, simd.select(finite, following, momentum))
    else:
        mean = simd.multiply(mean, simd.splat(_ONE - share))
    stream_word(a, F32, mean, stream != 0 and begins != 0)
    moved = _moved(start, mean, variance, scalars, factor(factors + 8))
    stream_word(p, p_dtype, moved, stream != 0 and copies == 0)
    return finite


@inline
def _following(momentum: Any, gradient: Any, variance: Any, factors: int) -> Any:
    """m' = β₁·m + α·g, or 0 where v is 0; all vectors."""
    kept, added = simd.multiply(factor(factors), momentum), simd.multiply(factor(factors + 4), gradient)
    zero = simd.splat(_ZERO)
    return simd.select(simd.equal(variance, zero), zero, simd.add(kept, added))


@inline
def _moved(start: Any, mean: Any, variance: Any, scalars: int, eps: Any) -> Any:
    """kept·y - rate·a / (√v·root + ε), or kept·y where v is 0; all vectors."""
    kept = simd.multiply(factor(scalars + 8), start)
    spread = simd.add(simd.multiply(simd.square_root(variance), factor(scalars + 12)), eps)
    step = simd.divide(simd.multiply(factor(scalars + 4), mean), spread)
    return simd.select(simd.equal(variance, simd.splat(_ZERO)), kept, simd.subtract(kept, step))
