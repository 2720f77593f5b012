"""What the codecs' kernels are told of tensors and layouts, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.compress.layout import Layout

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def sizes(layout: Layout) -> tuple[int, int, int]:
    """Of a layout: blocks of a payload, bytes before its scales, bytes of it."""
    return layout.chunk_blocks, layout.bits_bytes, layout.payload_bytes


def dtype_of(tensors: Sequence[Tensor]) -> str:
    """What tensors are of, as it stands in the names of kernels."""
    return _DTYPES[tensors[0].dtype] if tensors else "f32"


def address(tensor: Tensor | None) -> int:
    """Where a tensor starts; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def chunk_mask(mask: Tensor | None, layout: Layout, chunk: int) -> int:
    """Where the bits of a chunk start in the mask of a whole layout; 0 for none."""
    return 0 if mask is None else mask.data_ptr() + chunk * layout.chunk_numel // 8
