"""The quantizing codecs on CPU tensors: tensors in, addresses out to the compiled loops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from onebit.compress import quantized_reference as reference
from onebit.compress.cpu import quantized_blocks as kernels
from onebit.compress.cpu.launch import CODES, address, addresses, launch
from onebit.compress.cpu.operators import STREAM_BYTES
from onebit.compress.cpu.quantized_codes import FP8, INT4, INT8
from onebit.compress.layout import Layout
from onebit.compress.quantizer import Quantizer

name = "cpu"

FORMATS = {"int8": INT8, "int4": INT4, "fp8": FP8}


def encode(
    tensors: Sequence[Tensor],
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    how: Quantizer,
) -> None:
    """As `quantized_reference.encode`."""
    bases = addresses(tensors)
    launch(
        kernels.encode_blocks,
        layout.blocks,
        layout.block_size,
        bases.ctypes.data,
        layout.tensor_of_block.ctypes.data,
        layout.offset_of_block.ctypes.data,
        layout.count_of_block.ctypes.data,
        CODES[tensors[0].dtype],
        address(residual),
        address(mask),
        out.data_ptr(),
        layout.chunk_blocks,
        layout.bits_bytes,
        layout.payload_bytes,
        layout.block_size,
        layout.block_bytes,
        *_options(how),
    )


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
    first = chunk * layout.chunk_blocks
    counts = layout.count_of_block[first : first + layout.chunk_blocks]
    masked = None if mask is None else mask[chunk * layout.chunk_numel // 8 :]
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
        layout.block_bytes,
        *_options(how),
    )


undo_reduce = reference.undo_reduce  # only for a step that is not made
all_finite = reference.all_finite


def decode(payloads: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], layout: Layout, how: Quantizer) -> None:
    """As `quantized_reference.decode`."""
    bases = addresses(tensors)
    form, _, rotated, _ = _options(how)
    launch(
        kernels.decode_blocks,
        layout.blocks,
        layout.block_size,
        payloads.data_ptr(),
        bases.ctypes.data,
        layout.tensor_of_block.ctypes.data,
        layout.offset_of_block.ctypes.data,
        layout.count_of_block.ctypes.data,
        CODES[tensors[0].dtype],
        address(mask),
        layout.chunk_blocks,
        layout.bits_bytes,
        layout.payload_bytes,
        layout.block_size,
        layout.block_bytes,
        form,
        rotated,
        layout.padded_numel * tensors[0].element_size() >= STREAM_BYTES,
    )


def _options(how: Quantizer) -> tuple[int, int, int, int]:
    """Format, rounding, rotation and seed as the loops take them."""
    return FORMATS[how.format], how.stochastic, how.rotate, how.seed
