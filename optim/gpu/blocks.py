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
        all: all of them.
        full: those that the fast kernels take.
        others: all others, which need the kernels for any block.
        masked: the first of these: the fast kernels would take them if all their elements took part.
        rest: what comes after `masked`.
    """

    kind: int
    all: Places
    full: Places
    others: Places
    masked: Places
    rest: Places


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
        masked: which blocks have elements that take no part; None: no block has.
    """
    values, classes = np.unique(kinds, return_inverse=True)
    kept, key = tables_of(layout, masked), ("places", device, classes.tobytes(), fast.tobytes())
    if key not in kept:
        kept[key] = _sorted(layout, device, len(values), classes, fast, masked)
    made: list[list[Places]] = kept[key]
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
    layout: Layout,
    device: torch.device,
    n_classes: int,
    classes: npt.NDArray[np.int64],
    fast: npt.NDArray[np.bool_],
    masked: MaskedBlocks | None,
) -> list[list[Places]]:
    real = layout.count_of_block > 0
    tensor = layout.tensor_of_block.astype(np.int64)
    low = np.where(real, tensor, 0xFFFFFFFF) + (np.arange(layout.blocks, dtype=np.int64) << 32)
    table = np.stack([layout.offset_of_block, low], axis=1)
    whole = (layout.count_of_block == FULL_BLOCK) & fast[tensor]
    if layout.block_size != FULL_BLOCK or layout.shared_scale:
        whole[:] = False
    full = whole if masked is None else whole & masked.clean
    made = []
    for number in range(n_classes):
        mine = classes[tensor] == number
        kinds = [table[mine & blocks] for blocks in (full, whole & ~full, ~whole)]
        sent, a, b = _sent(np.concatenate(kinds), device), len(kinds[0]), len(kinds[0]) + len(kinds[1])
        made.append([_places(t) for t in (sent, sent[:a], sent[a:], sent[a:b], sent[b:])])
    return made


def _places(table: Tensor) -> Places:
    return Places(table, len(table), table.data_ptr())


def _sent(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """The values on a device; the host does not wait."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
