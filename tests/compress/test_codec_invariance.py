"""Threads, buckets, neighbours and order change no bit."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onebit.compress import Layout, SignCodec, set_num_threads
from tests.compress import oracle, samples


def everything(codec: SignCodec, x: Tensor, residual: Tensor, ranks: int) -> list[bytes]:
    """Encode, average with other ranks' payloads, decode: all bytes that come of it."""
    (layout,) = codec.plan([x])
    sent = codec.encode(x, residual)
    others = samples.random_payloads(codec, layout, ranks - 1) if ranks > 1 else sent.new_empty((0, sent.numel()))
    server = torch.zeros(x.numel())
    mean = codec.reduce_encode(torch.cat([sent.view(1, -1), others]), server, layout=layout)
    back = codec.decode(mean, torch.empty_like(x))
    assert isinstance(back, Tensor)
    return [samples.as_bytes(t) for t in (sent, residual, mean, server, back)]


@pytest.mark.parametrize("codec", [SignCodec(), SignCodec(block_size=None)], ids=["blocks", "tensor"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_nothing(codec: SignCodec, threads: int) -> None:
    x = torch.randn(700_001, generator=torch.Generator().manual_seed(1))  # enough for 10 threads

    def bytes_with(count: int) -> list[bytes]:
        set_num_threads(count)
        try:
            return everything(codec, x, torch.zeros_like(x), ranks=3)
        finally:
            set_num_threads(None)

    assert bytes_with(threads) == bytes_with(1)


def parts(layouts: tuple[Layout, ...], payloads: list[Tensor], residuals: list[Tensor]) -> dict[tuple[int, int], bytes]:
    """Bits, scale and residual of every block, by tensor and first element: wherever it lies."""
    found = {}
    for layout, payload, residual in zip(layouts, payloads, residuals, strict=True):
        shape = oracle.Geometry(layout.block_size, False, [[oracle.PADDING] * layout.chunk_blocks] * layout.chunks)
        bits, scales = oracle.parse(payload.numpy(), shape, layout.chunks)
        for s in layout.segments:
            for i in range(-(-s.numel // layout.block_size)):
                block = s.block + i
                held = residual[block * layout.block_size :][: min(layout.block_size, s.numel - i * layout.block_size)]
                found[s.tensor, s.offset + i * layout.block_size] = (
                    bits[block].tobytes() + scales[block].tobytes() + samples.as_bytes(held)
                )
    return found


@given(
    codec=samples.codecs(),
    numels=st.lists(samples.numels(), min_size=1, max_size=5),
    chunks=st.integers(1, 5),
    bucket_numel=st.none() | st.integers(1, 6000),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_bucket_size_neighbours_and_order_change_no_bit(
    codec: SignCodec, numels: list[int], chunks: int, bucket_numel: int | None, order: random.Random, seed: int
) -> None:
    xs = samples.tensors(numels, torch.float32, seed)
    old = [torch.randn(n, generator=torch.Generator().manual_seed(seed)) for n in numels]
    places = list(range(len(xs)))
    order.shuffle(places)

    def encoded(indices: list[int], chunks: int, bucket_numel: int | None) -> dict[tuple[int, int], bytes]:
        chosen = [xs[i] for i in indices]
        layouts = codec.plan(chosen, chunks, bucket_numel)
        residuals = [torch.zeros(layout.padded_numel) for layout in layouts]
        for layout, residual in zip(layouts, residuals, strict=True):
            for s in layout.segments:
                residual[layout.residual_span(s)] = old[indices[s.tensor]][s.offset : s.offset + s.numel]
        payloads = [codec.encode(chosen, r, layout=layout) for layout, r in zip(layouts, residuals, strict=True)]
        return {(indices[t], o): block for (t, o), block in parts(layouts, payloads, residuals).items()}

    alone: dict[tuple[int, int], bytes] = {}
    for i in range(len(xs)):
        alone |= encoded([i], 1, None)
    assert encoded(places, chunks, bucket_numel) == alone


@given(
    codec=samples.codecs(),
    numels=st.lists(samples.numels(), min_size=1, max_size=4),
    ranks=st.integers(1, 5),
    bucket_numel=st.none() | st.integers(1, 6000),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_the_mean_over_ranks_does_not_depend_on_buckets_neighbours_or_order(
    codec: SignCodec, numels: list[int], ranks: int, bucket_numel: int | None, order: random.Random, seed: int
) -> None:
    """For a given number of ranks: a scale per tensor is one of the part that a rank averages."""
    of_ranks = [samples.tensors(numels, torch.float32, seed + rank) for rank in range(ranks)]
    places = list(range(len(numels)))
    order.shuffle(places)

    def averaged(indices: list[int], bucket_numel: int | None) -> dict[int, bytes]:
        outs = [torch.zeros(numels[i]) for i in indices]
        for layout in codec.plan(outs, ranks, bucket_numel):
            sent = [codec.encode([xs[i] for i in indices], layout=layout).view(ranks, -1) for xs in of_ranks]
            means = [
                codec.reduce_encode(torch.stack([s[k] for s in sent]), layout=layout, chunk=k) for k in range(ranks)
            ]
            codec.decode(torch.cat(means), outs, layout=layout)
        return {i: samples.as_bytes(out) for i, out in zip(indices, outs, strict=True)}

    alone: dict[int, bytes] = {}
    for i in range(len(numels)):
        alone |= averaged([i], None)
    assert averaged(places, bucket_numel) == alone
