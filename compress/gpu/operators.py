"""The GPU entries of the operator table: tensors in, addresses out to the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onebit.compress.gpu.arguments import address, chunk_mask, dtype_of, sizes
from onebit.compress.gpu.module import THREADS, launch
from onebit.compress.gpu.tables import chunk_entries, entries, groups, scale_sections
from onebit.compress.layout import Layout, ceil_div

name = "gpu"

_FUSED, _SUMS_ONLY, _GIVEN_SCALES = 0, 1, 2
_RANKS = (2, 4, 8)  # for which there is a reduce_encode of its own
MANY_BLOCKS = 1024  # of threads, as many as fill any device
_BYTES_OF_SUMS = 16  # per block: two fp32 sums and an int64 count


def encode(
    tensors: Sequence[Tensor], residual: Tensor | None, mask: Tensor | None, out: Tensor, layout: Layout, squared: bool
) -> None:
    """As `reference.encode`."""
    plain = residual is not None and residual.data_ptr() % 16 == 0
    split = entries(layout, tensors, out.device, mask, plain)
    rest, dtype = split.rest, dtype_of(tensors)
    for blocks, kernel in ((split.full, "encode_full"), (split.masked, "encode_masked")):
        if blocks.n:
            buffers = (address(residual), address(mask), out.data_ptr())
            arguments = (blocks.address, blocks.n, *buffers, *sizes(layout), squared)
            launch("full.cu", f"{kernel}_{dtype}", out.device, 32 * blocks.n, *arguments)

    def run(stage: int, sums: int) -> None:
        arguments = (rest.address, rest.n, address(residual), address(mask), out.data_ptr(), sums)
        shape = (*sizes(layout), layout.block_size, squared, stage)
        launch("sign.cu", f"encode_{dtype}", out.device, 32 * rest.n, *arguments, *shape)

    if layout.shared_scale:
        in_two_visits(run, layout.blocks, out, layout, squared, None)
    elif rest.n:
        run(_FUSED, 0)


def reduce_encode(
    payloads: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    squared: bool,
) -> None:
    """As `reference.reduce_encode`."""
    plain = residual is not None and residual.data_ptr() % 16 == 0
    split = chunk_entries(layout, chunk, out.device, mask, plain)
    source, rest = (payloads.data_ptr(), payloads.shape[0]), split.rest
    masked = chunk_mask(mask, layout, chunk)
    buffers = (address(residual), masked, out.data_ptr())
    full = "reduce_encode_full" + (f"_{source[1]}" if source[1] in _RANKS else "")
    for blocks, kernel in ((split.full, full), (split.masked, "reduce_encode_masked")):
        if blocks.n:
            arguments = (blocks.address, blocks.n, *buffers, *sizes(layout), squared)
            launch("full.cu", kernel, out.device, 32 * blocks.n, *source, *arguments)

    def run(stage: int, sums: int) -> None:
        arguments = (rest.address, rest.n, *buffers, sums)
        shape = (*sizes(layout), layout.block_size, squared, stage)
        launch("sign.cu", "reduce_encode", out.device, 32 * rest.n, *source, *arguments, *shape)

    if layout.shared_scale:
        in_two_visits(run, layout.chunk_blocks, out, layout, squared, chunk)
    elif rest.n:
        run(_FUSED, 0)


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
    """As `reference.undo_reduce`."""
    blocks = chunk_entries(layout, chunk, out.device, None, plain=False).others
    masked = chunk_mask(mask, layout, chunk)
    arguments = (blocks.address, blocks.n, residual.data_ptr(), masked, out.data_ptr(), address(keep))
    source = (payloads.data_ptr(), payloads.shape[0])
    shape = (*sizes(layout), layout.block_size)
    launch("undo.cu", "undo_reduce", out.device, min(32 * blocks.n, THREADS * MANY_BLOCKS), *source, *arguments, *shape)


def all_finite(payloads: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """As `reference.all_finite`."""
    device = payloads[0].device
    finite = torch.ones((), dtype=torch.bool, device=device)
    scales = scale_sections(payloads, layouts)
    parts = min(ceil_div(scales.longest, 8 * THREADS), ceil_div(MANY_BLOCKS, scales.n))
    arguments = (scales.table.data_ptr(), parts, finite.data_ptr())
    launch("finite.cu", "all_finite", device, THREADS * scales.n * parts, *arguments)
    return finite


def decode(payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout, squared: bool) -> None:
    """As `reference.decode`."""
    split, dtype = entries(layout, tensors, payloads.device, mask), dtype_of(tensors)
    full, others = split.full, split.others
    if full.n:
        arguments = (payloads.data_ptr(), full.address, full.n, *sizes(layout))
        launch("full.cu", f"decode_full_{dtype}", payloads.device, 32 * full.n, *arguments)
    if others.n:
        masked = (payloads.data_ptr(), others.address, others.n, address(mask), *sizes(layout), layout.block_size)
        launch("sign.cu", f"decode_{dtype}", payloads.device, 32 * others.n, *masked)


def pack_signs(x: Tensor, out: Tensor) -> None:
    """As `reference.pack_signs`."""
    launch("sign.cu", f"pack_{dtype_of([x])}", x.device, x.numel(), x.data_ptr(), x.numel(), out.data_ptr())


def unpack_signs(bits: Tensor, out: Tensor) -> None:
    """As `reference.unpack_signs`."""
    launch(
        "sign.cu", f"unpack_{dtype_of([out])}", out.device, out.numel(), bits.data_ptr(), out.numel(), out.data_ptr()
    )


def in_two_visits(
    run: Callable[[int, int], None], blocks: int, out: Tensor, layout: Layout, squared: bool, chunk: int | None
) -> None:
    """A scale shared by many blocks: sums of all blocks, scales of all groups, then signs."""
    sums = torch.empty(blocks * _BYTES_OF_SUMS, dtype=torch.uint8, device=out.device)
    run(_SUMS_ONLY, sums.data_ptr())
    starts, members = groups(layout, chunk, out.device)
    n = starts.numel() - 1
    arguments = (sums.data_ptr(), starts.data_ptr(), members.data_ptr(), n, out.data_ptr())
    shape = (*sizes(layout), layout.block_size, squared, _SUMS_ONLY)
    launch("sign.cu", "shared_scales", out.device, 32 * n, *arguments, *shape)
    run(_GIVEN_SCALES, sums.data_ptr())
