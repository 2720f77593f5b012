"""The loops over blocks of 1-bit Adam's fused step; what is done with a block stays in the L1 cache.

Addresses are int64. `tensors`, `offsets` and `counts` are the layout's tables: which tensor, offset and count a block
has. `grads`, `momenta`, `params`, `masters` and `variances` are tables of the tensors' addresses, `grad_codes` and
`param_codes` of their dtypes. `factors` holds β₁, α and l2 in fp32. Plain functions here, as in `compress.cpu.kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onebit.compress.cpu import simd
from onebit.compress.cpu.block import F32, WORD, add_residual, inline, live_lanes, load_values
from onebit.compress.cpu.kernels import finish_block
from onebit.compress.cpu.values import store_values

_ZERO = np.float32(0.0)


@inline
def element(base: int, offset: int, dtype: int) -> Any:
    """Address of an element of a tensor."""
    return base + (4 if dtype == F32 else 2) * offset


@inline
def local_momentum(
    c: int,
    w: int,
    tensor: int,
    offset: int,
    n: int,
    words: int,
    grads: int,
    grad_codes: int,
    momenta: int,
    params: int,
    param_codes: int,
    bits: int,
    scale: float,
    factors: int,
) -> None:
    """c <- (β₁·m) + (α·g'); m from `momenta`, or where that is 0 it is ± `scale` with the signs at `bits`.

    `w` is a second scratch block. Lanes after the n-th element hold anything.
    """
    beta1, alpha, l2 = simd.get_f32(factors), simd.get_f32(factors + 4), simd.get_f32(factors + 8)
    grad = simd.get_i64_at(grads, tensor)
    if grad != 0:
        dtype = simd.get_i64_at(grad_codes, tensor)
        load_values(c, element(grad, offset, dtype), dtype, n, words)
    else:
        for word in range(words):
            simd.store_f32(c + word * WORD, simd.splat(_ZERO))
    if l2 != _ZERO:
        dtype = simd.get_i64_at(param_codes, tensor)
        load_values(w, element(simd.get_i64_at(params, tensor), offset, dtype), dtype, n, words)
        by = simd.splat(l2)
        for at in range(0, words * WORD, WORD):
            simd.store_f32(c + at, simd.add(simd.load_f32(c + at), simd.multiply(by, simd.load_f32(w + at))))
    by = simd.splat(alpha)
    if momenta != 0:
        load_values(w, element(simd.get_i64_at(momenta, tensor), offset, F32), F32, n, words)
        decay = simd.splat(beta1)
        for at in range(0, words * WORD, WORD):
            kept = simd.multiply(decay, simd.load_f32(w + at))
            simd.store_f32(c + at, simd.add(kept, simd.multiply(by, simd.load_f32(c + at))))
    else:
        up, down = simd.splat(beta1 * scale), simd.splat(-(beta1 * scale))
        for word in range(words):
            kept = simd.select(simd.get_word(bits + 4 * word), up, down)
            simd.store_f32(c + word * WORD, simd.add(kept, simd.multiply(by, simd.load_f32(c + word * WORD))))


@inline
def whole_sum(c: int, grad: int, r: int, bits: int, kept: float, alpha: float, words: int) -> None:
    """c <- ((± `kept`) + (α·g)) + r of a block whose elements all take part, in registers; signs at `bits`."""
    up, down, by = simd.splat(kept), simd.splat(-kept), simd.splat(alpha)
    for word in range(words):
        at = word * WORD
        m = simd.select(simd.get_word(bits + 4 * word), up, down)
        local = simd.add(m, simd.multiply(by, simd.load_f32(grad + at)))
        simd.store_f32(c + at, simd.add(local, simd.load_f32(r + at)))


def encode_momentum_blocks(
    first: int,
    last: int,
    grads: int,
    grad_codes: int,
    momenta: int,
    params: int,
    param_codes: int,
    payloads: int,
    factors: int,
    tensors: int,
    offsets: int,
    counts: int,
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
    """Encode the local momentum plus residual into the payloads at `out`; m is in `payloads` where `momenta` is 0."""
    words = block_size >> 5
    scratch = np.empty(2 * block_size, np.float32)
    c = scratch.ctypes.data
    beta1, alpha = simd.get_f32(factors), simd.get_f32(factors + 4)
    plain = momenta == 0 and simd.get_f32(factors + 8) == _ZERO
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        tensor, offset = simd.get_i32_at(tensors, block), simd.get_i64_at(offsets, block)
        dead = mask + block_size // 8 * block if mask != 0 else 0
        chunk = block // chunk_blocks
        index = block - chunk * chunk_blocks
        bits = payload_bytes * chunk + block_size // 8 * index
        scale = payload_bytes * chunk + bits_bytes + 4 * index
        r = residual + 4 * block_size * block
        old = simd.get_f32(payloads + scale) if momenta == 0 else _ZERO
        grad = simd.get_i64_at(grads, tensor)
        whole = plain and grad != 0 and dead == 0 and n == block_size
        if whole and simd.get_i64_at(grad_codes, tensor) == F32:
            whole_sum(c, element(grad, offset, F32), r, payloads + bits, beta1 * old, alpha, words)
        else:
            local_momentum(
                c,
                c + 4 * block_size,
                tensor,
                offset,
                n,
                words,
                grads,
                grad_codes,
                momenta,
                params,
                param_codes,
                payloads + bits,
                old,
                factors,
            )
            add_residual(c, r, n, words, dead)
        finish_block(c, r, out + bits, out + scale, n, words, dead, squared, stage, sums + 12 * block)
    scratch[0] = 0.0  # the last use


def write_momentum_blocks(
    first: int,
    last: int,
    grads: int,
    grad_codes: int,
    momenta: int,
    params: int,
    param_codes: int,
    payloads: int,
    factors: int,
    tensors: int,
    offsets: int,
    counts: int,
    out: int,
    chunk_blocks: int,
    bits_bytes: int,
    payload_bytes: int,
    block_size: int,
    past_cache: int,
) -> None:
    """Write the local momentum; `out` is a table of the chunks' addresses, m is in `payloads` where `momenta` is 0."""
    words = block_size >> 5
    scratch = np.empty(2 * block_size, np.float32)
    c = scratch.ctypes.data
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        if n == 0:
            continue
        chunk = block // chunk_blocks
        index = block - chunk * chunk_blocks
        old = simd.get_f32(payloads + payload_bytes * chunk + bits_bytes + 4 * index) if momenta == 0 else _ZERO
        local_momentum(
            c,
            c + 4 * block_size,
            simd.get_i32_at(tensors, block),
            simd.get_i64_at(offsets, block),
            n,
            words,
            grads,
            grad_codes,
            momenta,
            params,
            param_codes,
            payloads + payload_bytes * chunk + block_size // 8 * index,
            old,
            factors,
        )
        target = simd.get_i64_at(out, chunk) + 4 * block_size * index
        if past_cache != 0:
            for at in range(0, words * WORD, WORD):
                simd.stream_f32(target + at, simd.load_f32(c + at))
        else:
            for at in range(0, words * WORD, WORD):
                simd.store_f32(target + at, simd.load_f32(c + at))
    simd.fence()
    scratch[0] = 0.0  # the last use


def undo_encode_blocks(
    first: int,
    last: int,
    grads: int,
    grad_codes: int,
    momenta: int,
    params: int,
    param_codes: int,
    payloads: int,
    factors: int,
    tensors: int,
    offsets: int,
    counts: int,
    residual: int,
    mask: int,
    sent: int,
    chunk_blocks: int,
    bits_bytes: int,
    payload_bytes: int,
    block_size: int,
) -> None:
    """residual <- (residual + what was sent) - local momentum, where elements take part and the scale is no NaN."""
    words = block_size >> 5
    scratch = np.empty(2 * block_size, np.float32)
    c = scratch.ctypes.data
    w = c + 4 * block_size
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        tensor, offset = simd.get_i32_at(tensors, block), simd.get_i64_at(offsets, block)
        dead = mask + block_size // 8 * block if mask != 0 else 0
        chunk = block // chunk_blocks
        index = block - chunk * chunk_blocks
        bits = payload_bytes * chunk + block_size // 8 * index
        scale = payload_bytes * chunk + bits_bytes + 4 * index
        r = residual + 4 * block_size * block
        said = simd.get_f32(sent + scale)
        if np.isnan(said):
            continue
        old = simd.get_f32(payloads + scale) if momenta == 0 else _ZERO
        local_momentum(
            c,
            w,
            tensor,
            offset,
            n,
            words,
            grads,
            grad_codes,
            momenta,
            params,
            param_codes,
            payloads + bits,
            old,
            factors,
        )
        up, down = simd.splat(said), simd.splat(-said)
        for word in range(words):  # a residual covers its block, padding included
            now = simd.load_f32(r + word * WORD)
            heard = simd.add(now, simd.select(simd.get_word(sent + bits + 4 * word), up, down))
            before = simd.subtract(heard, simd.load_f32(c + word * WORD))
            simd.store_f32(r + word * WORD, simd.select(live_lanes(n, word, dead), before, now))
    scratch[0] = 0.0  # the last use


@inline
def part_of(step: Any, variance: Any, root: Any, eps: Any) -> Any:
    """step / ((√variance · root) + ε), all vectors."""
    return simd.divide(step, simd.add(simd.multiply(simd.square_root(variance), root), eps))


def decode_update_blocks(
    first: int,
    last: int,
    payloads: int,
    params: int,
    param_codes: int,
    masters: int,
    variances: int,
    scalars: int,
    eps: int,
    tensors: int,
    offsets: int,
    counts: int,
    mask: int,
    chunk_blocks: int,
    bits_bytes: int,
    payload_bytes: int,
    block_size: int,
) -> None:
    """Update parameters from the momentum in `payloads`; `scalars` (tensors, 3): rate, root, keep; `eps` an address."""
    words = block_size >> 5
    scratch = np.empty(2 * block_size, np.float32)
    w = scratch.ctypes.data
    v = w + 4 * block_size
    least = simd.splat(simd.get_f32(eps))
    for block in range(first, last):
        n = simd.get_i32_at(counts, block)
        if n == 0:
            continue
        tensor, offset = simd.get_i32_at(tensors, block), simd.get_i64_at(offsets, block)
        dead = mask + block_size // 8 * block if mask != 0 else 0
        chunk = block // chunk_blocks
        index = block - chunk * chunk_blocks
        bits = payloads + payload_bytes * chunk + block_size // 8 * index
        scale = simd.get_f32(payloads + payload_bytes * chunk + bits_bytes + 4 * index)
        row = scalars + 12 * tensor
        step = simd.get_f32(row) * scale
        up, down = simd.splat(step), simd.splat(-step)
        root, keep = simd.splat(simd.get_f32(row + 4)), simd.splat(simd.get_f32(row + 8))
        dtype = simd.get_i64_at(param_codes, tensor)
        p = element(simd.get_i64_at(params, tensor), offset, dtype)
        master = simd.get_i64_at(masters, tensor)
        spread = element(simd.get_i64_at(variances, tensor), offset, F32)
        if (
            dtype == F32 and master == 0 and dead == 0 and n == block_size
        ):  # in registers, so that loads overlap with divisions
            for word in range(words):
                at = word * WORD
                m = simd.select(simd.get_word(bits + 4 * word), up, down)
                kept = simd.multiply(simd.load_f32(p + at), keep)
                simd.store_f32(p + at, simd.subtract(kept, part_of(m, simd.load_f32(spread + at), root, least)))
            continue
        if master != 0:
            load_values(w, element(master, offset, F32), F32, n, words)
        else:
            load_values(w, p, dtype, n, words)
        load_values(v, spread, F32, n, words)
        for word in range(words):
            at = word * WORD
            m = simd.select(simd.get_word(bits + 4 * word), up, down)
            kept = simd.multiply(simd.load_f32(w + at), keep)
            moved = simd.subtract(kept, part_of(m, simd.load_f32(v + at), root, least))
            simd.store_f32(w + at, simd.select(live_lanes(n, word, dead), moved, kept))
        if master != 0:
            store_values(element(master, offset, F32), w, F32, n, 0, False)
        store_values(p, w, dtype, n, 0, False)
    scratch[0] = 0.0  # the last use
