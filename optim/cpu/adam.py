"""Adam's update of many tensors in one pass over memory; any number of threads share one call.

A row of `table` is one tensor, a row of `scalars` its factors; COLUMNS and SCALARS name their entries. A word is 32
elements, of which the last one of a tensor may have fewer; words are counted over all tensors. Arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import BF16, F32, WORD, inline, load_values
from onebit.optim.cpu.values import store_values

# int64. The first word of the next row is where a tensor ends; there is one row more than tensors.
COLUMNS = ("first_word", "numel", "param", "grad", "exp_avg", "exp_avg_sq", "copy", "dtypes")
# fp32. g <- sign·g + l2·p; m <- beta1·m + alpha1·g; v <- beta2·v + alpha2·g²; p <- keep·p - rate·m / (root·√v + eps)
SCALARS = ("sign", "l2", "keep", "beta1", "alpha1", "beta2", "alpha2", "rate", "root", "eps")

NO_COPY = 3  # a dtype code beside those of values; "dtypes" has two bits for each of the five addresses, in their order

_SIGN, _L2, _KEEP, _BETA1, _ALPHA1, _BETA2, _ALPHA2, _RATE, _ROOT, _EPS = range(0, 4 * len(SCALARS), 4)
_ROW = 8 * len(COLUMNS)
_SCALAR_ROW = 4 * len(SCALARS)

_AHEAD = 2048  # bytes; the hardware's own prefetching stops at each page's end, seven streams have many of them


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
    p_bytes, g_bytes, m_bytes, v_bytes = _bytes(p_dtype), _bytes(g_dtype), _bytes(m_dtype), _bytes(v_dtype)
    full = n >> 5
    for word in range(first, min(last, full)):
        pw, gw, mw, vw = p + p_bytes * word, g + g_bytes * word, m + m_bytes * word, v + v_bytes * word
        _prefetch(pw, p_dtype)
        _prefetch(gw, g_dtype)
        _prefetch(mw, m_dtype)
        _prefetch(vw, v_dtype)
        _update_word(pw, gw, mw, vw, p_dtype, g_dtype, m_dtype, v_dtype, copy + 64 * word, copy_dtype, scalars)
    rest = n & 31
    if rest != 0 and last > full:
        p, g, m, v = p + p_bytes * full, g + g_bytes * full, m + m_bytes * full, v + v_bytes * full
        load_values(stage, p, p_dtype, rest, 1)
        load_values(stage + WORD, g, g_dtype, rest, 1)
        load_values(stage + 2 * WORD, m, m_dtype, rest, 1)
        load_values(stage + 3 * WORD, v, v_dtype, rest, 1)
        _update_word(stage, stage + WORD, stage + 2 * WORD, stage + 3 * WORD, F32, F32, F32, F32, 0, NO_COPY, scalars)
        store_values(p, stage, p_dtype, rest)
        store_values(m, stage + 2 * WORD, m_dtype, rest)
        store_values(v, stage + 3 * WORD, v_dtype, rest)
        if copy_dtype != NO_COPY:
            store_values(copy + 64 * full, stage, copy_dtype, rest)


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
    value = _load(p, p_dtype)
    gradient = simd.multiply(_load(g, g_dtype), _factor(scalars + _SIGN))
    if simd.get_f32(scalars + _L2) != 0:  # 0 · inf would be NaN
        gradient = simd.add(gradient, simd.multiply(value, _factor(scalars + _L2)))
    value = simd.multiply(value, _factor(scalars + _KEEP))
    momentum = simd.multiply(_load(m, m_dtype), _factor(scalars + _BETA1))
    momentum = simd.add(momentum, simd.multiply(gradient, _factor(scalars + _ALPHA1)))
    variance = simd.multiply(_load(v, v_dtype), _factor(scalars + _BETA2))
    square = simd.multiply(simd.multiply(gradient, _factor(scalars + _ALPHA2)), gradient)
    variance = simd.add(variance, square)
    spread = simd.add(simd.multiply(simd.square_root(variance), _factor(scalars + _ROOT)), _factor(scalars + _EPS))
    value = simd.subtract(value, simd.divide(simd.multiply(momentum, _factor(scalars + _RATE)), spread))
    _store(p, p_dtype, value)
    _store(m, m_dtype, momentum)
    _store(v, v_dtype, variance)
    if copy_dtype != NO_COPY:
        _store(copy, copy_dtype, value)


@inline
def _bytes(dtype: int) -> int:
    """Bytes of a word."""
    return 128 if dtype == F32 else 64


@inline
def _prefetch(address: int, dtype: int) -> None:
    """Ask for the word that will be needed some words later; an address that nothing lies at is no error."""
    simd.prefetch(address + _AHEAD)
    if dtype == F32:
        simd.prefetch(address + _AHEAD + 64)


@inline
def _factor(address: int) -> Any:
    return simd.splat(simd.get_f32(address))


@inline
def _load(address: int, dtype: int) -> Any:
    if dtype == F32:
        return simd.load_f32(address)
    if dtype == BF16:
        return simd.load_bf16(address)
    return simd.load_f16(address)


@inline
def _store(address: int, dtype: int, value: Any) -> None:
    if dtype == F32:
        simd.store_f32(address, value)
    elif dtype == BF16:
        simd.store_u16(address, simd.to_bf16_lanes(value))
    else:
        simd.store_u16(address, simd.to_f16_lanes(value))
