"""MPI carries CUDA tensors, where they lie or staged through pinned memory: the bytes are those of CPU tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, DenseAllreduce, run_threads
from onebit.comm.backend import SUMMABLE
from onebit.comm.mpi_backend import MpiBackend
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.known_bytes import DTYPES, as_bytes, as_tensor, blank, bytes_of, exchanged, gathered
from tests.comm.launcher import needs_mpi, run_ranks
from tests.comm.test_broadcast import check_models_on_cpu_and_cuda

NUMELS = (1, 5000, 300_001, 1024)
LONG = 200_000_000  # clock cycles, about a tenth of a second: what is not ordered behind it comes too early

pytestmark = [pytest.mark.mpi, needs_mpi]


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


def check_sums(backend: Backend) -> None:
    for dtype in SUMMABLE:
        total = torch.arange(1000, dtype=torch.int64).remainder(8).to("cuda", dtype)
        expected = total * backend.size
        backend.all_reduce(total).wait()
        assert torch.equal(total, expected), dtype


def check_cpu_tensors_still_travel(backend: Backend) -> None:
    total = torch.ones(1000)
    backend.all_reduce(total).wait()
    assert torch.equal(total, torch.full((1000,), float(backend.size)))


def check_work_is_ordered_on_the_current_stream(backend: Backend) -> None:
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            sent = torch.zeros(backend.size * 100_000, device="cuda")
            received = torch.zeros_like(sent)
            torch.cuda._sleep(LONG)
            sent.fill_(backend.rank + 1.0)  # late: what travels must be this
            work = backend.all_to_all(received, sent)
            torch.cuda._sleep(LONG)
            work.wait()
            doubled = received * 2  # queued behind the delivery
        stream.synchronize()
        expected = 2 * torch.arange(1.0, backend.size + 1).repeat_interleave(100_000)
        assert torch.equal(doubled.cpu(), expected), stream


def check_several_in_flight_do_not_share_memory(backend: Backend) -> None:
    for _ in range(3):
        works = []
        for k in (1, 1000, 1000, 300_000):
            mine = torch.full((k,), 10.0 * k + backend.rank, device="cuda")
            everyone = torch.zeros(backend.size * k, device="cuda")
            works.append((k, backend.all_gather(everyone, mine), everyone))
            if not backend.cuda_aware:  # type: ignore[attr-defined]
                mine.fill_(-7.0)  # what travels is a copy
        for k, work, everyone in reversed(works):
            work.wait()
            expected = (10.0 * k + torch.arange(backend.size)).repeat_interleave(k)
            assert torch.equal(everyone.cpu(), expected), k


def inputs(rank: int, call: int) -> list[Tensor]:
    return [torch.randn(n, generator=torch.Generator().manual_seed(100 * rank + 10 * call + n)) for n in NUMELS]


def averages(backend: Backend, device: str, kind: type[CompressedAllreduce] | type[DenseAllreduce]) -> list[Tensor]:
    reduce = kind([t.to(device) for t in inputs(0, 0)], backend, bucket_mb=0.25)
    results = []
    for call in range(3):
        tensors = [t.to(device) for t in inputs(backend.rank, call)]
        reduce(tensors)
        results += [t.cpu() for t in tensors]
    return results


def check_averages_are_those_of_cpu_ranks(backend: Backend) -> None:
    for kind in (CompressedAllreduce, DenseAllreduce):
        expected = run_threads(backend.size, averages, "cpu", kind)[backend.rank]
        for k, (seen, right) in enumerate(zip(averages(backend, "cuda", kind), expected, strict=True)):
            assert torch.equal(seen, right), (kind.__name__, k)


CHECKS = [
    check_every_byte_moves,
    check_sums,
    check_cpu_tensors_still_travel,
    check_work_is_ordered_on_the_current_stream,
    check_several_in_flight_do_not_share_memory,
    check_averages_are_those_of_cpu_ranks,
    check_models_on_cpu_and_cuda,
]
WAYS = ["as the library says", "staged"]


def run_checks(backend: Backend) -> Failures:
    """What failed on this rank, by way and check."""
    assert isinstance(backend, MpiBackend)
    torch.cuda.set_device(backend.rank % torch.cuda.device_count())
    failures = {}
    for way in WAYS:
        if way == "staged":
            backend.cuda_aware = False
        for check, text in failures_of(backend, CHECKS).items():
            failures[f"{way}: {check}"] = f"cuda_aware is {backend.cuda_aware}\n{text}"
    return failures


@pytest.fixture(scope="module")
def failures() -> list[Failures]:
    return run_ranks("mpi", 2, run_checks, timeout=200.0)


@pytest.mark.parametrize("check", CHECKS, ids=short)
@pytest.mark.parametrize("way", WAYS)
def test_mpi_with_cuda_tensors(failures: list[Failures], way: str, check: Check) -> None:
    assert_passed(failures, f"{way}: {check.__name__}")
