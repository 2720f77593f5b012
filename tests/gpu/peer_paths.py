"""What tests of both ways through peers' memory ask: the same bits as elsewhere, and an end without peers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, TransportError, run_threads
from onebit.comm.peer_memory import SWITCH
from tests.comm.launcher import run_ranks

LIMIT = 0.3  # seconds
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


class OneDevice:
    """Ranks that are streams of one device, each with memory that all write to.

    Args:
        size: of that memory, in bytes.

    Attributes:
        memories: of every rank.
        where: on the device their addresses are.
        given_up: of every rank.
        device: it.
    """

    def __init__(self, ranks: int, size: int) -> None:
        self.memories = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(ranks)]
        self._addresses = torch.tensor([memory.data_ptr() for memory in self.memories], device="cuda")
        self.where = self._addresses.data_ptr()
        self.given_up = [torch.zeros(1, dtype=torch.int32, pin_memory=True) for _ in range(ranks)]
        self.streams = [torch.cuda.Stream() for _ in range(ranks)]
        self.device = torch.device("cuda", torch.cuda.current_device())

    def each(self, run: Callable[[int], object], taking_part: Sequence[int]) -> None:
        """Call `run` for these ranks, each on its stream."""
        for rank in taking_part:
            with torch.cuda.stream(self.streams[rank]):
                run(rank)


def check_pieces(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], bytes: int, one_for_each: bool, told: str
) -> None:
    """Every rank has a piece of so many bytes of every rank: its own, or the only one."""
    for rank, got in enumerate(outputs):
        own = rank if one_for_each else 0
        expected = torch.cat([given[own * bytes :][:bytes] for given in inputs])
        assert torch.equal(got, expected), f"{told}, rank {rank}: {int((got != expected).sum())} bytes differ"


def check_waits_no_more(run: Callable[[float], object]) -> None:
    """Once a rank has given up, ten more, which might each take `run`'s seconds, are soon over."""
    start = time.monotonic()
    for _ in range(10):
        run(60.0)
    torch.cuda.synchronize()
    assert time.monotonic() - start < 10.0  # seconds, of the 600 that they might have waited


def random_bytes(ranks: int, numel: int, skew: int = 0) -> list[Tensor]:
    """Random bytes of every rank, at addresses that are `skew` bytes off a multiple of 16."""
    return [torch.randint(0, 256, (numel + skew,), dtype=torch.uint8, device="cuda")[skew:] for _ in range(ranks)]


def told_not_to(backend: Backend, check: Callable[[Backend], Any]) -> Any:
    """`check`, where one rank may not use peers' memory."""
    if backend.rank == 0:  # on one rank is on all
        os.environ[SWITCH] = "0"
    return check(backend)


def check_same_bits(
    ranks: int,
    check: Callable[[Backend], tuple[list[list[bytes]], Any]],
    averages: Callable[[Backend], list[list[bytes]]],
) -> tuple[list[Any], list[Any]]:
    """Compare averages through peers' memory with those over NCCL and on the CPU.

    Args:
        check: what it brings, and what a test wants to know.
        averages: of any backend, the first of these.

    Returns:
        What the test wanted to know, of every rank, with peers' memory and without.
    """
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    by_peers, by_nccl = run_ranks("nccl", ranks, check), run_ranks("nccl", ranks, told_not_to, check)
    on_cpu = run_threads(ranks, averages)
    assert [seen for seen, _ in by_peers] == on_cpu
    assert [seen for seen, _ in by_nccl] == on_cpu
    return [told for _, told in by_peers], [told for _, told in by_nccl]


def ended(average: Callable[[], object], x: Tensor) -> tuple[bool, str, float]:
    """Make an average without a peer, and another: whether the mean is NaN, what is raised, seconds of the first."""
    start = time.monotonic()
    average()
    torch.cuda.synchronize()
    took, all_nan = time.monotonic() - start, bool(x.isnan().all())
    try:
        average()
    except TransportError as error:
        return all_nan, str(error), took
    return all_nan, "nothing", took


def check_ended(all_nan: bool, said: str, took: float) -> None:
    """What `ended` should bring on rank 0."""
    assert all_nan
    assert "rank 0" in said
    assert "peers' memory" in said
    assert LIMIT * 0.9 < took < 20 * LIMIT
