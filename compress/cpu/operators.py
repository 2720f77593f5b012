"""The CPU entries of the operator table: tensors in, addresses out to the compiled loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.compress import reference
from onebit.compress.cpu import kernels
from onebit.compress.cpu.block import F32
from onebit.compress.cpu.launch import CODES, address, addresses, launch
from onebit.compress.layout import Layout, ceil_div
from onebit.compress.reference import Groups

name = "cpu"

STREAM_BYTES = 1 << 22  # an output of this size does not stay in the cache anyway, so it is written past it


def encode(
    tensors: Sequence[Tensor], residual: Tensor | None, mask: Tensor | None, out: Tensor, layout: Layout, squared: bool
) -> None:
    """As `reference.encode`."""
    bases = addresses(tensors)
    sums = np.zeros((layout.blocks if layout.shared_scale else 0, 3), np.float32)

    def run(stage: int) -> None:
        launch(
            kernels.encode_blocks,
            layout.blocks,
            layout.block_size,
            bases.ctypes.data,
            layout.tensor_of_block.ctypes.data,
            layout.offset_of_block.ctypes.data,
            layout.count_of_block.ctypes.data,
            _code(tensors),
            address(residual),
            address(mask),
            out.data_ptr(),
            layout.chunk_blocks,
            layout.bits_bytes,
            layout.payload_bytes,
            layout.block_size,
            squared,
            stage,
            sums.ctypes.data,
        )

    visit_blocks(run, out.view(layout.chunks, -1), sums, layout, layout.scale_groups(), squared)


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
    first = chunk * layout.chunk_blocks
    counts = layout.count_of_block[first : first + layout.chunk_blocks]
    masked = None if mask is None else mask[chunk * layout.chunk_numel // 8 :]
    sums = np.zeros((layout.chunk_blocks if layout.shared_scale else 0, 3), np.float32)

    def run(stage: int) -> None:
        launch(
            kernels.reduce_encode_blocks,
            layout.chunk_blocks,
            layout.block_size,
            payloads.data_ptr(),
            payloads.shape[0],
            counts.ctypes.data,
            address(residual),
            address(masked),
            out.data_ptr(),
            layout.bits_bytes,
            layout.payload_bytes,
            layout.block_size,
            squared,
            stage,
            sums.ctypes.data,
        )

    visit_blocks(run, out.view(1, -1), sums, layout, layout.scale_groups(chunk), squared)


undo_reduce = reference.undo_reduce  # only for a step that is not made
all_finite = reference.all_finite


def decode(payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout, squared: bool) -> None:
    """As `reference.decode`."""
    bases = addresses(tensors)
    written = layout.padded_numel * (tensors[0].element_size() if tensors else 0)
    launch(
        kernels.decode_blocks,
        layout.blocks,
        layout.block_size,
        payloads.data_ptr(),
        bases.ctypes.data,
        layout.tensor_of_block.ctypes.data,
        layout.offset_of_block.ctypes.data,
        layout.count_of_block.ctypes.data,
        _code(tensors),
        address(mask),
        layout.chunk_blocks,
        layout.bits_bytes,
        layout.payload_bytes,
        layout.block_size,
        written >= STREAM_BYTES,
    )


def pack_signs(x: Tensor, out: Tensor) -> None:
    """As `reference.pack_signs`."""
    words = ceil_div(x.numel(), 32)
    launch(kernels.pack_words, words, 32, x.data_ptr(), _code([x]), x.numel(), out.data_ptr())


def unpack_signs(bits: Tensor, out: Tensor) -> None:
    """As `reference.unpack_signs`."""
    words = ceil_div(out.numel(), 32)
    launch(kernels.unpack_words, words, 32, bits.data_ptr(), out.data_ptr(), _code([out]), out.numel())


def visit_blocks(
    run: Callable[[int], None],
    payloads: Tensor,
    sums: npt.NDArray[np.float32],
    layout: Layout,
    groups: Groups,
    squared: bool,
) -> None:
    """Visit every block once; or, where blocks share a scale, twice: for their sums, then with the scales."""
    if not layout.shared_scale:
        run(kernels.FUSED)
        return
    run(kernels.SUMS_ONLY)
    counts = torch.from_numpy(sums[:, 2].copy().view(np.int32))
    plain, rescued = torch.from_numpy(sums[:, 0].copy()), torch.from_numpy(sums[:, 1].copy())
    scales = reference.shared_scales(plain, rescued, counts, groups, squared)
    section = payloads[:, layout.bits_bytes : layout.bits_bytes + 4 * layout.chunk_blocks]
    section.copy_(scales.view(payloads.shape[0], -1).view(torch.uint8))
    run(kernels.GIVEN_SCALES)


def _code(tensors: Sequence[Tensor]) -> int:
    return CODES[tensors[0].dtype] if tensors else F32
