"""Masks as the kernels take them: one bit per element of a layout, set where an element takes no part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.compress.errors import InputError
from onebit.compress.layout import Layout
from onebit.compress.reference import pack_bits


def pack_mask(masks: Sequence[Tensor], layout: Layout) -> Tensor | None:
    """Pack one bool tensor per tensor of `layout` into bits in its block order.

    Args:
        masks: bool, each of the shape of its tensor; True takes the element out.
        layout: from `SignCodec.plan`.

    Returns:
        (layout.padded_numel / 8,) uint8 for `mask=` of the codec, or None when no element of the layout is taken out.

    Raises:
        InputError: a mask is not bool or has too few elements.
    """
    bits = torch.zeros(layout.padded_numel, dtype=torch.bool, device=masks[0].device if masks else None)
    for s in layout.segments:
        mask = masks[s.tensor]
        if mask.dtype != torch.bool or mask.numel() < s.offset + s.numel:
            raise InputError(
                f"a mask is a bool tensor of its tensor's size; mask {s.tensor} is {mask.dtype} with {mask.numel()} "
                "elements"
            )
        bits[layout.residual_span(s)] = mask.reshape(-1)[s.offset : s.offset + s.numel]
    return pack_bits(bits) if bool(bits.any()) else None
