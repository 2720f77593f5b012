"""The loops over blocks: each takes a range of blocks, so that any number of threads can share one call.

Addresses are int64. `tables` are the layout's: which tensor, offset and count a block has; `bases` the tensors'
addresses. Plain functions here; `build.py` compiles them when first used.

Numba frees an array after its last use, and an address taken from it is no use: each `scratch` has one after the loop.
"""

from __future__ import annotations

import numpy as np

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import (
    F32,
    add_residual,
    block_scale,
    block_sum,
    count_live,
    inline,
    load_mean,
    load_values,
    quantize,
    write_16,
    write_f32,
)

# A scale per block is found and used in one visit. One shared by many blocks takes two: sums first, then signs.
FUSED, SUMS_ONLY, GIVEN_SCALES = 0, 1, 2

_ONE = np.float32(1.0)
_RESCUE = np.float32(2.0**-96)


@inline
def finish_block(
    c: int, r: int, bits: int, scale: int, n: int, words: int, mask: int, squared: int, stage: int, sums: int
) -> None:
    """What encode and reduce_encode have in common once c is there: the scale at address `scale`, signs, residual."""
    count = count_live(n, words, mask)
    if stage == SUMS_ONLY:
        simd.put_f32(sums, block_sum(c, words, squared != 0, _ONE))
        simd.put_f32(sums + 4, block_sum(c, words, squared != 0, _RESCUE))
        simd.put_word(sums + 8, np.uint32(count))
        return
    if stage == FUSED:
        simd.put_f32(scale, block_scale(c, words, count, squared != 0))
    quantize(c, r, bits, simd.get_f32(scale), n, words, mask)


def encode_blocks(
    first: int,
    last: int,
    bases: int,
    tensors: int,
    offsets: int,
    counts: int,
    dtype: int,
    residual: int,
    mask: int,
    out: int,
    chunk_blocks: int,
    bits_bytes: int,
    payload_bytes: int,
    block_size: int,
    squared: int,
    stage: int,
    sums: int,
) -> None:
    """Encode blocks of tensors into the payloads of their chunks; `sums` (blocks, 3): sum, rescued sum, live count."""
    words = block_size >> 5
    size = 4 if dtype == F32 else 2
    scratch = np.empty(block_size, np.float32)
    c = scratch.ctypes.data
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        x = simd.get_i64_at(bases, simd.get_i32_at(tensors, block)) + size * simd.get_i64_at(offsets, block)
        r = residual + 4 * block_size * block if residual != 0 else 0
        m = mask + block_size // 8 * block if mask != 0 else 0
        chunk = block // chunk_blocks
        payload = out + payload_bytes * chunk
        index = block - chunk * chunk_blocks
        load_values(c, x, dtype, n, words)
        add_residual(c, r, n, words, m)
        bits, scale = payload + block_size // 8 * index, payload + bits_bytes + 4 * index
        finish_block(c, r, bits, scale, n, words, m, squared, stage, sums + 12 * block)
    scratch[0] = 0.0  # the last use


def reduce_encode_blocks(
    first: int,
    last: int,
    payloads: int,
    ranks: int,
    counts: int,
    residual: int,
    mask: int,
    out: int,
    bits_bytes: int,
    payload_bytes: int,
    block_size: int,
    squared: int,
    stage: int,
    sums: int,
) -> None:
    """Encode the mean over ranks of one chunk's payloads; tables and addresses start at the chunk's first block."""
    words = block_size >> 5
    scratch = np.empty(block_size + ranks, np.float32)
    c = scratch.ctypes.data
    shares = c + 4 * block_size
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        r = residual + 4 * block_size * block if residual != 0 else 0
        m = mask + block_size // 8 * block if mask != 0 else 0
        bits, scale = block_size // 8 * block, bits_bytes + 4 * block
        for rank in range(ranks):
            s = simd.get_f32(payloads + rank * payload_bytes + scale)
            simd.put_f32(shares + 4 * rank, s / np.float32(ranks))
        load_mean(c, payloads + bits, payload_bytes, shares, ranks, words)
        add_residual(c, r, n, words, m)
        finish_block(c, r, out + bits, out + scale, n, words, m, squared, stage, sums + 12 * block)
    scratch[0] = 0.0  # the last use


def decode_blocks(
    first: int,
    last: int,
    payloads: int,
    bases: int,
    tensors: int,
    offsets: int,
    counts: int,
    dtype: int,
    mask: int,
    chunk_blocks: int,
    bits_bytes: int,
    payload_bytes: int,
    block_size: int,
    stream: int,
) -> None:
    """Write blocks of the tensors from the payloads of their chunks."""
    size = 4 if dtype == F32 else 2
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        x = simd.get_i64_at(bases, simd.get_i32_at(tensors, block)) + size * simd.get_i64_at(offsets, block)
        m = mask + block_size // 8 * block if mask != 0 else 0
        chunk = block // chunk_blocks
        payload = payloads + payload_bytes * chunk
        index = block - chunk * chunk_blocks
        bits, scale = payload + block_size // 8 * index, simd.get_f32(payload + bits_bytes + 4 * index)
        if dtype == F32:
            write_f32(x, bits, scale, n, m, stream != 0)
        else:
            write_16(x, bits, scale, dtype, n, m, stream != 0)
    simd.fence()


def pack_words(first: int, last: int, x: int, dtype: int, n: int, out: int) -> None:
    """Pack the signs of elements [32 · first, 32 · last) of n."""
    size = 4 if dtype == F32 else 2
    scratch = np.empty(32, np.float32)
    c = scratch.ctypes.data
    for word in range(first, last):
        left = n - 32 * word
        load_values(c, x + size * 32 * word, dtype, min(left, 32), 1)
        bits = simd.signs(simd.load_f32(c))
        if left >= 32:
            simd.put_word(out + 4 * word, bits)
        else:  # the buffer ends with the last byte that holds an element
            simd.put_word(c, np.uint32(bits & np.uint32((1 << left) - 1)))
            for byte in range((left + 7) >> 3):
                simd.copy_byte(out + 4 * word + byte, c + byte)
    scratch[0] = 0.0  # the last use


def unpack_words(first: int, last: int, bits: int, x: int, dtype: int, n: int) -> None:
    """Write ±1 to elements [32 · first, 32 · last) of n."""
    size = 4 if dtype == F32 else 2
    scratch = np.empty(1, np.float32)
    c = scratch.ctypes.data
    for word in range(first, last):
        left = min(n - 32 * word, 32)
        for byte in range((left + 7) >> 3):
            simd.copy_byte(c + byte, bits + 4 * word + byte)
        if dtype == F32:
            write_f32(x + size * 32 * word, c, _ONE, left, 0, False)
        else:
            write_16(x + size * 32 * word, c, _ONE, dtype, left, 0, False)
    scratch[0] = 0.0  # the last use
