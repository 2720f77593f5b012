"""Each rank of a node does its part of two levels, bucket by bucket, and copies nothing that can be read as it lies."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, Part, run_threads
from onebit.comm.two_level import TwoLevelBucket, TwoLevelPart
from tests.comm.nodes import CODEC, SHARED
from tests.comm.samples import SMALL_BUCKET, bits, normal, samples, state_bits


def test_a_bucket_is_decoded_before_the_next_has_come_from_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the link works on what is left meanwhile."""
    seen: dict[int, list[str]] = defaultdict(list)

    def note(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def noted(self: object, *arguments: object) -> object:
            seen[threading.get_ident()].append(name)
            return real(self, *arguments)

        monkeypatch.setattr(kind, name, noted)

    note(TwoLevelBucket, "bring_home")
    note(TwoLevelPart, "decode")

    def average(backend: Backend) -> int:
        tensors = samples(backend.rank, 0)
        reduce = CompressedAllreduce(tensors, backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET)
        reduce(tensors)
        return len(reduce.parts)

    buckets = run_threads(4, average)[0]
    assert buckets > 1
    assert list(seen.values()) == [["bring_home", "decode"] * buckets] * 4


def test_a_tensor_that_fills_its_bucket_is_sent_as_it_lies_and_not_kept(transport: str) -> None:
    def average(backend: Backend) -> bool:
        numel = 4 * 64 * 5  # blocks for every rank
        whole, pieces = (CompressedAllreduce(like, backend, CODEC, local_group=2) for like in shapes(numel))
        for call in range(2):
            x = normal(backend.rank, call, numel=numel)
            parts = [part.clone() for part in x.split(numel // 2)]
            given = x.clone()
            kept = weakref.ref(given)
            work = whole.start(given)
            work.finish()
            work.decode(x)
            del given, work
            pieces(parts)
            assert bits(torch.cat(parts)) == bits(x)
        return kept() is None

    def shapes(numel: int) -> tuple[Tensor, list[Tensor]]:
        return torch.zeros(numel), [torch.zeros(numel // 2)] * 2

    assert run_threads(4, average) == [True] * 4


def test_numbers_that_are_written_where_they_are_needed_are_averaged_as_tensors_that_are_given(transport: str) -> None:
    def average(backend: Backend) -> None:
        given, written = (
            CompressedAllreduce(samples(0, 0), backend, CODEC, local_group=2, bucket_mb=SMALL_BUCKET) for _ in range(2)
        )
        for call in range(3):
            tensors = samples(backend.rank, call)
            rows = [t.float().contiguous().view(-1) for t in tensors]

            def write(part: Part, chunks: Sequence[Tensor], rows: list[Tensor] = rows) -> None:
                layout, used = part.layout, [rows[i] for i in part.used]
                flat = torch.full((layout.padded_numel,), 7.0)  # padding is not read
                for s in layout.segments:
                    flat[layout.residual_span(s)] = used[s.tensor][s.offset : s.offset + s.numel]
                for chunk, numbers in zip(chunks, flat.view(layout.chunks, -1), strict=True):
                    chunk.copy_(numbers)

            def encode(part: Part, write: Callable[..., None] = write) -> None:
                assert isinstance(part, TwoLevelPart)
                part.fill(partial(write, part))

            out = [torch.empty_like(t) for t in tensors]
            work = written.start_with(encode)
            work.finish()
            work.decode(out)
            given(tensors)
            assert bits(out) == bits(tensors)
            assert state_bits(written.state_dict()) == state_bits(given.state_dict())

    run_threads(4, average)


def test_every_rank_keeps_and_sends_between_nodes_a_kth(transport: str) -> None:
    def average(backend: Backend) -> None:
        numel = 1 << 16
        reduce = CompressedAllreduce(torch.zeros(numel), backend, local_group=2)
        assert reduce.levels is not None
        reduce.levels.inside.traffic.reset()
        reduce(normal(backend.rank, numel=numel))
        assert sum(part.numel() for part in reduce.residual.worker) == numel // 2
        assert sum(part.numel() for part in reduce.residual.server) == numel // 4
        quarter = numel // 4 // 8 + numel // 4 // 1024 * 4  # a payload: bits and scales
        between, inside = reduce.levels.between.traffic, reduce.levels.inside.traffic
        assert between.wire_bytes == 2 * quarter
        # Through memory each of the two exchanges tells the other rank by a byte.
        assert reduce.stats.local_bytes == (2 if transport == SHARED else numel // 2 * 4 + 2 * quarter)
        assert reduce.stats.wire_bytes == between.wire_bytes + inside.wire_bytes
        assert reduce.stats.collectives == 4

    run_threads(4, average)
