"""On GPUs state in slices makes the steps of a replicated run, bit for bit, over NCCL, fused, unfused, overlapped."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam, checkpoint
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits, normal

SHAPES = ((300, 1000), (1000,), (77, 1024), (3,), (64, 3, 7, 7))
STEPS = 8

pytestmark = pytest.mark.gpu


def differing(what: str, expected: list[list[bytes]], got: list[list[bytes]]) -> list[str]:
    """What to report of parameters after every step that are not equal."""
    found = []
    for number, (one, other) in enumerate(zip(expected, got, strict=True)):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                wrong = sum(x != y for x, y in zip(a, b, strict=True))
                found.append(f"{what}: parameter {i} after step {number}: {wrong} of {len(a)} bytes")
    return found


def train(backend: Backend, node: int, dtype: torch.dtype, folder: Any = None, **options: Any) -> list[list[bytes]]:
    """Steps with real backward passes; `folder`: go on from a checkpoint after the fifth."""

    def fresh() -> tuple[list[Tensor], OnebitAdam]:
        params: list[Tensor] = [
            torch.nn.Parameter(0.1 * normal(5, i, numel=torch.Size(s).numel()).view(s).to("cuda", dtype))
            for i, s in enumerate(SHAPES)
        ]
        params[4].data = params[4].data.contiguous(memory_format=torch.channels_last)
        chosen = {"freeze_step": 3, "variance_refresh": 4, "bucket_mb": 0.5, "master_weights": True, **options}
        return params, OnebitAdam(params, lr=1e-2, backend=backend, local_group=node, **chosen)

    params, optimizer = fresh()
    seen = []
    for number in range(STEPS):
        optimizer.zero_grad()
        given = [normal(backend.rank, number, i, numel=p.numel()).view(p.shape).to(p) for i, p in enumerate(params)]
        used = [(p, g) for i, (p, g) in enumerate(zip(params, given, strict=True)) if i != 3 or backend.rank == 0]
        sum((p * g).sum() for p, g in used).backward()  # type: ignore[union-attr]
        optimizer.step()
        seen.append(bits(params))
        if folder is not None and number == 4:
            checkpoint.save(folder, optimizer, params=[p.detach().cpu() for p in params])
            backend.barrier()
            params, optimizer = fresh()
            with torch.no_grad():
                for p, saved in zip(params, checkpoint.load(folder, optimizer)["params"], strict=True):
                    p.copy_(saved)
    assert optimizer.skipped_steps == 0
    fused = "codec" not in options and backend.size > node  # one node sums plainly
    assert optimizer.kernels == ("gpu" if fused else "torch"), optimizer.kernels
    return seen


def compare(backend: Backend, node: int, folder: Any) -> list[str]:
    """Everything that is not as in a replicated run; all of it, for runs on these machines are few."""
    found = []
    coupled = {"adamw_mode": False, "weight_decay": 0.1, "master_weights": False}
    for dtype, chosen in ((torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, coupled), (torch.float16, {})):
        expected = train(backend, node, dtype, shard=False, **chosen)
        runs: dict[str, dict[str, Any]] = {"in slices": {}, "in one bucket": {"bucket_mb": None}}
        if not chosen and dtype != torch.float16:
            runs["overlapped"] = {"overlap": True}
            runs["resumed"] = {"folder": folder / str(dtype)}
            runs["unfused"] = {"codec": SignCodec(kernels="reference")}
        for what, options in runs.items():
            case = f"{what}, {dtype}, {chosen}"
            try:
                got = train(backend, node, dtype, shard=True, **chosen, **options)
            except Exception as error:  # the others are wanted as well, and all ranks come here or none
                found.append(f"{case}: {type(error).__name__}: {error}")
                continue
            found += differing(case, expected, got)
    return found


def allocated(backend: Backend, node: int) -> list[tuple[int, int]]:
    """Bytes of state held on the device between steps, replicated and in slices, in warm-up and after it."""
    held = []
    for shard in (False, True):
        gc.collect()
        before = torch.cuda.memory_allocated()
        params = [torch.nn.Parameter(torch.ones(1 << 22, device="cuda"))]
        optimizer = OnebitAdam(params, freeze_step=1, backend=backend, local_group=node, shard=shard)
        after = []
        for _ in range(2):
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
            params[0].grad = None
            torch.cuda.synchronize()
            after.append(torch.cuda.memory_allocated() - before)
        held.append((after[0], after[1]))
        del optimizer, params
    return held


@pytest.mark.parametrize(("size", "node"), [(2, 2), (4, 2)])
def test_slices_make_the_steps_of_a_replicated_run(size: int, node: int, tmp_path: Any) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    results = run_ranks("nccl", size, compare, node, tmp_path, timeout=300.0)
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(results) for line in found]
    assert not lines, "\n".join(lines)


def test_less_memory_is_held_on_the_device() -> None:
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four CUDA devices")
    numel = 1 << 22
    for rank, (whole, sliced) in enumerate(run_ranks("nccl", 4, allocated, 2, timeout=300.0)):
        saved = [(one - other) / numel for one, other in zip(whole, sliced, strict=True)]
        # 4 bytes of moments in warm-up; after it half of the variance, as both keep the momentum in signs and scales.
        assert saved[0] > 3.8, f"rank {rank}: {saved} bytes per parameter less, of {whole} and {sliced} in all"
        assert saved[1] > 1.9, f"rank {rank}: {saved} bytes per parameter less, of {whole} and {sliced} in all"


def peaks(backend: Backend, node: int) -> dict[str, float]:
    """Bytes per parameter that a compressed step takes while it lasts, by fused kernels and by torch's operations."""
    measured = {}
    for name, codec in (("gpu", SignCodec()), ("torch", SignCodec(kernels="reference"))):
        params = [torch.nn.Parameter(torch.ones(1 << 22, device="cuda"))]
        optimizer = OnebitAdam(params, freeze_step=1, backend=backend, local_group=node, shard=True, codec=codec)
        for number in range(4):
            params[0].grad = torch.full_like(params[0], number - 0.5)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
            torch.cuda.synchronize()
            measured[name] = (torch.cuda.max_memory_allocated() - before) / params[0].numel()
        assert optimizer.kernels == name
        del optimizer, params
        gc.collect()
    return measured


def test_a_fused_step_makes_no_momentum_in_fp32_on_the_device() -> None:
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four CUDA devices")
    for rank, measured in enumerate(run_ranks("nccl", 4, peaks, 2, timeout=300.0)):
        # Moved parameters of this rank's slice, 2, and of the node, 4; all are one bucket.
        assert measured["gpu"] < 6.5 < measured["torch"], f"rank {rank}: bytes per parameter {measured}"
