"""Averages over NCCL in stripes have the bits that they have elsewhere, in graphs too, and go by what is faster."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, DenseAllreduce, make_backend, run_threads, striping
from onebit.comm.backend import Collective
from onebit.comm.striping import StripedCollective
from onebit.compress import Codec, Int8Codec, SignCodec
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, normal
from tests.gpu.peer_paths import two_devices
from tests.gpu.stripes import all_striped

SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket"}


def averages(backend: Backend) -> list[list[bytes]]:
    """What averages of several codecs give, call after call, in one bucket or several, waited for at once or not."""
    device = "cuda" if backend.name == "nccl" else "cpu"
    seen = []
    for codec in (SignCodec(), Int8Codec(), None):
        for numel, bucket_mb in ((1, None), (3000, None), (400_000, 0.25)):
            x = torch.empty(numel, device=device)
            start = starter(x, backend, codec, bucket_mb)
            for call in range(4):
                x.copy_(normal(backend.rank, call, numel=numel))
                start(call % 2 > 0).wait()
                seen.append(bits([x]))
    return seen


def starter(x: Tensor, backend: Backend, codec: Codec | None, bucket_mb: float | None) -> Callable[[bool], Any]:
    """Starts an average, compressed or, without a codec, not; told whether something else is to run meanwhile."""
    if codec is None:
        dense = DenseAllreduce(x, backend, bucket_mb=bucket_mb)
        return lambda overlap: dense.start(x)
    reduce = CompressedAllreduce(x, backend, codec, bucket_mb=bucket_mb)
    return lambda overlap: reduce.start(x, overlap=overlap)


def stripes_of(collective: Collective) -> int:
    assert isinstance(collective, StripedCollective)
    return len(collective._stripes or [])


def check_bits(_: Backend, count: int) -> tuple[list[list[bytes]], list[int]]:
    all_striped(count)
    backend = make_backend("nccl")
    seen = averages(backend)
    x = torch.zeros(5000, device="cuda")
    reduce = CompressedAllreduce(x, backend)
    for _ in range(2):
        reduce(x)
    bucket = reduce._buckets[0]
    return seen, [stripes_of(collective) for collective in (bucket._all_to_all, bucket._all_gather)]


@two_devices
@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (2, 5), (3, 3), (4, 4)])
def test_averages_have_the_bits_that_they_have_elsewhere(ranks: int, count: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    on_cpu = run_threads(ranks, averages)
    for told, expected in zip(run_ranks("nccl", ranks, check_bits, count), on_cpu, strict=True):
        assert told == (expected, [count, count])


def check_graph(_: Backend) -> list[int]:
    """An average in stripes captured and replayed, beside calls of another; counts what differs."""
    all_striped(3)
    backend = make_backend("nccl")
    given = normal(backend.rank, numel=100_000).cuda()
    x, y = given.clone(), given.clone()
    reduce, beside = (CompressedAllreduce(tensor, backend, bucket_mb=0.2) for tensor in (x, y))
    for _ in range(2):
        reduce(x)
        beside(y)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        reduce(x)
    for average in (reduce, beside):
        average.residual.reset()
    wrong = []
    for _ in range(20):
        x.copy_(given)
        graph.replay()
        y.copy_(given)
        beside(y)
        torch.cuda.synchronize()
        wrong.append(int((x != y).sum()))
    return wrong


@two_devices
def test_they_can_be_captured_in_a_graph() -> None:
    for wrong in run_ranks("nccl", 2, check_graph):
        assert wrong == [0] * 20


def check_choice(_: Backend) -> tuple[list[bytes], int | None]:
    """What an average over sockets gives that has found out how it is faster, and what that is."""
    os.environ.update(SOCKETS)
    striping.LEAST = 0
    backend = make_backend(torch.distributed.new_group(backend="nccl"))
    x = torch.empty(2_000_000, device="cuda")
    reduce = CompressedAllreduce(x, backend)
    for call in range(3):
        reduce.residual.reset()
        x.copy_(normal(backend.rank, call, numel=x.numel()))
        reduce(x)
    return bits([x]), backend.stripes.count  # type: ignore[attr-defined]


def expected_of_choice(backend: Backend) -> list[bytes]:
    x = normal(backend.rank, 2, numel=2_000_000)
    CompressedAllreduce(x, backend)(x)
    return bits([x])


@two_devices
def test_what_is_tried_is_right_whatever_is_found() -> None:
    expected = run_threads(2, expected_of_choice)
    told = run_ranks("nccl", 2, check_choice)
    assert [seen for seen, _ in told] == expected
    counts = {count for _, count in told}
    assert counts in ({1}, {striping.MOST})
