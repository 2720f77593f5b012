"""The GPU entries of the quantizing codecs' operators: tensors in, addresses out to the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from onebit.compress.gpu.arguments import address, chunk_mask, dtype_of, sizes
from onebit.compress.gpu.module import THREADS, launch
from onebit.compress.gpu.operators import MANY_BLOCKS, all_finite
from onebit.compress.gpu.tables import chunk_entries, entries
from onebit.compress.layout import Layout
from onebit.compress.quantizer import Quantizer

__all__ = ["all_finite", "decode", "encode", "reduce_encode", "undo_reduce"]

name = "gpu"


def encode(
    tensors: Sequence[Tensor], residual: Tensor | None, mask: Tensor | None, out: Tensor, layout: Layout, how: Quantizer
) -> None:
    """As `quantized_reference.encode`."""
    split, dtype = entries(layout, tensors, out.device, mask, _aligned(residual)), dtype_of(tensors)
    full, others = split.full, split.others
    if full.n:
        arguments = (full.address, full.n, address(residual), out.data_ptr(), *sizes(layout), *_rounding(how))
        launch(_source(how), f"encode_full_{dtype}", out.device, 32 * full.n, *arguments)
    if others.n:
        buffers = (others.address, others.n, address(residual), address(mask), out.data_ptr())
        shape = (*sizes(layout), layout.block_size, *_rounding(how))
        launch(_source(how), f"encode_{dtype}", out.device, 32 * others.n, *buffers, *shape)


def reduce_encode(
    payloads: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    how: Quantizer,
) -> None:
    """As `quantized_reference.reduce_encode`."""
    split = chunk_entries(layout, chunk, out.device, mask, _aligned(residual))
    full, others, source = split.full, split.others, (payloads.data_ptr(), payloads.shape[0])
    if full.n:
        arguments = (full.address, full.n, address(residual), out.data_ptr(), *sizes(layout), *_rounding(how))
        launch(_source(how), "reduce_encode_full", out.device, 32 * full.n, *source, *arguments)
    if others.n:
        buffers = (others.address, others.n, address(residual), chunk_mask(mask, layout, chunk), out.data_ptr())
        shape = (*sizes(layout), layout.block_size, *_rounding(how))
        launch(_source(how), "reduce_encode", out.device, 32 * others.n, *source, *buffers, *shape)


def undo_reduce(
    payloads: Tensor,
    residual: Tensor,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    chunk: int,
    keep: Tensor | None,
    how: Quantizer,
) -> None:
    """As `quantized_reference.undo_reduce`."""
    blocks = chunk_entries(layout, chunk, out.device, None, plain=False).others
    source = (payloads.data_ptr(), payloads.shape[0])
    buffers = (residual.data_ptr(), chunk_mask(mask, layout, chunk), out.data_ptr(), address(keep))
    arguments = (*source, blocks.address, blocks.n, *buffers, *sizes(layout), layout.block_size)
    launch(_source(how), "undo_reduce", out.device, min(32 * blocks.n, THREADS * MANY_BLOCKS), *arguments)


def decode(payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout, how: Quantizer) -> None:
    """As `quantized_reference.decode`."""
    split, dtype = entries(layout, tensors, payloads.device, mask), dtype_of(tensors)
    full, others = split.full, split.others
    if full.n:
        arguments = (payloads.data_ptr(), full.address, full.n, *sizes(layout))
        launch(_source(how), f"decode_full_{dtype}", payloads.device, 16 * full.n, *arguments)
    if others.n:
        masked = (payloads.data_ptr(), others.address, others.n, address(mask), *sizes(layout), layout.block_size)
        launch(_source(how), f"decode_{dtype}", payloads.device, 32 * others.n, *masked)


def _source(how: Quantizer) -> str:
    """The file of the kernels of a format; those of blocks that are rotated are compiled where there are any."""
    return f"quantized_{how.format}{'_rotated' if how.rotate else ''}.cu"


def _rounding(how: Quantizer) -> tuple[int, int]:
    return int(how.stochastic), how.seed


def _aligned(residual: Tensor | None) -> bool:
    return residual is None or residual.data_ptr() % 16 == 0
