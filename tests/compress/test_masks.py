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
        bits = oracle.unpack(mask.numpy()).reshape(layout.blocks, layout.block_size)
        assert np.array_equal(known.clean, ~bits.astype(bool).any(1))
        assert not known.clean.all(), "there would be no mask"


def masked() -> tuple[Layout, torch.Tensor, torch.Tensor]:
    """A layout of 4 blocks of one tensor of 3072 elements in 2 chunks, the tensor, and a mask in its second block."""
    (layout,) = plan([3072], 1024, 2)
    mask = pack_mask([torch.arange(3072) == 1500], layout)
    assert mask is not None
    return layout, torch.zeros(3072), mask


def test_nothing_is_known_of_copies_of_masks_written_to_or_of_other_blocks() -> None:
    layout, _, mask = masked()
    assert masked_blocks(mask, layout) is not None
    for other in (mask.clone(), mask.view(-1), copy.deepcopy(mask)):
        assert masked_blocks(other, layout) is None
    for numel, block_size in ((2048, 512), (8192, 1024)):
        assert masked_blocks(mask, plan([numel], block_size, 2)[0]) is None
    mask[300] = 1
    assert masked_blocks(mask, layout) is None


def test_masks_made_in_inference_mode_work_without_being_known() -> None:
    with torch.inference_mode():
        layout, x, mask = masked()
        assert masked_blocks(mask, layout) is None
        full, others = entries(layout, [x], CPU, mask, plain=True)
    assert (full.n, others.n) == (0, 4)


def test_tables_leave_out_masked_blocks_and_go_with_the_mask() -> None:
    layout, x, mask = masked()
    counts = {}
    for name, given_mask in (("no mask", None), ("mask", mask), ("copy of it", mask.clone())):
        found = entries(layout, [x], CPU, given_mask, plain=True)
        of_chunks = [chunk_entries(layout, chunk, CPU, given_mask, plain=True)[0].n for chunk in range(2)]
        counts[name] = (*(e.n for e in found), *of_chunks)
    assert counts == {"no mask": (3, 1, 2, 1), "mask": (2, 2, 1, 1), "copy of it": (0, 4, 0, 0)}
    full, _ = entries(layout, [x], CPU, mask, plain=True)
    assert entries(layout, [x], CPU, mask, plain=True)[0] is full, "kept while the mask lives"
    assert [int(row) >> 32 for row in full.table[:, 1]] == [0, 2]
    of_masks = layout.cache["tables of masks"]
    assert len(of_masks) == 1
    del mask, given_mask
    gc.collect()
    assert len(of_masks) == 0
