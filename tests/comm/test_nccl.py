"""NCCL moves the same bytes as the other transports, never holds up the host, and can be captured in a CUDA graph."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from onebit.comm import CompressedAllreduce, MismatchError, broadcast, run_threads
from onebit.comm.backend import SUMMABLE, Backend
from onebit.comm.errors import BackendError
from onebit.comm.registry import make_backend
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.known_bytes import DTYPES, as_bytes, as_tensor, blank, bytes_of, exchanged, gathered
from tests.comm.launcher import run_ranks
from tests.comm.test_broadcast import DTYPES as BROADCAST_DTYPES
from tests.comm.test_broadcast import Model, assert_same, check_models_on_cpu_and_cuda, content

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


def check_collectives_in_line_are_ordered_on_the_current_stream(backend: Backend) -> None:
    k = 300_001
    sent = as_tensor(bytes_of(backend.rank, backend.size * k, torch.uint8), torch.uint8).cuda()
    received, everyone = torch.zeros(2, backend.size * k, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for buffer in (received, everyone):
                buffer.zero_()
            torch.cuda._sleep(50_000_000)
            late = sent.clone()  # written behind the long kernel, and read by the collective behind that
            backend.prepare_all_to_all(received, late).start(in_line=True).wait()
            copied = received.clone()
            backend.prepare_all_gather(everyone, late[:k]).start(in_line=True).wait()
            gathered_copy = everyone.clone()
            done = stream.record_event()
        done.synchronize()
        assert np.array_equal(as_bytes(copied.cpu()), exchanged(backend, k, torch.uint8))
        pieces = [as_tensor(bytes_of(r, backend.size * k, torch.uint8), torch.uint8)[:k] for r in range(backend.size)]
        assert torch.equal(gathered_copy.cpu(), torch.cat(pieces))


def check_a_broadcast_carries_every_dtype_of_both_devices(backend: Backend) -> None:
    cases = list(itertools.product(BROADCAST_DTYPES, ((), (0,), (7,), (2, 3, 2, 3)), ("cpu", "cuda")))
    without_cuda = dist.new_group(list(range(backend.size)), backend="gloo")
    for source, group in enumerate((backend, None, "nccl", "gloo", without_cuda)):
        source %= backend.size
        given = [content(shape, dtype, backend.rank, i).to(device) for i, (dtype, shape, device) in enumerate(cases)]
        given = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in given]
        broadcast(given, group, source)
        for i, (case, tensor) in enumerate(zip(cases, given, strict=True)):
            assert tensor.device.type == case[2], case
            assert_same(tensor, content(case[1], case[0], source, i), (group, case))


def check_a_broadcast_of_models_on_devices_of_either_kind(backend: Backend) -> None:
    check_models_on_cpu_and_cuda(backend, None)
    model = Model(backend.rank).to("cuda" if backend.rank else "cpu")
    with pytest.raises(MismatchError, match=r"do not agree on backend: rank 0: gloo; ranks? 1.*: nccl"):
        broadcast(model)
    assert model.seen() == Model(backend.rank).seen()


def cpu_averages(backend: Backend, calls: int, numels: Sequence[int], bucket_mb: float) -> list[list[Tensor]]:
    """What ranks that are threads with CPU tensors get: this rank's result of every call."""

    def average(threads: Backend) -> list[list[Tensor]]:
        reduce = CompressedAllreduce(inputs(threads.rank, 0, numels), threads, bucket_mb=bucket_mb)
        results = [inputs(threads.rank, call, numels) for call in range(calls)]
        for tensors in results:
            reduce(tensors)
        return results

    return run_threads(backend.size, average)[backend.rank]


def inputs(rank: int, call: int, numels: Sequence[int]) -> list[Tensor]:
    return [torch.randn(n, generator=torch.Generator().manual_seed(100 * rank + 10 * call + n)) for n in numels]


def check_compressed_averages_are_those_of_cpu_ranks(backend: Backend) -> None:
    numels = (1, 5000, 300_001, 1024)
    for bucket_mb in (16.0, 0.25):  # one bucket, in line; several, pipelined
        expected = cpu_averages(backend, 3, numels, bucket_mb)
        for how in ("called", "started", "in parts", "on a side stream"):
            reduce = CompressedAllreduce([t.cuda() for t in inputs(0, 0, numels)], backend, bucket_mb=bucket_mb)
            stream = torch.cuda.Stream() if how == "on a side stream" else torch.cuda.current_stream()
            for call in range(3):
                tensors = [t.cuda() for t in inputs(backend.rank, call, numels)]
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    average_as(how, reduce, tensors)
                stream.synchronize()
                for k, (seen, right) in enumerate(zip(tensors, expected[call], strict=True)):
                    assert torch.equal(seen.cpu(), right), (bucket_mb, how, call, k)


