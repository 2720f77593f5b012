"""A floor under the frozen variance, so that an entry far below its neighbours is not thrown about by their scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.compress.reference import ordered_sum

_BLOCK = 1024  # where all blocks of a tensor share a scale
_AT_ONCE = 1 << 22  # elements; what a larger tensor needs on the way stays small


def raise_small_variances(variances: Sequence[Tensor], fraction: float, block_size: int | None) -> None:
    """Raise √v of every entry to `fraction` of the mean √v of its block, in place; an entry of 0 is dead and stays 0.

    After a compressed average the momentum of an entry is plus or minus the scale of its block, whatever its own size
    is. With √v of a hundredth of its neighbours' the entry would move at a hundred times the learning rate, now up, now
    down. The floor bounds that by about 1 / `fraction`, and leaves the sum of what an entry is told as it is.

    Args:
        variances: fp32, any strides.
        fraction: of the mean over the entries that are not 0; 0: nothing is done.
        block_size: elements in row-major order that share a scale; None: blocks of 1024.
    """
    size = _BLOCK if block_size is None else block_size
    for v in variances if fraction else ():
        flat = v.contiguous().view(-1)
        step = max(_AT_ONCE // size, 1) * size
        for start in range(0, flat.numel(), step):
            _raise(flat[start : start + step], fraction, size)
        if flat.data_ptr() != v.data_ptr():
            v.copy_(flat.view(v.shape))


def _raise(part: Tensor, fraction: float, size: int) -> None:
    blocks = torch.nn.functional.pad(part, (0, -part.numel() % size)).view(-1, size)
    live = blocks > 0
    # fp64 roots rounded once and an order of sums that is fixed: every rank must get the same bits on any processor.
    total = ordered_sum(blocks.double().sqrt().float())
    least = (total / live.sum(1).clamp(min=1) * fraction).square_().unsqueeze(1)
    part.copy_(torch.where(live, blocks.maximum(least), blocks).view(-1)[: part.numel()])
