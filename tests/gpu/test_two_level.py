"""On GPUs two levels, and the two phases alone, give the bits that they give on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import (
    Backend,
    CompressedAllGather,
    CompressedAllreduce,
    CompressedReduceScatter,
    DenseAllreduce,
    run_threads,
)
from onebit.compress import Codec, Int8Codec, SignCodec
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.launcher import run_ranks
from tests.comm.samples import SMALL_BUCKET, bits, normal, samples

RANKS, NODE = 4, 2
CODECS: tuple[Codec, ...] = (SignCodec(), SignCodec(block_size=64), Int8Codec())

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs four CUDA devices")]


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in tensors]


def device_of(backend: Backend) -> str:
    return "cuda" if backend.name == "nccl" else "cpu"


def two_level_bits(backend: Backend) -> list[list[bytes]]:
    """What averages on two levels give, with several codecs and sizes of buckets."""
    device, seen = device_of(backend), []
    for codec in CODECS:
        for bucket_mb in (None, SMALL_BUCKET):
            reduce = CompressedAllreduce(
                on(device, samples(0, 0)), backend, codec, local_group=NODE, bucket_mb=bucket_mb
            )
            for call in range(3):
                tensors = on(device, samples(backend.rank, call))
                reduce(tensors)
                seen.append(bits(tensors))
    return seen


def phase_bits(backend: Backend) -> list[list[bytes]]:
    """What reduce-scatter and then all-gather give."""
    device, seen = device_of(backend), []
    for codec in CODECS:
        like = on(device, samples(0, 0))
        scatter = CompressedReduceScatter(like, backend, codec, bucket_mb=SMALL_BUCKET)
        gather = CompressedAllGather(like, backend, codec, bucket_mb=SMALL_BUCKET, residual=scatter.residual)
        for call in range(3):
            out = on(device, samples(backend.rank, 99))
            shard = scatter.start(on(device, samples(backend.rank, call))).wait()
            gather.start(shard).wait(out)
            seen += [bits(shard), bits(out)]
    return seen


def check_two_levels_have_the_bits_of_the_cpu(backend: Backend) -> None:
    for index, (got, expected) in enumerate(
        zip(two_level_bits(backend), run_threads(RANKS, two_level_bits)[backend.rank], strict=True)
    ):
        differing = [t for t, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
        assert not differing, f"call {index % 3} of codec {CODECS[index // 6]}: tensors {differing} differ"


def check_the_phases_have_the_bits_of_the_cpu(backend: Backend) -> None:
    for index, (got, expected) in enumerate(
        zip(phase_bits(backend), run_threads(RANKS, phase_bits)[backend.rank], strict=True)
    ):
        assert got == expected, f"{('shard', 'out')[index % 2]} of call {index // 2 % 3} of {CODECS[index // 6]}"


def check_levels_are_groups_of_their_own(backend: Backend) -> None:
    part = backend.split(backend.rank // NODE)
    mine = torch.tensor([backend.rank], device="cuda")
    everyone = mine.new_empty(part.size)
    part.all_gather(everyone, mine).wait()
    first = backend.rank // NODE * NODE
    assert everyone.tolist() == [*range(first, first + NODE)]
    total = torch.ones(3, device="cuda")
    backend.all_reduce(total).wait()
    assert total.tolist() == [RANKS] * 3


def check_one_node_is_the_mean(backend: Backend) -> None:
    x, exact = (normal(backend.rank).cuda() for _ in range(2))
    CompressedAllreduce(x, backend, local_group=RANKS)(x)
    DenseAllreduce(exact, backend)(exact)
    torch.testing.assert_close(x, exact, rtol=1e-5, atol=1e-6)  # NCCL adds in another order


def check_an_average_can_be_captured_and_replayed(backend: Backend) -> None:
    x, given = torch.zeros(3000, device="cuda"), normal(backend.rank).cuda()
    reduce, plain = (CompressedAllreduce(x, backend, local_group=NODE) for _ in range(2))
    for _ in range(2):
        x.copy_(given)
        reduce(x)
    reduce.residual.reset()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reduce(x)
    reduce.residual.reset()
    for _ in range(3):
        x.copy_(given)
        graph.replay()
        expected = given.clone()
        plain(expected)
        assert torch.equal(x, expected), f"{int((x != expected).sum())} of {x.numel()} elements differ"


def train(
    backend: Backend, kind: type, overlap: bool, bad_step: int | None = None, kernels: str | None = None, **options: Any
) -> list[bytes]:
    """Parameters after six steps; `bad_step`: one more beside this one, of which a rank has a number that is none."""
    params = [torch.nn.Parameter(normal(77, i).to(device_of(backend))) for i in range(3)]
    first = "var_freeze_step" if kind is ZeroOneAdam else "freeze_step"
    codec = SignCodec(kernels=kernels)  # type: ignore[arg-type]
    usual = {"lr": 1e-2, "local_group": NODE, "bucket_mb": 0.01, "codec": codec, first: 2}
    optimizer = kind(params, backend=backend, overlap=overlap, **{**usual, **options})
    for step in range(6):
        for seed in (step, 100)[: 1 + (step == bad_step)]:
            optimizer.zero_grad()
            gradients = [normal(backend.rank, seed, i).to(device_of(backend)) for i in range(3)]
            if seed == 100 and backend.rank == 3:
                gradients[1][5] = torch.inf
            sum((p * g).sum() for p, g in zip(params, gradients, strict=True)).backward()
            optimizer.step()
    assert optimizer.skipped_steps == (bad_step is not None)
    assert optimizer.kernels == ("gpu" if kernels is None else "torch"), optimizer.kernels
    return bits(params)


def check_optimizers_keep_ranks_equal_with_and_without_overlap(backend: Backend) -> None:
    for kind in (OnebitAdam, OnebitLamb, ZeroOneAdam):
        for overlap in (False, True):
            mine = [
                torch.frombuffer(bytearray(content), dtype=torch.float32) for content in train(backend, kind, overlap)
            ]
            whole = torch.cat(mine).cuda()
            everyone = whole.new_empty(RANKS * whole.numel())
            backend.all_gather(everyone, whole).wait()
            for rank, other in enumerate(everyone.view(RANKS, -1)):
                wrong = int((other != whole).sum())
                assert not wrong, f"{kind.__name__}, overlap={overlap}: {wrong} differ from rank {rank}"


def check_fused_steps_have_the_bits_of_torchs_operations(backend: Backend) -> None:
    for what, options in {"decoupled": {}, "coupled": {"adamw_mode": False, "weight_decay": 0.1}}.items():
        fused = train(backend, OnebitAdam, False, **options)
        by_torch = train(backend, OnebitAdam, False, kernels="reference", **options)
        for i, (a, b) in enumerate(zip(fused, by_torch, strict=True)):
            wrong = sum(x != y for x, y in zip(a, b, strict=True))
            assert not wrong, f"{what}: parameter {i}: {wrong} of {len(a)} bytes differ"


def check_a_step_that_is_not_finite_leaves_no_trace(backend: Backend) -> None:
    for overlap in (False, True):
        clean, spoilt = (train(backend, OnebitAdam, overlap, bad_step=bad) for bad in (None, 3))
        for i, (a, b) in enumerate(zip(clean, spoilt, strict=True)):
            one, other = (torch.frombuffer(bytearray(content), dtype=torch.float32) for content in (a, b))
            # Error feedback is put back to within rounding.
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"parameter {i}: {m}")


CHECKS: tuple[Check, ...] = (
    check_levels_are_groups_of_their_own,
    check_two_levels_have_the_bits_of_the_cpu,
    check_the_phases_have_the_bits_of_the_cpu,
    check_one_node_is_the_mean,
    check_optimizers_keep_ranks_equal_with_and_without_overlap,
    check_fused_steps_have_the_bits_of_torchs_operations,
    check_a_step_that_is_not_finite_leaves_no_trace,
    check_an_average_can_be_captured_and_replayed,
)


@pytest.fixture(scope="module")
def failures() -> list[Failures]:
    return run_ranks("nccl", RANKS, failures_of, CHECKS, timeout=300.0)


@pytest.mark.parametrize("check", CHECKS, ids=short)
def test_over_nccl(failures: list[Failures], check: Check) -> None:
    assert_passed(failures, check.__name__)
