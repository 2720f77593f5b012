"""NCCL moves the same bytes as the other transports, never holds up the host, and can be captured in a CUDA graph."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist

from onebit.comm.backend import SUMMABLE, Backend
from onebit.comm.errors import BackendError
from onebit.comm.registry import make_backend
from tests.comm.launcher import run_ranks
from tests.comm.test_backends import DTYPES, as_bytes, as_tensor, blank, bytes_of, exchanged, gathered

WORLD_SIZES = [size for size in (2, 4, 8) if size <= torch.cuda.device_count()]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not WORLD_SIZES, reason="needs two CUDA devices")]


def check_every_byte_moves(backend: Backend) -> None:
    for dtype in DTYPES:
        for k in (1, 7, 300_001):
            sent = as_tensor(bytes_of(backend.rank, backend.size * k, dtype), dtype).cuda()
            received = blank(backend.size * k, dtype).cuda()
            backend.all_to_all(received, sent).wait()
            assert np.array_equal(as_bytes(received.cpu()), exchanged(backend, k, dtype)), (dtype, k)
            mine = as_tensor(bytes_of(backend.rank, k, dtype), dtype).cuda()
            backend.all_gather(received, mine).wait()
            assert np.array_equal(as_bytes(received.cpu()), gathered(backend, k, dtype)), (dtype, k)


def check_sums_and_empty_tensors(backend: Backend) -> None:
    for dtype in SUMMABLE:
        total = torch.arange(16, dtype=dtype, device="cuda") % 8
        expected = total * backend.size
        backend.all_reduce(total).wait()
        assert torch.equal(total, expected), dtype
        empty, also_empty = torch.empty(2, 0, dtype=dtype, device="cuda")
        backend.all_to_all(also_empty, empty).wait()
        backend.all_gather(also_empty, empty).wait()
        backend.all_reduce(empty).wait()
    backend.barrier()


def check_several_in_flight_waited_out_of_order(backend: Backend) -> None:
    totals = [torch.full((k,), backend.rank + 1.0, device="cuda") for k in (3, 1 << 20, 1)]
    works = [backend.all_reduce(total) for total in totals]
    for work in reversed(works):
        work.wait()
    for total in totals:
        assert torch.equal(total, torch.full_like(total, backend.size * (backend.size + 1) / 2))


def check_wait_does_not_hold_up_the_host(backend: Backend) -> None:
    total = torch.ones(1000, device="cuda")
    backend.all_reduce(total).wait()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
    start = time.monotonic()
    received = torch.empty(1000 * backend.size, device="cuda")
    backend.all_reduce(total).wait()
    backend.all_gather(received, total).wait()
    backend.all_to_all(torch.empty_like(received), received).wait()
    assert time.monotonic() - start < 0.3
    assert torch.equal(received, torch.full_like(received, backend.size**2))


def check_a_step_can_be_captured_and_replayed(backend: Backend) -> None:
    n = backend.size
    sent = torch.zeros(4 * n, dtype=torch.uint8, device="cuda")
    received, everyone = torch.zeros_like(sent), torch.zeros(4 * n * n, dtype=torch.uint8, device="cuda")

    def step() -> None:
        backend.all_to_all(received, sent).wait()
        backend.all_gather(everyone, received.add_(1)).wait()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # NCCL sets itself up outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for value in (5, 9):
        sent.fill_(value + backend.rank)
        graph.replay()
        torch.cuda.synchronize()
        of_rank = (value + 1 + torch.arange(n, dtype=torch.uint8, device="cuda")).repeat_interleave(4)
        assert torch.equal(everyone, of_rank.repeat(n))


def check_sub_groups_and_the_gloo_half(backend: Backend) -> None:
    group = dist.new_group([0], backend="nccl")
    if backend.rank == 0:
        alone = make_backend(group)
        assert (alone.name, alone.size) == ("nccl", 1)
        total = torch.ones(3, device="cuda")
        alone.all_reduce(total).wait()
        assert torch.equal(total, torch.ones(3, device="cuda"))
        with pytest.raises(BackendError, match="cannot carry cpu tensors"):
            make_backend(group, device="cpu")
    else:
        with pytest.raises(BackendError, match=f"rank {backend.rank} is no member"):
            make_backend(group)
    assert make_backend(device="cuda").name == "nccl"
    halves = make_backend(device="cpu")
    total = torch.ones(3)
    halves.all_reduce(total).wait()
    assert (halves.name, total.tolist()) == ("gloo", [backend.size] * 3)


def check_cpu_tensors_are_refused(backend: Backend) -> None:
    with pytest.raises(BackendError, match="'nccl' backend carries cuda tensors, got one on cpu"):
        backend.all_reduce(torch.zeros(3))
    with pytest.raises(BackendError, match="'nccl' backend carries cuda tensors, and these are on cpu"):
        make_backend("nccl", device="cpu")


CHECKS = [
    check_every_byte_moves,
    check_sums_and_empty_tensors,
    check_several_in_flight_waited_out_of_order,
    check_wait_does_not_hold_up_the_host,
    check_a_step_can_be_captured_and_replayed,
    check_sub_groups_and_the_gloo_half,
    check_cpu_tensors_are_refused,
]


def run_checks(backend: Backend) -> dict[str, str]:
    """The traceback of each check that failed on this rank."""
    failures = {}
    for check in CHECKS:
        try:
            check(backend)
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    return failures


@pytest.fixture(scope="module", params=WORLD_SIZES)
def failures(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return run_ranks("nccl", request.param, run_checks, timeout=150.0)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_nccl(failures: list[dict[str, str]], check: Callable[[Backend], None]) -> None:
    failed = {rank: found[check.__name__] for rank, found in enumerate(failures) if check.__name__ in found}
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
