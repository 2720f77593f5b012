"""Masks as the kernels take them: one bit per element of a layout, set where an element takes no part."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from onebit.compress.errors import InputError
from onebit.compress.layout import Layout
from onebit.compress.reference import pack_bits


@dataclass(frozen=True, eq=False)
class MaskedBlocks:
    """What is known of a mask block by block; tables may be kept by it, for it lives as long as the mask.

    Attributes:
        block_size: elements per block.
        clean: (blocks,) bool, all elements of a block take part.
        version: of the mask when this was found out; a tensor that is written to has another.
    """

    block_size: int
    clean: npt.NDArray[np.bool_]
    version: int


# What is known of masks, by the tensor itself: an address may be another mask's later.
_known: MutableMapping[Tensor, MaskedBlocks] = WeakIdKeyDictionary()


def pack_mask(masks: Sequence[Tensor], layout: Layout) -> Tensor | None:
    """Pack one bool tensor per tensor of `layout` into bits in its block order.

    Args:
        masks: bool, each of the shape of its tensor; True takes the element out.
        layout: from `SignCodec.plan`.

    Returns:
        (layout.padded_numel / 8,) uint8 for `mask=` of the codec, or None when no element of the layout is taken out.
        Only of this tensor itself is it known which blocks it leaves whole, and no copy.

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
    clean = ~bits.view(layout.blocks, layout.block_size).any(1).cpu().numpy()  # the host waits here, and only here
    if clean.all():
        return None
    packed = pack_bits(bits)
    if not packed.is_inference():  # such a tensor has no version
        _known[packed] = MaskedBlocks(layout.block_size, clean, packed._version)
    return packed


def masked_blocks(mask: Tensor | None, layout: Layout) -> MaskedBlocks | None:
    """Which blocks a mask leaves whole; None without a mask: all.

    Without waiting for the device that is known of what `pack_mask` has made and nobody has written to since; of any
    other mask it is said that it leaves no block whole.
    """
    if mask is None:
        return None
    known = _known.get(mask)
    shape = (layout.block_size, layout.blocks)
    if known is None or known.version != mask._version or (known.block_size, len(known.clean)) != shape:
        if "no clean block" not in layout.cache:
            layout.cache["no clean block"] = MaskedBlocks(layout.block_size, np.zeros(layout.blocks, np.bool_), 0)
        known = layout.cache["no clean block"]
    return known
