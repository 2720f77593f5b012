"""A layout's tables on a device: made on first use for a list of tensors, kept with the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit.compress.layout import Layout
from onebit.compress.masks import MaskedBlocks, masked_blocks

FULL_BLOCK = 1024  # real elements of the blocks that the fast kernels take
_KEPT = 8  # lists of tensors whose tables are kept per layout; a captured graph refers to those it was captured with


@dataclass(frozen=True)
class Entries:
    """Blocks for one launch: (n, 2) int64 of address and count + 2³² · block, as `Entry` in block.cuh.

    Attributes:
        table: the entries, on the device.
        n: how many.
        address: of the table.
    """

    table: Tensor
    n: int
    address: int


@dataclass(frozen=True)
class Split:
    """The blocks of one operation by the kernels that suit them.

    Attributes:
        full: those of FULL_BLOCK real elements at aligned addresses that all take part, with a scale of their own.
        others: all others, padding included.
        masked: the first of these: the same as `full` but for some elements that take no part.
        rest: what comes after `masked`.
    """

    full: Entries
    others: Entries
    masked: Entries
    rest: Entries


def entries(
    layout: Layout, tensors: Sequence[Tensor], device: torch.device, mask: Tensor | None, plain: bool = True
) -> Split:
    """The blocks of these tensors; unless `plain`, none is for the fast kernels."""
    masked = masked_blocks(mask, layout)
    addresses = tuple([t.data_ptr() for t in tensors])
    key = (plain, tensors[0].dtype if tensors else None, addresses)
    kept: dict[object, Split] = tables_of(layout, masked).setdefault(("entries", device), {})
    made = kept.get(key)
    if made is None:
        _make_room(kept)
        tensor, offset, low = _tables(layout, device)
        bases = torch.tensor(addresses or (0,), dtype=torch.int64, device=device)
        size = tensors[0].element_size() if tensors else 0
        address = bases[tensor] + size * offset
        suited = (address % 16 == 0) & plain
        made = kept[key] = _split(layout, address, low, suited, None if masked is None else masked.clean)
    return made


def chunk_entries(layout: Layout, chunk: int, device: torch.device, mask: Tensor | None, plain: bool = True) -> Split:
    """As `entries`, of one chunk, for kernels that read no tensor; `mask` is the whole layout's."""
    masked = masked_blocks(mask, layout)
    kept, key = tables_of(layout, masked), ("chunk", chunk, device, plain)
    if key not in kept:
        blocks = slice(chunk * layout.chunk_blocks, (chunk + 1) * layout.chunk_blocks)
        low = _tables(layout, device)[2][blocks]
        suited = torch.full_like(low, plain, dtype=torch.bool)
        kept[key] = _split(layout, torch.zeros_like(low), low, suited, None if masked is None else masked.clean[blocks])
    made: Split = kept[key]
    return made


def tables_of(layout: Layout, masked: MaskedBlocks | None) -> dict[object, Any]:
    """Where tables are kept: with the layout, those for a mask as long as that lives; a captured graph reads both."""
    if masked is None:
        return layout.cache
    of_masks: WeakKeyDictionary[MaskedBlocks, dict[object, Any]]
    of_masks = layout.cache.setdefault("tables of masks", WeakKeyDictionary())
    return of_masks.setdefault(masked, {})


@dataclass(frozen=True)
class ScaleSections:
    """Where the scales of a set of payloads lie.

    Attributes:
        table: (n, 2) int64 on the device: address of a payload's scales, and their number.
        n: number of payloads.
        longest: the most scales of one payload.
    """

    table: Tensor
    n: int
    longest: int


def scale_sections(payloads: Sequence[Tensor], layouts: Sequence[Layout]) -> ScaleSections:
    """The scales of these buffers, each of whole payloads of its layout; at least one has blocks."""
    device = payloads[0].device
    key = tuple([(p.data_ptr(), p.numel()) for p in payloads])
    kept: dict[object, ScaleSections] = layouts[0].cache.setdefault(("scales", device), {})
    made = kept.get(key)
    if made is None:
        _make_room(kept)
        rows = [
            (payload.data_ptr() + at + layout.bits_bytes, layout.chunk_blocks)
            for payload, layout in zip(payloads, layouts, strict=True)
            for at in (range(0, payload.numel(), layout.payload_bytes) if layout.blocks else ())
        ]
        table = torch.tensor(rows, dtype=torch.int64, device=device)
        made = kept[key] = ScaleSections(table, len(rows), max(count for _, count in rows))
    return made


def _make_room(kept: dict[object, Any]) -> None:
    """Forget the oldest tables when there are as many as are kept."""
    if len(kept) >= _KEPT:
        del kept[next(iter(kept))]


def groups(layout: Layout, chunk: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks that share a scale: group g is members[starts[g] : starts[g + 1]]; both int64."""
    key = ("groups", chunk, device)
    if key not in layout.cache:
        parts = list(layout.scale_groups(chunk))
        starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        members = np.concatenate([*parts, np.zeros(0, np.int64)])
        layout.cache[key] = tuple(torch.from_numpy(t).to(device) for t in (starts, members))
    made: tuple[Tensor, Tensor] = layout.cache[key]
    return made


def _split(layout: Layout, address: Tensor, low: Tensor, suited: Tensor, clean: npt.NDArray[np.bool_] | None) -> Split:
    """Sort blocks; suited: the fast kernels may take a block if it is whole; clean: all its elements take part."""
    if layout.block_size == FULL_BLOCK and not layout.shared_scale:
        whole = ((low & 0xFFFFFFFF) == FULL_BLOCK) & suited
    else:
        whole = torch.zeros_like(suited)
    full = whole if clean is None else whole & torch.from_numpy(clean).to(whole.device)
    table = torch.stack([address, low], dim=1)
    masked = table[whole & ~full]
    others, n = torch.cat([masked, table[~whole]]), len(masked)
    return Split(*map(_entries, (table[full], others, others[:n], others[n:])))


def _entries(table: Tensor) -> Entries:
    return Entries(table, table.shape[0], table.data_ptr())


def _tables(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks,) int64 each, on a device: tensor, offset in elements, count + 2³² · block."""
    key = ("tables", device)
    if key not in layout.cache:
        low = layout.count_of_block.astype(np.int64) + (np.arange(layout.blocks, dtype=np.int64) << 32)
        tables = (layout.tensor_of_block.astype(np.int64), layout.offset_of_block, low)
        layout.cache[key] = tuple(torch.from_numpy(t).to(device) for t in tables)
    made: tuple[Tensor, Tensor, Tensor] = layout.cache[key]
    return made
