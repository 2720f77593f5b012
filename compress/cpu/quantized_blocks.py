"""The loops over blocks of the quantizing codecs: each takes a range of blocks, as those of `kernels.py` do.

Plain functions here; `build.py` compiles them when first used. Numba frees an array after its last use, and an address
taken from it is no use: each `scratch` has one after the loop. Blocks in it start on a line of the cache, for a vector
that lies across two takes twice as long.
"""

from __future__ import annotations

import numpy as np

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import F32, add_residual, load_values
from onebit.compress.cpu.quantized_block import finish_block, load_block, load_mean
from onebit.compress.cpu.values import store_values

_LINE = 16  # fp32 values


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
    scales: int,
    payload_bytes: int,
    block_size: int,
    block_bytes: int,
    form: int,
    stochastic: int,
    rotated: int,
    seed: int,
) -> None:
    """Encode blocks of tensors into the payloads of their chunks; `scales`: where a payload's scales start."""
    words = block_size >> 5
    size = 4 if dtype == F32 else 2
    scratch = np.empty(2 * block_size + _LINE, np.float32)
    c = (scratch.ctypes.data + 4 * _LINE - 1) & -(4 * _LINE)
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
        codes, scale = payload + block_bytes * index, payload + scales + 4 * index
        w = c + 4 * block_size
        finish_block(c, w, r, codes, scale, n, words, block_bytes, m, form, stochastic, rotated, seed)
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
    scales: int,
    payload_bytes: int,
    block_size: int,
    block_bytes: int,
    form: int,
    stochastic: int,
    rotated: int,
    seed: int,
) -> None:
    """Encode the mean over ranks of one chunk's payloads; tables and addresses start at the chunk's first block."""
    words = block_size >> 5
    scratch = np.empty(2 * block_size + ranks + _LINE, np.float32)
    c = (scratch.ctypes.data + 4 * _LINE - 1) & -(4 * _LINE)
    shares = c + 8 * block_size
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        r = residual + 4 * block_size * block if residual != 0 else 0
        m = mask + block_size // 8 * block if mask != 0 else 0
        codes, scale = block_bytes * block, scales + 4 * block
        for rank in range(ranks):
            s = simd.get_f32(payloads + rank * payload_bytes + scale)
            simd.put_f32(shares + 4 * rank, s / np.float32(ranks))
        load_mean(c, form, payloads + codes, payload_bytes, shares, ranks, words, rotated)
        add_residual(c, r, n, words, m)
        w, scale = c + 4 * block_size, out + scale
        finish_block(c, w, r, out + codes, scale, n, words, block_bytes, m, form, stochastic, rotated, seed)
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
    scales: int,
    payload_bytes: int,
    block_size: int,
    block_bytes: int,
    form: int,
    rotated: int,
    stream: int,
) -> None:
    """Write blocks of the tensors from the payloads of their chunks."""
    words = block_size >> 5
    size = 4 if dtype == F32 else 2
    scratch = np.empty(block_size + _LINE, np.float32)
    c = (scratch.ctypes.data + 4 * _LINE - 1) & -(4 * _LINE)
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        x = simd.get_i64_at(bases, simd.get_i32_at(tensors, block)) + size * simd.get_i64_at(offsets, block)
        m = mask + block_size // 8 * block if mask != 0 else 0
        chunk = block // chunk_blocks
        payload = payloads + payload_bytes * chunk
        index = block - chunk * chunk_blocks
        scale = simd.get_f32(payload + scales + 4 * index)
        load_block(c, form, payload + block_bytes * index, scale, words, rotated)
        store_values(x, c, dtype, n, m, stream != 0)
    scratch[0] = 0.0  # the last use
    simd.fence()
