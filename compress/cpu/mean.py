"""Encode the mean of what several ranks have of the same blocks, in one pass over memory: sum, residual, signs, scales.

What this rank has lies in tensors; what the others have, in block order, in memory that this process has mapped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import BF16, F32, WORD, add_residual, inline, load_values
from onebit.compress.cpu.kernels import FUSED, finish_block
from onebit.compress.cpu.launch import CODES, address, addresses, launch
from onebit.compress.layout import Layout


def encode_mean(
    tensors: Sequence[Tensor],
    others: Sequence[Tensor],
    place: int,
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    squared: bool,
) -> None:
    """As `reference.encode` of the mean over ranks: their sum, in fp32 in their order, divided by their number.

    Args:
        tensors: what this rank has; all of one dtype.
        others: of each other rank, in order, (layout.padded_numel,) fp32 in block order.
        place: how many of the others come before this rank.
        residual, mask, out, squared: as for `reference.encode`.
        layout: where the tensors' blocks lie; every block has a scale of its own.
    """
    bases, rows = addresses(tensors), addresses([*others[:place], None, *others[place:]])
    launch(
        _encode_mean_blocks,
        layout.blocks,
        layout.block_size,
        bases.ctypes.data,
        layout.tensor_of_block.ctypes.data,
        layout.offset_of_block.ctypes.data,
        layout.count_of_block.ctypes.data,
        CODES[tensors[0].dtype],
        rows.ctypes.data,
        len(rows),
        address(residual),
        address(mask),
        out.data_ptr(),
        layout.chunk_blocks,
        layout.bits_bytes,
        layout.payload_bytes,
        layout.block_size,
        squared,
    )


def _encode_mean_blocks(
    first: int,
    last: int,
    bases: int,
    tensors: int,
    offsets: int,
    counts: int,
    dtype: int,
    rows: int,
    ranks: int,
    residual: int,
    mask: int,
    out: int,
    chunk_blocks: int,
    bits_bytes: int,
    payload_bytes: int,
    block_size: int,
    squared: int,
) -> None:
    """The loop over blocks; `rows`: an address per rank, 0 for this one."""
    words = block_size >> 5
    size = 4 if dtype == F32 else 2
    scratch = np.empty(block_size, np.float32)
    c = scratch.ctypes.data
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        x = simd.get_i64_at(bases, simd.get_i32_at(tensors, block)) + size * simd.get_i64_at(offsets, block)
        r = residual + 4 * block_size * block if residual != 0 else 0
        m = mask + block_size // 8 * block if mask != 0 else 0
        for rank in range(ranks):
            source, kind = _source(rows, rank, x, dtype, block, block_size)
            following = r if rank + 1 == ranks else _source(rows, rank + 1, x, dtype, block, block_size)[0]
            _ask_for(following, 4 * block_size)
            if rank == 0:
                load_values(c, source, kind, n, words)
            else:
                _add_values(c, source, kind, n)
        _ask_for(_source(rows, 0, x + size * block_size, dtype, block + 1, block_size)[0], 4 * block_size)
        _divide(c, ranks, words)
        add_residual(c, r, n, words, m)
        chunk = block // chunk_blocks
        payload = out + payload_bytes * chunk
        index = block - chunk * chunk_blocks
        bits, scale = payload + block_size // 8 * index, payload + bits_bytes + 4 * index
        finish_block(c, r, bits, scale, n, words, m, squared, FUSED, 0)
    scratch[0] = 0.0  # the last use


@inline
def _source(rows: int, rank: int, x: int, dtype: int, block: int, block_size: int) -> tuple[int, int]:
    """Where a rank's values of a block are, and their dtype."""
    row = simd.get_i64_at(rows, rank)
    return (x, dtype) if row == 0 else (row + 4 * block_size * block, F32)


@inline
def _ask_for(address: int, n_bytes: int) -> None:
    """Have these bytes come into the cache while others are worked on."""
    for line in range(address, address + n_bytes, 64):
        simd.prefetch(line)


@inline
def _add_values(c: int, x: int, dtype: int, n: int) -> None:
    """c <- c + the n values at `x`."""
    full = n >> 5
    for word in range(full):
        a = simd.load_f32(c + word * WORD)
        if dtype == F32:
            a = simd.add(a, simd.load_f32(x + word * 128))
        elif dtype == BF16:
            a = simd.add(a, simd.load_bf16(x + word * 64))
        else:
            a = simd.add(a, simd.load_f16(x + word * 64))
        simd.store_f32(c + word * WORD, a)
    for i in range(32 * full, n):
        if dtype == F32:
            v = simd.get_f32(x + 4 * i)
        elif dtype == BF16:
            v = simd.get_bf16(x + 2 * i)
        else:
            v = simd.get_f16(x + 2 * i)
        simd.put_f32(c + 4 * i, simd.get_f32(c + 4 * i) + v)


@inline
def _divide(c: int, ranks: int, words: int) -> None:
    """c <- c / ranks; by a power of two a product has the same bits, in a fraction of the time."""
    exact = ranks & (ranks - 1) == 0
    number = simd.splat(np.float32(1.0) / np.float32(ranks)) if exact else simd.splat(np.float32(ranks))
    for word in range(words):
        a = simd.load_f32(c + word * WORD)
        simd.store_f32(c + word * WORD, simd.multiply(a, number) if exact else simd.divide(a, number))
