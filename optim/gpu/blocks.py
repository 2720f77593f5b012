"""Which blocks of a layout a launch takes: one table per kind of tensor and per kernel that suits the block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.compress.gpu.tables import FULL_BLOCK, tables_of
from onebit.compress.layout import Layout
from onebit.compress.masks import MaskedBlocks


@dataclass(frozen=True)
class Places:
    """Blocks for one launch, as `Place` in momentum.cu.

    Attributes:
        table: (n, 2) int64 on the device: offset in its tensor, and tensor + 2³² · block, with tensor -1 for padding.
        n: how many.
        address: of the table.
    """

    table: Tensor
    n: int
    address: int


@dataclass(frozen=True)
class Group:
    """The blocks of all tensors of one kind.

    Attributes:
        kind: of its tensors.
        full: those that the fast kernels take.
        others: those that need the kernels for any block.
    """

    kind: int
    full: Places
    others: Places


def groups(
    layout: Layout,
    device: torch.device,
    kinds: npt.NDArray[np.int64],
    fast: npt.NDArray[np.bool_],
    masked: MaskedBlocks | None = None,
) -> tuple[Group, ...]:
    """Sort the blocks of a layout; the tables are kept as `tables_of` says, so a captured graph may refer to them.

    Args:
        kinds: (k,), of each tensor.
        fast: (k,), the tensor's addresses suit the fast kernels.
        masked: blocks that the fast kernels leave alone; None: there are none.
    """
    values, classes = np.unique(kinds, return_inverse=True)
    kept, key = tables_of(layout, masked), ("places", device, classes.tobytes(), fast.tobytes())
    if key not in kept:
        suited = fast[layout.tensor_of_block]
        kept[key] = _sorted(layout, device, len(values), classes, suited if masked is None else suited & masked.clean)
    made: list[tuple[Places, Places]] = kept[key]
    return tuple(Group(int(kind), *places) for kind, places in zip(values, made, strict=True))


def numels(layout: Layout, device: torch.device) -> Tensor:
    """(k,) int64 on the device: where each tensor, or the part of it that is in this layout, ends."""
    key = ("numels", device)
    if key not in layout.cache:
        ends = np.zeros(1 + max((s.tensor for s in layout.segments), default=0), np.int64)
        for s in layout.segments:
            ends[s.tensor] = max(ends[s.tensor], s.offset + s.numel)
        layout.cache[key] = _sent(ends, device)
    made: Tensor = layout.cache[key]
    return made


def _sorted(
    layout: Layout, device: torch.device, n_classes: int, classes: npt.NDArray[np.int64], suited: npt.NDArray[np.bool_]
) -> list[tuple[Places, Places]]:
    real = layout.count_of_block > 0
    tensor = layout.tensor_of_block.astype(np.int64)
    low = np.where(real, tensor, 0xFFFFFFFF) + (np.arange(layout.blocks, dtype=np.int64) << 32)
    table = np.stack([layout.offset_of_block, low], axis=1)
    full = (layout.count_of_block == FULL_BLOCK) & suited
    if layout.block_size != FULL_BLOCK or layout.shared_scale:
        full[:] = False
    of_class = [classes[tensor] == c for c in range(n_classes)]
    return [(_places(table[c & full], device), _places(table[c & ~full], device)) for c in of_class]


def _places(table: npt.NDArray[np.int64], device: torch.device) -> Places:
    sent = _sent(table, device)
    return Places(sent, len(table), sent.data_ptr())


def _sent(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """The values on a device; the host does not wait."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
