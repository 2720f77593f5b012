"""Adam's update of many tensors in one pass over memory; any number of threads share one call.

A row of `table` is one tensor, a row of `scalars` its factors; COLUMNS and SCALARS name their entries. A word is 32
elements, of which the last one of a tensor may have fewer; words are counted over all tensors. Arithmetic is fp32.
"""

from __future__ import annotations

import numpy as np

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import F32, WORD, inline, load_values
from onebit.compress.cpu.values import factor, load_word, prefetch_word, store_values, store_word, word_bytes

# int64. The first word of the next row is where a tensor ends; there is one row more than tensors.
COLUMNS = ("first_word", "numel", "param", "grad", "exp_avg", "exp_avg_sq", "copy", "dtypes")
# fp32. g <- sign·g + l2·p; m <- beta1·m + alpha1·g; v <- beta2·v + alpha2·g²; p <- keep·p - rate·m / (root·√v + eps)
SCALARS = ("sign", "l2", "keep", "beta1", "alpha1", "beta2", "alpha2", "rate", "root", "eps")

NO_COPY = 3  # a dtype code beside those of values; "dtypes" has two bits for each of the five addresses, in their order

_SIGN, _L2, _KEEP, _BETA1, _ALPHA1, _BETA2, _ALPHA2, _RATE, _ROOT, _EPS = range(0, 4 * len(SCALARS), 4)
_ROW = 8 * len(COLUMNS)
_SCALAR_ROW = 4 * len(SCALARS)


def count_steps(first: int, last: int, steps: int, counts: int) -> None:
    """Add 1 to the fp32 at each of the addresses `steps`, and put the sums into the array `counts`."""
    for index in range(first, last):
        step = simd.get_i64_at(steps, index)
        count = simd.get_f32(step) + np.float32(1.0)
        simd.put_f32(step, count)
        simd.put_f32(counts + 4 * index, count)


def update_words(first: int, last: int, table: int, tensors: int, scalars: int) -> None:
    """Update words [first, last)."""
    scratch = np.empty(4 * 32, np.float32)
    stage = scratch.ctypes.data
    index = _tensor_of(first, table, tensors)
    word = first
    while word < last:
        row = table + _ROW * index
        start, end = simd.get_i64_at(row, 0), simd.get_i64_at(row + _ROW, 0)
        _update_tensor(word - start, min(last, end) - start, row, scalars + _SCALAR_ROW * index, stage)
        word = min(last, end)
        index += 1
    scratch[0] = 0.0  # the last use; see compress/cpu/kernels.py


@inline
def _tensor_of(word: int, table: int, tensors: int) -> int:
    """The last tensor that starts at or before a word."""
    low, high = 0, tensors
    while high - low > 1:
        middle = (low + high) >> 1
        if simd.get_i64_at(table + _ROW * middle, 0) <= word:
            low = middle
        else:
            high = middle
    return low


@inline
def _update_tensor(first: int, last: int, row: int, scalars: int, stage: int) -> None:
    """Update words [first, last) of one tensor; `stage`: scratch for a word of each of four operands."""
    n, dtypes = simd.get_i64_at(row, 1), simd.get_i64_at(row, 7)
    p, g, m = simd.get_i64_at(row, 2), simd.get_i64_at(row, 3), simd.get_i64_at(row, 4)
    v, copy = simd.get_i64_at(row, 5), simd.get_i64_at(row, 6)
    p_dtype, g_dtype, m_dtype = dtypes & 3, dtypes >> 2 & 3, dtypes >> 4 & 3
    v_dtype, copy_dtype = dtypes >> 6 & 3, dtypes >> 8 & 3
    p_bytes, g_bytes, m_bytes, v_bytes = (
        word_bytes(p_dtype),
        word_bytes(g_dtype),
        word_bytes(m_dtype),
        word_bytes(v_dtype),
    )
    full = n >> 5
    for word in range(first, min(last, full)):
        pw, gw, mw, vw = p + p_bytes * word, g + g_bytes * word, m + m_bytes * word, v + v_bytes * word
        prefetch_word(pw, p_dtype)
        prefetch_word(gw, g_dtype)
        prefetch_word(mw, m_dtype)
        prefetch_word(vw, v_dtype)
        _update_word(pw, gw, mw, vw, p_dtype, g_dtype, m_dtype, v_dtype, copy + 64 * word, copy_dtype, scalars)
    rest = n & 31
    if rest != 0 and last > full:
        p, g, m, v = p + p_bytes * full, g + g_bytes * full, m + m_bytes * full, v + v_bytes * full
        load_values(stage, p, p_dtype, rest, 1)
        load_values(stage + WORD, g, g_dtype, rest, 1)
        load_values(stage + 2 * WORD, m, m_dtype, rest, 1)
        load_values(stage + 3 * WORD, v, v_dtype, rest, 1)
        _update_word(stage, stage + WORD, stage + 2 * WORD, stage + 3 * WORD, F32, F32, F32, F32, 0, NO_COPY, scalars)
        store_values(p, stage, p_dtype, rest, 0, False)
        store_values(m, stage + 2 * WORD, m_dtype, rest, 0, False)
        store_values(v, stage + 3 * WORD, v_dtype, rest, 0, False)
        if copy_dtype != NO_COPY:
            store_values(copy + 64 * full, stage, copy_dtype, rest, 0, False)


@inline
def _update_word(
    p: int,
    g: int,
    m: int,
    v: int,
    p_dtype: int,
    g_dtype: int,
    m_dtype: int,
    v_dtype: int,
    copy: int,
    copy_dtype: int,
    scalars: int,
) -> None:
    """Update 32 elements."""
    value = load_word(p, p_dtype)
    gradient = simd.multiply(load_word(g, g_dtype), factor(scalars + _SIGN))
    if simd.get_f32(scalars + _L2) != 0:  # 0 · inf would be NaN
        gradient = simd.add(gradient, simd.multiply(value, factor(scalars + _L2)))
    value = simd.multiply(value, factor(scalars + _KEEP))
    momentum = simd.multiply(load_word(m, m_dtype), factor(scalars + _BETA1))
    momentum = simd.add(momentum, simd.multiply(gradient, factor(scalars + _ALPHA1)))
    variance = simd.multiply(load_word(v, v_dtype), factor(scalars + _BETA2))
    square = simd.multiply(simd.multiply(gradient, factor(scalars + _ALPHA2)), gradient)
    variance = simd.add(variance, square)
    spread = simd.add(simd.multiply(simd.square_root(variance), factor(scalars + _ROOT)), factor(scalars + _EPS))
    value = simd.subtract(value, simd.divide(simd.multiply(momentum, factor(scalars + _RATE)), spread))
    store_word(p, p_dtype, value)
    store_word(m, m_dtype, momentum)
    store_word(v, v_dtype, variance)
    if copy_dtype != NO_COPY:
        store_word(copy, copy_dtype, value)
