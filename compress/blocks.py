"""Between tensors and blocks, and between payloads and their two sections, in plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from onebit.compress.layout import Layout, Segment


def gathered(tensors: Sequence[Tensor], layout: Layout, device: torch.device) -> Tensor:
    """(layout.padded_numel,) fp32: the elements of tensors in block order, 0 for padding."""
    values = torch.zeros(layout.padded_numel, device=device)
    for segment in layout.segments:
        part = tensors[segment.tensor].view(-1)[segment.offset : segment.offset + segment.numel]
        values[layout.residual_span(segment)] = part.float()
    return values


def scatter(values: Tensor, tensors: Sequence[Tensor], layout: Layout) -> None:
    """Write (layout.padded_numel,) fp32 `values`, in block order, to tensors, rounded to their dtype."""
    for segment in layout.segments:
        part = tensors[segment.tensor].view(-1)[segment.offset : segment.offset + segment.numel]
        part.copy_(_rounded(values[layout.residual_span(segment)], part.dtype))


def real_elements(layout: Layout, segments: Iterable[Segment], blocks: int, device: torch.device) -> Tensor:
    """(blocks, block_size) bool: the elements that are not padding."""
    real = torch.zeros(blocks * layout.block_size, dtype=torch.bool, device=device)
    for segment in segments:
        real[layout.residual_span(segment)] = True
    return real.view(blocks, layout.block_size)


def mask_of(mask: Tensor | None, layout: Layout, chunk: int) -> Tensor | None:
    """The bits of one chunk."""
    return None if mask is None else mask[chunk * layout.chunk_numel // 8 : (chunk + 1) * layout.chunk_numel // 8]


def codes_of(payloads: Tensor, layout: Layout) -> Tensor:
    """(k, chunk_blocks · block_bytes) uint8, the codes of (k, payload_bytes) where they lie."""
    return payloads[:, : layout.chunk_blocks * layout.block_bytes]


def scales_of(payloads: Tensor, layout: Layout) -> Tensor:
    """(k, chunk_blocks) fp32, the scales of (k, payload_bytes) where they lie."""
    return payloads[:, layout.bits_bytes : layout.bits_bytes + 4 * layout.chunk_blocks].view(torch.float32)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 values; a NaN keeps its sign, where torch's has other bits, by its version and the length."""
    rounded = values.to(dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        return rounded
    upper = values.view(torch.int32) >> 16
    nans = upper | 0x0040 if dtype == torch.bfloat16 else upper & -0x8000 | 0x7E00
    return torch.where(values.isnan(), nans.to(torch.int16).view(dtype), rounded)
