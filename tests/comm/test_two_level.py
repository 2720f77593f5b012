"""Two levels are the flat average over nodes of what nodes have on average, whatever carries them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.compress import Int8Codec, SignCodec
from tests.comm import oracle
from tests.comm.launcher import needs_mpi, run_ranks
from tests.comm.nodes import CODEC, SHARED
from tests.comm.samples import (
    NUMELS,
    SMALL_BUCKET,
    SPECS,
    arrays,
    bits,
    normal,
    samples,
    server_parts,
    state_bits,
    worker_parts,
)

CALLS = 4
Seen = tuple[list[list[Tensor]], list[dict[str, Any]]]
BY_SHAPE = [(4, 2), (6, 2), (6, 3), (8, 4)]  # ranks, ranks of a node
MPI = pytest.param("mpi", 4, 2, marks=[pytest.mark.mpi, needs_mpi])


def two_levels(backend: Backend, local_group: int, bucket_mb: float, expected: str) -> Seen:
    """What one rank gets and keeps, call after call."""
    reduce = CompressedAllreduce(samples(0, 0), backend, CODEC, local_group=local_group, bucket_mb=bucket_mb)
    assert reduce.local_transport == expected
    outputs, states = [], []
    for call in range(CALLS):
        tensors = samples(backend.rank, call)
        if call % 2:
            work = reduce.start(tensors)
            work.finish()
            assert bool(work.all_finite())
            work.decode(tensors)
        else:
            reduce(tensors)
        outputs.append(tensors)
        states.append(reduce.state_dict())
    return outputs, states


def assert_follows_the_oracle(per_rank: list[Seen], k: int) -> None:
    """A flat average over nodes, in float64, of every node's mean."""
    nodes = len(per_rank) // k
    expected = oracle.CompressedMean(nodes, NUMELS, CODEC.block_size)
    largest = np.zeros(len(NUMELS))
    for call in range(CALLS):
        given = [arrays(samples(rank, call)) for rank in range(len(per_rank))]
        of_nodes = [oracle.dense_mean(given[i * k : (i + 1) * k]) for i in range(nodes)]
        means = expected(of_nodes)
        for t, (mean, (_, dtype, _)) in enumerate(zip(means, SPECS, strict=True)):
            held = [*(x[t] for x in given), *(worker[t] for worker in expected.worker), expected.server[t]]
            largest[t] = max([largest[t], *(float(np.abs(part).max(initial=0)) for part in held)])
            # As in oracle.tolerance, and k more roundings of the node's mean.
            slack = 2 * (call + 1) * (32 + nodes + k) * oracle.UNIT * largest[t]
            relative = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
            absolute = 0.0 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal * relative
            for outputs, _ in per_rank:
                error = np.abs(arrays(outputs[call])[t] - mean)
                assert np.all(error <= slack + relative * np.abs(mean) + absolute), (call, t, expected.closest)
            for i in range(nodes):
                workers = [worker_parts(per_rank[rank][1][call])[t] for rank in range(i * k, (i + 1) * k)]
                assert np.count_nonzero(workers, axis=0).max(initial=0) <= 1, "two ranks of a node keep one error"
                assert np.all(np.abs(np.sum(workers, axis=0) - expected.worker[i][t]) <= slack), (call, t, i)
            server = server_parts([states[call] for _, states in per_rank])[t]
            assert np.all(np.abs(server - expected.server[t]) <= slack), (call, t, expected.closest)


@pytest.mark.parametrize("bucket_mb", [16.0, SMALL_BUCKET])
@pytest.mark.parametrize(("world_size", "k"), BY_SHAPE)
def test_it_follows_the_float64_oracle_of_a_flat_average_over_nodes(
    world_size: int, k: int, bucket_mb: float, transport: str
) -> None:
    per_rank = run_threads(world_size, two_levels, k, bucket_mb, transport)
    assert_follows_the_oracle(per_rank, k)
    for outputs, _ in per_rank[1:]:
        assert list(map(bits, outputs)) == list(map(bits, per_rank[0][0]))


@pytest.mark.parametrize(("kind", "world_size", "k"), [("gloo", 4, 2), ("gloo", 6, 3), MPI])
def test_processes_that_share_memory_get_the_same_bits_as_threads_that_do_not(
    kind: str, world_size: int, k: int
) -> None:
    threads = run_threads(world_size, two_levels, k, SMALL_BUCKET, "threads")
    for seen, expected in zip(run_ranks(kind, world_size, two_levels, k, SMALL_BUCKET, SHARED), threads, strict=True):
        assert list(map(bits, seen[0])) == list(map(bits, expected[0]))
        assert state_bits(seen[1]) == state_bits(expected[1])


def test_it_is_the_flat_average_of_node_means_bit_for_bit_with_other_codecs_and_masks(transport: str) -> None:
    masks = [torch.rand(3000, generator=torch.Generator().manual_seed(5)) < 0.3]

    def average(backend: Backend, codec: Any, k: int) -> list[Any]:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, codec, local_group=k if k > 1 else None)
        reduce.set_mask(masks)
        seen = []
        for call in range(3):
            x = normal(backend.rank, call)
            if k == 1:  # a rank that stands for a node of two
                x = (normal(2 * backend.rank, call) + normal(2 * backend.rank + 1, call)) / 2
            x.masked_fill_(masks[0], math.nan)
            reduce(x)
            seen.append(bits(x))
        return seen

    for codec in (
        SignCodec(),
        SignCodec(kernels="reference"),
        Int8Codec(block_size=64),
        Int8Codec(error_feedback=False),
    ):
        assert run_threads(4, average, codec, 2) == run_threads(2, average, codec, 1) * 2


def test_fewer_blocks_than_ranks_and_lists_without_elements(transport: str) -> None:
    def average(backend: Backend, like: list[Tensor], codec: Any) -> None:
        reduce = CompressedAllreduce(like, backend, codec, local_group=2)
        for _ in range(2):
            tensors = [torch.full_like(t, 1.5) for t in like]
            work = reduce.start(tensors)
            work.finish()
            work.undo()
            reduce(tensors)
            assert all(bool((t == 1.5).all()) for t in tensors)
        reduce.load_state_dict(reduce.state_dict())

    for like in ([], [torch.empty(0)], [torch.zeros(5)], [torch.zeros(()), torch.zeros(0, 3)]):
        for codec in (SignCodec(), Int8Codec()):
            run_threads(4, average, like, codec)


def test_one_rank_a_node_is_the_flat_average_and_one_node_the_exact_mean() -> None:
    def average(backend: Backend, local_group: int | None) -> tuple[Any, Any, tuple[str, ...]]:
        reduce = CompressedAllreduce(torch.zeros(3000), backend, local_group=local_group)
        x = normal(backend.rank)
        reduce(x)
        work = reduce.start(x)
        work.undo()
        reduce.load_state_dict(reduce.state_dict())
        return bits(x), reduce.state_dict().get("world_size"), tuple(reduce.modes)

    assert run_threads(3, average, 1) == run_threads(3, average, None)
    one_node = run_threads(3, average, 3)
    assert one_node[0] == one_node[1] == one_node[2]
    assert one_node[0][1:] == (None, ("plain",))
    mean = np.frombuffer(one_node[0][0][0], np.float32)
    [exact] = oracle.dense_mean([arrays([normal(rank)]) for rank in range(3)])
    assert np.all(np.abs(mean - exact) <= 2 * oracle.dense_slack([arrays([normal(rank)]) for rank in range(3)])[0])
    assert run_threads(1, average, 1)[0][0] == bits(normal(0))
