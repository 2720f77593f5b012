"""A plan gives every element exactly one place, the same wherever its tensor stands."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebit.compress import InputError, Layout, SignCodec
from onebit.compress.layout import Segment, plan
from onebit.compress.masks import pack_mask
from tests.compress import oracle, samples

Sizes = list[int]

SHARED = 1024  # elements per block where a tensor has one scale

sizes = st.lists(samples.numels() | st.integers(0, 70_000), max_size=6)
block_sizes = st.sampled_from((32, 64, 96, 1024, None))
chunk_counts = st.integers(1, 9)
bucket_numels = st.none() | st.integers(1, 100_000)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


@given(sizes, block_sizes, chunk_counts, bucket_numels)
def test_every_element_has_exactly_one_place(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    layouts = plan(numels, block_size, chunks, bucket_numel)
    assert layouts
    seen = [np.zeros(n, int) for n in numels]
    for layout in layouts:
        taken = np.zeros(layout.padded_numel, int)
        for s in layout.segments:
            assert s.numel > 0
            seen[s.tensor][s.offset : s.offset + s.numel] += 1
            span = layout.residual_span(s)
            assert span.stop <= layout.padded_numel
            taken[span] += 1
        assert taken.max(initial=0) <= 1, "two segments overlap"
        assert taken.sum() == layout.numel
    assert all((count == 1).all() for count in seen)


@given(sizes, block_sizes, chunk_counts, bucket_numels)
def test_a_block_belongs_to_one_tensor_and_starts_at_a_multiple_of_its_size(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    for layout in plan(numels, block_size, chunks, bucket_numel):
        owner: dict[int, int] = {}
        for s in layout.segments:
            assert s.offset % layout.block_size == 0
            ends_tensor = s.offset + s.numel == numels[s.tensor]
            assert ends_tensor or s.numel % layout.block_size == 0
            for block in range(s.block, s.block + ceil(s.numel, layout.block_size)):
                assert owner.setdefault(block, s.tensor) == s.tensor
                assert block < layout.blocks


@given(sizes, block_sizes, chunk_counts)
def test_one_bucket_is_dealt_to_the_chunks_as_the_design_says(
    numels: Sizes, block_size: int | None, chunks: int
) -> None:
    (layout,) = plan(numels, block_size, chunks)
    shape = oracle.geometry(numels, block_size, chunks)
    assert layout.chunk_blocks == shape.chunk_blocks
    assert layout.payload_bytes == shape.payload_bytes
    assert layout.bits_bytes == shape.scales_start
    places: list[oracle.Block] = [oracle.PADDING] * layout.blocks
    for s in layout.segments:
        for i in range(ceil(s.numel, layout.block_size)):
            start = s.offset + i * layout.block_size
            stop = min(start + layout.block_size, s.offset + s.numel)
            places[s.block + i] = oracle.Block(s.tensor, start, stop)
    assert places == shape.blocks


@given(sizes, block_sizes, chunk_counts, bucket_numels)
def test_the_tables_say_what_the_segments_say(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    for layout in plan(numels, block_size, chunks, bucket_numel):
        counts = np.zeros(layout.blocks, int)
        for s in layout.segments:
            for i in range(ceil(s.numel, layout.block_size)):
                counts[s.block + i] = min(layout.block_size, s.numel - i * layout.block_size)
                assert layout.tensor_of_block[s.block + i] == s.tensor
                assert layout.offset_of_block[s.block + i] == s.offset + i * layout.block_size
        np.testing.assert_array_equal(layout.count_of_block, counts)
        assert layout.tensor_of_block.dtype == layout.count_of_block.dtype == np.int32
        assert layout.offset_of_block.dtype == np.int64
        assert not layout.offset_of_block[counts == 0].any(), "padding points nowhere"
        assert not layout.tensor_of_block[counts == 0].any()


@given(sizes, st.sampled_from((32, 64, 1024)), chunk_counts, st.integers(1, 100_000))
def test_a_bucket_is_at_most_what_was_asked_for_rounded_up_to_a_block_for_each_chunk(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    layouts = plan(numels, block_size, chunks, bucket_numel)
    asked = max(bucket_numel // block_size, 1)
    total = sum(ceil(n, block_size) for n in numels)
    for layout in layouts:
        assert layout.blocks <= ceil(asked, chunks) * chunks
        filled = sum(ceil(s.numel, block_size) for s in layout.segments)
        assert layout.blocks - filled < (chunks if layout is layouts[-1] else 1), "only the last bucket is padded"
    assert len(layouts) <= max(1, ceil(total, max(bucket_numel // block_size, chunks))), "no more buckets than needed"
    assert len({layout.blocks for layout in layouts[:-1]}) <= 1, "all but the last are of one size"


@given(sizes, chunk_counts, st.integers(1, 100_000))
def test_a_tensor_with_one_scale_is_in_one_bucket_and_every_chunk_has_its_part(
    numels: Sizes, chunks: int, bucket_numel: int | None
) -> None:
    layouts = plan(numels, None, chunks, bucket_numel)
    home: dict[int, int] = {}
    for b, layout in enumerate(layouts):
        assert layout.shared_scale
        assert layout.block_size == SHARED
        tensors = {s.tensor for s in layout.segments}
        assert layout.numel <= bucket_numel or len(tensors) == 1
        for s in layout.segments:
            assert home.setdefault(s.tensor, b) == b
            assert s.block // layout.chunk_blocks == (s.block + ceil(s.numel, SHARED) - 1) // layout.chunk_blocks
        for tensor in tensors:
            per_chunk = [0] * chunks
            for s in layout.segments:
                if s.tensor == tensor:
                    assert not per_chunk[s.block // layout.chunk_blocks], "one segment a chunk"
                    per_chunk[s.block // layout.chunk_blocks] = ceil(s.numel, SHARED)
            assert max(per_chunk) - min(per_chunk) <= 1, "parts differ by a block at most"
    assert set(home) == {t for t, n in enumerate(numels) if n}


@given(sizes, block_sizes, chunk_counts, bucket_numels)
def test_chunks_share_the_segments_out(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    for layout in plan(numels, block_size, chunks, bucket_numel):
        places = {}
        for chunk in range(chunks):
            for s in layout.chunk_segments(chunk):
                assert s.block >= 0
                assert s.block + ceil(s.numel, layout.block_size) <= layout.chunk_blocks
                for i in range(s.numel):
                    if i % layout.block_size == 0:
                        block = chunk * layout.chunk_blocks + s.block + i // layout.block_size
                        places[block] = (s.tensor, s.offset + i)
            assert layout.residual_span(Segment(0, 0, 5, layout.chunk_blocks)).start == layout.chunk_numel
        expected = {
            s.block + i: (s.tensor, s.offset + i * layout.block_size)
            for s in layout.segments
            for i in range(ceil(s.numel, layout.block_size))
        }
        assert places == expected


@given(sizes, block_sizes, chunk_counts, bucket_numels)
def test_scale_groups_are_the_blocks_of_each_tensor(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    for layout in plan(numels, block_size, chunks, bucket_numel):
        for chunk in (None, *range(chunks)):
            first, count = (0, layout.blocks) if chunk is None else (chunk * layout.chunk_blocks, layout.chunk_blocks)
            filled = np.flatnonzero(layout.count_of_block[first : first + count])
            groups = list(layout.scale_groups(chunk))
            assert sorted(b for group in groups for b in group) == list(filled)
            owners = [{int(layout.tensor_of_block[first + b]) for b in group} for group in groups]
            assert all(len(owner) == 1 for owner in owners)
            assert len(set.union(set(), *owners)) == len(groups)


@given(sizes, block_sizes, chunk_counts, bucket_numels)
def test_sections_are_aligned_and_sum_up(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    for layout in plan(numels, block_size, chunks, bucket_numel):
        used = layout.chunk_numel // 8 + 4 * layout.chunk_blocks
        assert layout.bits_bytes % 16 == 0
        assert layout.payload_bytes % 16 == 0
        assert sum(s.stop - s.start for s in layout.spare_bytes) == layout.payload_bytes - used
        assert layout.payload_bytes - used < 32
        assert layout.padded_numel == layout.blocks * layout.block_size == chunks * layout.chunk_numel


@given(sizes, block_sizes, chunk_counts, bucket_numels)
def test_a_layout_of_the_used_tensors_alone_places_them_the_same(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    for layout in plan(numels, block_size, chunks, bucket_numel):
        alone, used = layout.of_used_tensors()
        assert list(used) == sorted({s.tensor for s in layout.segments})
        assert alone.payload_bytes == layout.payload_bytes
        assert [dataclasses.replace(s, tensor=used[s.tensor]) for s in alone.segments] == list(layout.segments)


@given(sizes, block_sizes, chunk_counts, bucket_numels, st.data())
def test_a_layout_by_segment_takes_flat_pieces(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None, data: st.DataObject
) -> None:
    for layout in plan(numels, block_size, chunks, bucket_numel):
        chunk = data.draw(st.none() | st.integers(0, chunks - 1))
        pieces = layout.by_segment(chunk)
        segments = list(layout.segments if chunk is None else layout.chunk_segments(chunk))
        assert pieces.payload_bytes == layout.payload_bytes
        assert pieces.chunks == (chunks if chunk is None else 1)
        assert [(s.tensor, s.offset) for s in pieces.segments] == [(i, 0) for i in range(len(segments))]
        assert [(s.numel, s.block) for s in pieces.segments] == [(s.numel, s.block) for s in segments]


@given(sizes, block_sizes, chunk_counts, bucket_numels)
def test_a_plan_depends_on_its_arguments_alone(
    numels: Sizes, block_size: int | None, chunks: int, bucket_numel: int | None
) -> None:
    codec = SignCodec(block_size=block_size)
    first = codec.plan(numels, chunks, bucket_numel)
    assert first == plan(tuple(numels), block_size, chunks, bucket_numel)
    assert first == codec.plan([torch.empty(n, device="meta") for n in numels], chunks, bucket_numel)


@pytest.mark.parametrize("block_size", [1024, None])
def test_more_than_2_to_the_31_elements_have_their_places(block_size: int | None) -> None:
    numels = [5, 2**31 + 2049, 7]
    layouts = plan(numels, block_size, chunks=3)
    (layout,) = layouts
    assert layout.numel == sum(numels)
    assert int(layout.count_of_block.sum(dtype=np.int64)) == sum(numels)
    big = layout.tensor_of_block == 1
    assert int(layout.offset_of_block[big].max()) == 2**31 + 2048
    assert np.all(np.diff(layout.offset_of_block[big]) == 1024)
    assert int(big.sum()) == ceil(numels[1], 1024)
    assert layout.payload_bytes * 3 == pytest.approx(sum(numels) * (1 / 8 + 4 / 1024), rel=1e-5)


@given(st.lists(samples.numels(), min_size=1, max_size=4), block_sizes, chunk_counts, st.integers(0, 99))
def test_a_mask_of_bools_is_packed_to_where_its_elements_are(
    numels: Sizes, block_size: int | None, chunks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(n, generator=generator) < 0.4 for n in numels]
    (layout,) = plan(numels, block_size, chunks)
    packed = pack_mask(masks, layout)
    if packed is None:
        assert not any(mask.any() for mask in masks)
        return
    bits = torch.from_numpy(oracle.unpack(packed.numpy()))
    assert bits.numel() == layout.padded_numel
    for s in layout.segments:
        assert torch.equal(bits[layout.residual_span(s)], masks[s.tensor][s.offset : s.offset + s.numel])
    assert int(bits.sum()) == sum(int(mask.sum()) for mask in masks), "padding is not marked"


def test_a_mask_that_is_not_bool_or_too_small_is_refused() -> None:
    (layout,) = plan([10], 32)
    with pytest.raises(InputError, match="bool"):
        pack_mask([torch.zeros(10, dtype=torch.uint8)], layout)
    with pytest.raises(InputError, match="9 elements"):
        pack_mask([torch.zeros(9, dtype=torch.bool)], layout)


@given(samples.codecs(), st.lists(samples.numels(), max_size=3), chunk_counts, st.data())
def test_all_finite_reads_scales_and_nothing_else(
    codec: SignCodec, numels: Sizes, chunks: int, data: st.DataObject
) -> None:
    (layout,) = codec.plan(numels, chunks)
    payloads = torch.full((chunks, layout.payload_bytes), 0xFF, dtype=torch.uint8)  # as scales, all NaN
    payloads[:, layout.bits_bytes : layout.bits_bytes + 4 * layout.chunk_blocks] = 0
    assert codec.all_finite(payloads, layout).item() is True
    if layout.blocks:
        chunk, block = data.draw(st.tuples(st.integers(0, chunks - 1), st.integers(0, layout.chunk_blocks - 1)))
        at = layout.bits_bytes + 4 * block
        poison = torch.tensor([data.draw(st.sampled_from(samples.NON_FINITE))])
        payloads[chunk, at : at + 4] = poison.view(torch.uint8)
        assert codec.all_finite(payloads, layout).item() is False
        assert codec.all_finite(payloads.view(-1), layout).item() is False


def test_a_layout_can_be_compared_and_hashed() -> None:
    a, b = plan([100, 5], 32, 2), plan([100, 5], 32, 2)
    assert a == b
    assert hash(a) == hash(b)
    assert isinstance(a[0], Layout)
