"""Slices of a node's ranks: every element is in one of them, they are whole blocks, together they are the tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.comm.levels import Levels, find_levels
from onebit.comm.slice_rows import copy_all
from onebit.comm.slices import Slices
from onebit.comm.stats import Stats
from onebit.compress import SignCodec
from tests.comm.samples import NUMELS, bits, normal, sample

CODEC = SignCodec(block_size=64)
SIZES = [(4, 2), (6, 3), (3, 3)]  # ranks, ranks of a node


def dealt(backend: Backend, node: int, bucket_mb: float, stats: Stats | None = None) -> Slices:
    levels = find_levels(backend, node, "test")
    assert isinstance(levels, Levels)
    return Slices(NUMELS, CODEC, bucket_mb, levels, stats)


@pytest.mark.parametrize("bucket_mb", [2.0**-9, 1.0])
@pytest.mark.parametrize(("ranks", "node"), SIZES)
def test_every_element_is_in_one_slice_of_a_node_and_slices_begin_on_blocks(
    ranks: int, node: int, bucket_mb: float
) -> None:
    found = run_threads(ranks, lambda backend: dealt(backend, node, bucket_mb).spans)
    for first in range(0, ranks, node):
        held = [torch.zeros(numel, dtype=torch.int64) for numel in NUMELS]
        for spans in found[first : first + node]:
            assert spans == sorted(spans)
            for tensor, offset, numel in spans:
                assert offset % CODEC.block_size == 0  # type: ignore[operator]
                held[tensor][offset : offset + numel] += 1
        assert all(bool((h == 1).all()) for h in held)
    assert found == found[:node] * (ranks // node)


@pytest.mark.parametrize("bucket_mb", [2.0**-9, 1.0])
@pytest.mark.parametrize(("ranks", "node"), SIZES)
def test_slices_that_were_cut_are_the_tensors_again_in_every_dtype(ranks: int, node: int, bucket_mb: float) -> None:
    def there_and_back(backend: Backend) -> tuple[list[bytes], Stats]:
        stats = Stats()
        slices = dealt(backend, node, bucket_mb, stats)
        tensors = [sample(i, 0, 0) for i in range(len(NUMELS))]
        some = [i for i in range(len(NUMELS)) if i % 5 != 1]  # the others are not asked for
        out = {i: torch.full((t.numel(),), 7, dtype=t.dtype) for i, t in enumerate(tensors) if i in some}
        slices.gather({i: slices.cut(i, tensors[i]) for i in some}, out)
        assert bits(list(out.values())) == bits([tensors[i] for i in some])
        return bits(list(out.values())), stats

    for _, stats in run_threads(ranks, there_and_back):
        assert stats.wire_bytes == stats.local_bytes > 0
        assert stats.collectives > 1 if bucket_mb < 1 else stats.collectives == 1


@pytest.mark.parametrize("made_for", [torch.bfloat16, torch.float32])
def test_rows_of_wider_numbers_than_the_memory_was_shared_for_come_whole(made_for: torch.dtype) -> None:
    def there(backend: Backend) -> None:
        slices = dealt(backend, 2, 2.0**-9)
        memory = slices.share_rows(dict(enumerate(torch.zeros(n, dtype=made_for) for n in NUMELS)))
        tensors = {i: normal(i, numel=n) for i, n in enumerate(NUMELS)}
        pieces = slices.pieces({i: slices.cut(i, t) for i, t in tensors.items()})
        out = {i: torch.zeros_like(t) for i, t in tensors.items()}
        for row, runs in zip(slices.rows(tensors, memory), pieces, strict=True):
            copy_all(row.open(), runs)
            row.exchange()
            row.write(out)
        assert bits(list(out.values())) == bits(list(tensors.values()))

    run_threads(4, there)


@pytest.mark.parametrize("masked", [False, True])
def test_a_slice_of_what_an_average_brings_is_a_slice_of_what_it_decodes_to(masked: bool) -> None:
    def average(backend: Backend) -> None:
        tensors: list[Any] = [normal(backend.rank, i, numel=n) for i, n in enumerate(NUMELS)]
        reduce = CompressedAllreduce(tensors, backend, CODEC, local_group=2, bucket_mb=2.0**-9)
        reduce.set_mask([torch.arange(n) % 3 == 0 for n in NUMELS] if masked else None)
        reduce(tensors)
        slices = dealt(backend, 2, 2.0**-9)
        got = slices.decode(CODEC.unchecked(torch.device("cpu")), reduce.parts)
        assert bits(got) == bits([slices.cut(i, t) for i, t in enumerate(tensors)])

    run_threads(4, average)
