"""The operators of `SignCodec` in plain torch: the specification, and what runs where nothing faster does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.compress.blocks import gathered, mask_of, real_elements, scales_of, scatter
from onebit.compress.layout import Layout, ceil_div

name = "reference"

Groups = Iterable[npt.NDArray[np.int64]]  # per group the blocks that share one scale

LANES = 128  # a sum runs down rows of 128 elements, then over the 128 partial sums
RESCUE = 2.0**-96  # exact factor for a second sum of values whose plain sum overflows fp32
LARGEST = torch.finfo(torch.float32).max


@torch.no_grad()
def encode(
    tensors: Sequence[Tensor], residual: Tensor | None, mask: Tensor | None, out: Tensor, layout: Layout, squared: bool
) -> None:
    """Write one payload per chunk to `out`; update `residual` (padded, or ending with the last real element)."""
    values = gathered(tensors, layout, out.device)
    real = real_elements(layout, layout.segments, layout.blocks, out.device)
    groups = layout.scale_groups() if layout.shared_scale else None
    _quantize(values, residual, real, mask, out.view(layout.chunks, -1), layout, squared, groups)


@torch.no_grad()
def reduce_encode(
    payloads: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    squared: bool,
) -> None:
    """Write the payload of the mean of `payloads` (ranks, payload_bytes), all of `chunk`, to `out`."""
    real = real_elements(layout, layout.chunk_segments(chunk), layout.chunk_blocks, out.device)
    mask = mask_of(mask, layout, chunk)
    groups = layout.scale_groups(chunk) if layout.shared_scale else None
    _quantize(_mean(payloads, layout).view(-1), residual, real, mask, out.view(1, -1), layout, squared, groups)


@torch.no_grad()
def undo_reduce(
    payloads: Tensor,
    residual: Tensor,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    keep: Tensor | None,
    squared: bool,
) -> None:
    """Put `residual` (chunk_numel,) back to what it was before `reduce_encode` wrote `out`, to within rounding.

    Args:
        keep: 0-dim bool on the same device: nothing is put back where it is true; None: it is put back.
    """
    said = _mean(out.view(1, -1), layout)
    unchanged = said.isnan() | ~real_elements(layout, layout.chunk_segments(chunk), layout.chunk_blocks, out.device)
    dead = mask_of(mask, layout, chunk)
    if dead is not None:
        unchanged |= unpack_bits(dead).view(unchanged.shape)
    if keep is not None:
        unchanged |= keep
    now = residual.view(unchanged.shape)
    now.copy_(torch.where(unchanged, now, (now + said) - _mean(payloads, layout)))


@torch.no_grad()
def decode(payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout, squared: bool) -> None:
    """Write the elements of all chunks of `payloads` (chunks · payload_bytes,) to `tensors`."""
    signs, scales = _sections(payloads.view(layout.chunks, -1), layout)
    scale = scales.reshape(-1, 1)
    values = torch.where(signs.view(layout.blocks, layout.block_size), scale, -scale).view(-1)
    if mask is not None:
        values = torch.where(unpack_bits(mask), 0.0, values)
    scatter(values, tensors, layout)


def all_finite(payloads: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """0-dim bool: all scales are finite; each buffer holds whole payloads of its layout, and one of them has blocks."""
    scales = [
        scales_of(p.view(-1, layout.payload_bytes), layout)
        for p, layout in zip(payloads, layouts, strict=True)
        if layout.blocks
    ]
    return torch.stack([s.isfinite().all() for s in scales]).all()


def pack_signs(x: Tensor, out: Tensor) -> None:
    """Write bit i of `out` (ceil(n/8),) uint8 as x[i] >= 0, little-endian; spare bits are 0."""
    bits = torch.zeros(out.numel() * 8, dtype=torch.bool, device=x.device)
    bits[: x.numel()] = x >= 0
    out.copy_(pack_bits(bits))


@torch.no_grad()
def unpack_signs(bits: Tensor, out: Tensor) -> None:
    """Write +1 to `out` (n,) where a bit is set and -1 where it is not."""
    signs = unpack_bits(bits)[: out.numel()]
    out.copy_(torch.where(signs, 1.0, -1.0))


def ordered_sum(values: Tensor) -> Tensor:
    """Sum (k, m) fp32 over m in the order that every implementation keeps, so that the last bit is the same.

    Elements stand in rows of 128, filled up with zeros. The rows are added one after the other; of the 128 sums, fours
    of neighbours are added as (0 + 1) + (2 + 3), and the 32 that remain by halves, 16 + 16, 8 + 8, to one.
    """
    k, m = values.shape
    rows = ceil_div(m, LANES)
    padded = torch.nn.functional.pad(values, (0, rows * LANES - m)).view(k, rows, LANES)
    lanes = torch.zeros(k, LANES, device=values.device)
    for row in range(rows):
        lanes = lanes + padded[:, row]
    for _ in range(2):
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes.view(k)


def scales_from_sums(sums: Tensor, rescued: Tensor, counts: Tensor, squared: bool) -> Tensor:
    """Turn sums of |c| (or c² if `squared`) over `counts` elements into scales.

    Args:
        sums: (k,) fp32.
        rescued: (k,) fp32, the same sums of c · 2⁻⁹⁶, used where the plain sum overflows; non-finite: some c is.
        counts: (k,) integer; 0 gives the scale 0.
        squared: the scale is the root of the mean square.

    Returns:
        (k,) fp32; NaN where some element is not finite.
    """
    n = counts.clamp(min=1).float()
    plain, scaled = sums / n, rescued / n
    if squared:
        # torch's fp32 root on the CPU is not correctly rounded; the fp64 one, rounded to fp32, is.
        plain, scaled = plain.double().sqrt().float(), scaled.double().sqrt().float()
    large = torch.where(rescued.isfinite(), (scaled * (1 / RESCUE)).clamp(max=LARGEST), torch.nan)
    return torch.where(counts == 0, 0.0, torch.where(sums.isfinite(), plain, large))


def shared_scales(sums: Tensor, rescued: Tensor, counts: Tensor, groups: Groups, squared: bool) -> Tensor:
    """Give all blocks of a group the scale of their union; arguments as for `scales_from_sums`, one entry a block."""
    scales = torch.zeros_like(sums)
    for group in groups:
        blocks = torch.as_tensor(group, device=sums.device)
        total, large = ordered_sum(torch.stack([sums[blocks], rescued[blocks]]))
        count = counts[blocks].sum()
        scales[blocks] = scales_from_sums(total[None], large[None], count[None], squared)
    return scales


def _quantize(
    values: Tensor,
    residual: Tensor | None,
    real: Tensor,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    squared: bool,
    groups: Groups | None,
) -> None:
    """Finish encode and reduce_encode: `values` is flat and padded, `real` (blocks, block_size) bool."""
    blocks = real.shape[0]
    live = real if mask is None else real & ~unpack_bits(mask).view(real.shape)
    old = torch.zeros_like(values)
    if residual is not None:
        held = min(residual.numel(), old.numel())
        old[:held] = residual[:held]
    c = torch.where(live, (values + old).view(live.shape), 0.0)
    terms, rescued = (c * c, (c * RESCUE) * (c * RESCUE)) if squared else (c.abs(), (c * RESCUE).abs())
    sums, large, counts = ordered_sum(terms), ordered_sum(rescued), live.sum(1)
    if groups is None:
        scales = scales_from_sums(sums, large, counts, squared)
    else:
        scales = shared_scales(sums, large, counts, groups, squared)
    positive = c >= 0
    step = torch.where(positive, scales[:, None], -scales[:, None])
    kept = scales.isnan()[:, None] | ~real
    new = torch.where(kept, old.view(live.shape), torch.where(live, c - step, 0.0))
    if residual is not None:
        residual[:held] = new.view(-1)[:held]
    payloads = out.shape[0]
    bits_bytes = blocks // payloads * layout.block_size // 8
    out[:, :bits_bytes] = pack_bits((positive & live).view(-1)).view(payloads, bits_bytes)
    scale_bytes = scales.view(payloads, -1).view(torch.uint8)
    out[:, layout.bits_bytes : layout.bits_bytes + scale_bytes.shape[1]] = scale_bytes


def _mean(payloads: Tensor, layout: Layout) -> Tensor:
    """(chunk_blocks, block_size) fp32: the mean of what payloads (ranks, payload_bytes) of one chunk decode to."""
    ranks = payloads.shape[0]
    values = torch.full((layout.chunk_blocks, layout.block_size), -0.0, device=payloads.device)  # -0.0 + x is x
    for rank in range(ranks):
        signs, scales = _sections(payloads[rank : rank + 1], layout)
        share = (scales / ranks).view(-1, 1)
        values += torch.where(signs.view(values.shape), share, -share)
    return values


def _sections(payloads: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Split (k, payload_bytes) into (k, chunk_numel) bool signs and (k, chunk_blocks) fp32 scales."""
    signs = unpack_bits(payloads[:, : layout.chunk_numel // 8].contiguous())
    return signs.view(payloads.shape[0], -1), scales_of(payloads, layout).contiguous()


def pack_bits(bits: Tensor) -> Tensor:
    """Pack (8k,) bool into (k,) uint8, little-endian."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Unpack uint8 of any shape into (8k,) bool, little-endian."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.reshape(-1, 1) >> shifts) & 1).bool().view(-1)
