"""The orthogonal Walsh-Hadamard transform of a block in the L1 cache; it is its own inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import WORD, inline
from onebit.compress.cpu.intrinsic import F32, LANES, f32x32, operation, pick, vector

_ONE = np.float32(1.0)


@operation(f32x32, f32x32)
def transform_lanes(builder: Any, a: Any) -> Any:
    """The steps of strides 1, 2, 4, 8 and 16: (a, b) becomes (a + b, a - b)."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    fused = builder.module.declare_intrinsic(f"llvm.fma.v{LANES}f32", fnty=kind)
    for stride in (1, 2, 4, 8, 16):
        partner = pick(builder, a, a, [lane ^ stride for lane in range(LANES)])
        signs = ir.Constant(vector(F32), [-1.0 if lane & stride else 1.0 for lane in range(LANES)])
        a = builder.call(fused, [a, signs, partner])  # a product with ±1 is exact, so this is rounded as a sum is
    return a


@inline
def root_of(words: int) -> Any:
    """1/√B of a block of B = 32 · words elements."""
    return np.float32(1.0 / np.sqrt(np.float64(32 * words)))


@inline
def rotate(v: int, source: int, words: int, root: Any) -> None:
    """v <- the transform of the block at `source`, which may be v; `words`, the block size / 32, is a power of two.

    `root` is what the sums are multiplied by last, `root_of(words)` or a multiple of it.
    """
    for word in range(words):
        row = transform_lanes(simd.load_f32(source + word * WORD))
        simd.store_f32(v + word * WORD, simd.multiply(row, simd.splat(root)) if words == 1 else row)
    stride, end = WORD, v + words * WORD
    while v + stride < end:
        reach = 4 * stride if v + 2 * stride < end else 2 * stride
        factor = simd.splat(root if v + reach == end else _ONE)
        for start in range(v, end, reach):
            for p in range(start, start + stride, WORD):
                if reach == 4 * stride:
                    cross_four(p, stride, factor)
                else:
                    cross_two(p, stride, factor)
        stride = reach


@inline
def cross_two(p: int, stride: int, factor: Any) -> None:
    """One step: the vectors at p and p + stride become their sum and their difference, times `factor`."""
    a, b = simd.load_f32(p), simd.load_f32(p + stride)
    simd.store_f32(p, simd.multiply(simd.add(a, b), factor))
    simd.store_f32(p + stride, simd.multiply(simd.subtract(a, b), factor))


@inline
def cross_four(p: int, stride: int, factor: Any) -> None:
    """Two steps, of `stride` and of twice that, in one visit of four vectors."""
    a, b = simd.load_f32(p), simd.load_f32(p + stride)
    c, d = simd.load_f32(p + 2 * stride), simd.load_f32(p + 3 * stride)
    low_sum, low_rest, high_sum, high_rest = simd.add(a, b), simd.subtract(a, b), simd.add(c, d), simd.subtract(c, d)
    simd.store_f32(p, simd.multiply(simd.add(low_sum, high_sum), factor))
    simd.store_f32(p + stride, simd.multiply(simd.add(low_rest, high_rest), factor))
    simd.store_f32(p + 2 * stride, simd.multiply(simd.subtract(low_sum, high_sum), factor))
    simd.store_f32(p + 3 * stride, simd.multiply(simd.subtract(low_rest, high_rest), factor))
