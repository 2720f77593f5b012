"""onebit.comm.ddp over NCCL: a model in DDP trains as without it, on any stream, and its hook compresses gradients."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from onebit.comm import Backend, CompressedAllreduce
from onebit.comm.ddp import attach, compress_gradients
from tests.comm.ddp_runs import OPTIMIZERS, STEPS, WRAPS, Seen, Straight, all_runs, data, model, step
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")


def stream(other: bool) -> Any:
    """A stream beside the default one, or that one."""
    return torch.cuda.stream(torch.cuda.Stream()) if other else contextlib.nullcontext()


def exact() -> None:
    """The same bits from the same numbers: no sums whose order the moment decides."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def on_cuda(backend: Backend, optimizer: str, other_stream: bool) -> dict[str, tuple[Seen, Seen]]:
    exact()
    with stream(other_stream):
        return all_runs(backend, optimizer, "cuda")


@functools.cache
def seen(optimizer: str, other_stream: bool) -> list[dict[str, tuple[Seen, Seen]]]:
    return run_ranks("nccl", 2, on_cuda, optimizer, other_stream, timeout=240.0)


def farthest(wrapped: list[bytes], alone: list[bytes]) -> list[float]:
    """The largest difference of each parameter."""
    pairs = zip(wrapped, alone, strict=True)
    numbers = [[torch.frombuffer(bytearray(one), dtype=torch.float32) for one in pair] for pair in pairs]
    return [float((x - y).abs().max()) for x, y in numbers]


@pytest.mark.parametrize("other_stream", [False, True], ids=["default stream", "another stream"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_gpus_end_every_step_with_the_bits_of_the_unwrapped_model(optimizer: str, other_stream: bool) -> None:
    wrong = {}
    for rank, runs in enumerate(seen(optimizer, other_stream)):
        for name, (wrapped, alone) in runs.items():
            differing = [i for i in range(STEPS) if wrapped.params[i] != alone.params[i]]
            if differing or wrapped.phases != alone.phases or wrapped.skipped != alone.skipped:
                first = differing[0] if differing else -1
                off = farthest(wrapped.params[first], alone.params[first])
                wrong[rank, name] = (differing, off, wrapped.phases, wrapped.skipped, alone.skipped)
    assert not wrong, wrong


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ddp_averages_all_dense_steps_but_the_first_and_no_other(optimizer: str) -> None:
    for runs in seen(optimizer, False):
        for name in WRAPS:
            wrapped, _ = runs[name]
            dense = [phase in ("warmup", "refresh", "variance") for phase in wrapped.phases]
            assert wrapped.averaged == [False, *dense[1:]], (name, wrapped.averaged, wrapped.phases)


def unwatched(backend: Backend, optimizer: str, wrapped: bool) -> tuple[list[bytes], str, int]:
    """Steps that nobody looks at, so that the host runs ahead of the device and hears of them later."""
    exact()
    inner = model(device="cuda")
    called: torch.nn.Module = DistributedDataParallel(inner, bucket_cap_mb=0.01) if wrapped else inner
    make, options = OPTIMIZERS[optimizer]
    made = make(inner.parameters(), lr=1e-2, **options)
    if wrapped:
        attach(called, made)
    batches = [data(backend.rank, number, device="cuda") for number in range(40)]
    if backend.rank == 1:
        batches[20][0, 0, 0, 0] = torch.inf
    for number, x in enumerate(batches):
        step(called, made, x, number)
    return bits(list(inner.parameters())), made.kernels, made.skipped_steps


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_that_the_host_has_not_heard_of_end_as_without_ddp(optimizer: str) -> None:
    wrapped, alone = (run_ranks("nccl", 2, unwatched, optimizer, hooked) for hooked in (True, False))
    for rank, (mine, right) in enumerate(zip(wrapped, alone, strict=True)):
        assert mine[1:] == right[1:], (rank, mine[1:], right[1:])
        assert mine[0] == right[0], (rank, farthest(mine[0], right[0]))


def compressed(backend: Backend, wrap: dict[str, Any], other_stream: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Means by the hook, and by one average of the gradients of a twin that is not wrapped."""
    exact()
    with stream(other_stream):
        inner, twin = model(Straight, dtype, "cuda"), model(Straight, dtype, "cuda")
        called = DistributedDataParallel(inner, **wrap)
        hook = compress_gradients(called, bucket_mb=0.01)
        reduce: CompressedAllreduce | None = None
        seen: dict[str, Any] = {"means": [], "expected": [], "finite": []}
        for number in range(6):
            twin.load_state_dict(inner.state_dict())
            x = data(backend.rank, number, device="cuda").to(dtype)
            for trained in (twin, called):
                trained.zero_grad()
                trained(x).mean().backward()
            own = [in_memory(p) for p in reversed(list(twin.parameters()))]
            reduce = CompressedAllreduce(own, backend) if reduce is None else reduce
            reduce(own)
            means = [in_memory(p) for p in reversed(list(inner.parameters()))]
            seen["means"].append(bits(means))
            seen["expected"].append(bits(own))
            seen["finite"].append(all(bool(m.isfinite().all()) for m in means))
            with torch.no_grad():
                for p in inner.parameters():
                    assert p.grad is not None
                    p.sub_(0.05 * p.grad)
        seen["stats"] = (hook.stats.wire_bytes, hook.stats.dense_bytes)
        seen["norm"] = float(hook.state_dict()["worker"].norm())
        return seen


def in_memory(p: Tensor) -> Tensor:
    """A copy of the gradient, flat, as it lies in memory."""
    assert p.grad is not None
    return p.grad.as_strided((p.numel(),), (1,)).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("other_stream", [False, True], ids=["default stream", "another stream"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_compressed_gradients_are_one_compressed_average(wrap: str, other_stream: bool, dtype: torch.dtype) -> None:
    ranks = run_ranks("nccl", 2, compressed, WRAPS[wrap], other_stream, dtype)
    shown = [{key: rank[key] for key in ("finite", "stats", "norm")} for rank in ranks]
    for rank in ranks:
        assert all(rank["finite"]), shown
        same = [mine == right for mine, right in zip(rank["means"], rank["expected"], strict=True)]
        assert all(same), (same, shown)
        assert rank["norm"] > 0, shown
    assert ranks[0]["means"] == ranks[1]["means"], shown