def average_as(how: str, reduce: CompressedAllreduce, tensors: list[Tensor]) -> None:
    if how == "called" or how == "on a side stream":
        reduce(tensors)
    elif how == "started":
        work = reduce.start(tensors)
        torch.cuda._sleep(1_000_000)
        work.wait()
    else:
        operators = reduce.codec.unchecked(tensors[0].device)
        work = reduce.start_with(lambda part: part.encode(operators, tensors), overlap=False)
        work.finish()
        for part in reduce.parts:
            part.decode(operators, tensors)
        work.accept()


def check_a_step_settled_on_the_device_is_undone_on_every_rank_alike(backend: Backend) -> None:
    numels = (5000, 300_001)
    reduce, plain = (CompressedAllreduce([t.cuda() for t in inputs(0, 0, numels)], backend) for _ in range(2))
    operators = reduce.codec.unchecked(torch.device("cuda"))
    tensors = [t.cuda() for t in inputs(0, 0, numels)]
    for call, spoiled in enumerate((False, True, False, True, False)):
        for tensor, new in zip(tensors, inputs(backend.rank, call, numels), strict=True):
            tensor.copy_(new)
        before = [part.residual.clone() for part in reduce.parts]
        server = [part.clone() for part in reduce.residual.server]
        if spoiled and backend.rank == backend.size - 1:
            tensors[1][7] = torch.nan
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if call > 1 else "default")  # two calls send tables, map memory
        try:
            work = reduce.start_with(lambda part: part.encode(operators, tensors))
            work.finish()
            finite = work.all_finite()
            work.settle_server(finite)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(finite) is not spoiled, call
        if spoiled:
            for now, then in zip(reduce.residual.server, server, strict=True):
                # Two sums there and back, of numbers below 8 in size: a few of their last places.
                assert torch.allclose(now, then, rtol=0, atol=1e-5), (call, float((now - then).abs().max()))
            for part, then in zip(reduce.parts, before, strict=True):
                part.residual.copy_(then)
            for now, then in zip(reduce.residual.server, server, strict=True):
                now.copy_(then)
            continue
        plain([t.clone() for t in tensors])
        for mine, other in zip(reduce.residual.server, plain.residual.server, strict=True):
            assert torch.equal(mine, other), call


def check_the_time_limit_becomes_that_of_the_group(backend: Backend) -> None:
    group = dist.new_group(list(range(backend.size)), backend="nccl", timeout=timedelta(seconds=200))
    assert make_backend(group).timeout == 200.0
    limited = make_backend(group, timeout=90.0)
    assert (limited.timeout, make_backend(group).timeout) == (90.0, 90.0)
    total = torch.ones(3, device="cuda")
    limited.all_reduce(total).wait()
    assert total.tolist() == [backend.size] * 3


CHECKS = [
    check_collectives_in_line_are_ordered_on_the_current_stream,
    check_compressed_averages_are_those_of_cpu_ranks,
    check_a_step_settled_on_the_device_is_undone_on_every_rank_alike,
    check_the_time_limit_becomes_that_of_the_group,
    check_every_byte_moves,
    check_sums_and_empty_tensors,
    check_several_in_flight_waited_out_of_order,
    check_wait_does_not_hold_up_the_host,
    check_a_step_can_be_captured_and_replayed,
    check_sub_groups_and_the_gloo_half,
    check_cpu_tensors_are_refused,
    check_a_broadcast_carries_every_dtype_of_both_devices,
    check_a_broadcast_of_models_on_devices_of_either_kind,
]


@pytest.fixture(scope="module", params=WORLD_SIZES)
def failures(request: pytest.FixtureRequest) -> list[Failures]:
    return run_ranks("nccl", request.param, failures_of, CHECKS, timeout=150.0)


@pytest.mark.parametrize("check", CHECKS, ids=short)
def test_nccl(failures: list[Failures], check: Check) -> None:
    assert_passed(failures, check.__name__)
