"""What is known of a mask's blocks: right, forgotten with the mask, and never taken for what is known of another."""

from __future__ import annotations

import copy
import gc

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebit.compress.gpu.tables import chunk_entries, entries
from onebit.compress.layout import Layout, plan
from onebit.compress.masks import masked_blocks, pack_mask
from tests.compress import oracle

CPU = torch.device("cpu")


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
    st.sampled_from([32, 96, None]),
    st.integers(1, 3),
    st.integers(1, 400),
)
def test_a_block_is_clean_if_no_bit_of_it_is_set(
    numels: list[int], block_size: int | None, chunks: int, every: int
) -> None:
    (layout,) = plan(numels, block_size, chunks)
    mask = pack_mask([torch.arange(n) % every == every // 2 for n in numels], layout)
    if mask is not None:
        known = masked_blocks(mask, layout)
        assert known is not None
        assert masked_blocks(None, layout) is None
        bits = oracle.unpack(mask.numpy()).reshape(layout.blocks, layout.block_size)
        assert np.array_equal(known.clean, ~bits.astype(bool).any(1))
        assert not known.clean.all(), "there would be no mask"


def masked() -> tuple[Layout, torch.Tensor, torch.Tensor]:
    """A layout of 4 blocks of one tensor of 3072 elements in 2 chunks, the tensor, and a mask in its second block."""
    (layout,) = plan([3072], 1024, 2)
    mask = pack_mask([torch.arange(3072) == 1500], layout)
    assert mask is not None
    return layout, torch.zeros(3072), mask


def clean_blocks(mask: torch.Tensor, layout: Layout) -> int:
    known = masked_blocks(mask, layout)
    assert known is not None
    assert known is masked_blocks(mask, layout), "tables are kept by it"
    assert len(known.clean) == layout.blocks
    return int(known.clean.sum())


def test_nothing_is_known_of_copies_of_masks_written_to_or_of_other_blocks() -> None:
    layout, _, mask = masked()
    assert clean_blocks(mask, layout) == 3
    for other in (mask.clone(), mask.view(-1), copy.deepcopy(mask)):
        assert clean_blocks(other, layout) == 0
    for numel, block_size in ((2048, 512), (8192, 1024)):
        assert clean_blocks(mask, plan([numel], block_size, 2)[0]) == 0
    mask[300] = 1
    assert clean_blocks(mask, layout) == 0


def test_masks_made_in_inference_mode_work_without_being_known() -> None:
    with torch.inference_mode():
        layout, x, mask = masked()
        assert clean_blocks(mask, layout) == 0
        split = entries(layout, [x], CPU, mask)
    assert (split.full.n, split.masked.n, split.rest.n) == (0, 3, 1)


def test_tables_leave_out_masked_blocks_and_go_with_the_mask() -> None:
    layout, x, mask = masked()
    counts = {}
    for name, given_mask in (("no mask", None), ("mask", mask), ("copy of it", mask.clone())):
        splits = [entries(layout, [x], CPU, given_mask), *(chunk_entries(layout, c, CPU, given_mask) for c in range(2))]
        counts[name] = [(split.full.n, split.masked.n, split.rest.n) for split in splits]
    assert counts == {
        "no mask": [(3, 0, 1), (2, 0, 0), (1, 0, 1)],
        "mask": [(2, 1, 1), (1, 1, 0), (1, 0, 1)],
        "copy of it": [(0, 3, 1), (0, 2, 0), (0, 1, 1)],
    }
    split = entries(layout, [x], CPU, mask)
    assert entries(layout, [x], CPU, mask) is split, "kept while the mask lives"
    for found, blocks in ((split.full, [0, 2]), (split.others, [1, 3]), (split.masked, [1]), (split.rest, [3])):
        assert [int(row) >> 32 for row in found.table[:, 1]] == blocks
        assert found.address == found.table.data_ptr()
    of_masks = layout.cache["tables of masks"]
    assert len(of_masks) == 2, "this one, and any that nothing is known of"
    del mask, given_mask, split, splits
    gc.collect()
    assert len(of_masks) == 1
