"""OnebitAdam's freeze, refresh, dense groups, masters and scaler, and clipping, on CUDA parameters: as on the CPU."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam, clip_grad_norm_
from tests.comm.samples import bits
from tests.optim.samples import values

UNIT = 2.0**-24
SIZE = 5000
STEPS = 120


def gradient(rank: int, number: int, index: int = 0) -> Tensor:
    """Steady gradients, of which a quarter of the entries are zero until step 70."""
    g = values(3, index, number, rank, shape=(SIZE,))
    if number < 70:
        g[: SIZE // 4] = 0.0
    return g


def trained(backend: Backend, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """What a run ends with; nobody asks for the phase or saves meanwhile, so the host may be behind the device."""
    p = Parameter(values(0, shape=(SIZE,)).to(device, dtype))
    dense = Parameter(values(1, shape=(300,)).to(device))
    groups = [{"params": [p]}, *([{"params": [dense], "compress": False}] if options.pop("with_dense", False) else [])]
    optimizer = OnebitAdam(groups, lr=1e-2, betas=(0.9, 0.98), backend=backend, **options)
    for number in range(STEPS):
        p.grad = gradient(backend.rank, number).to(device, dtype)
        if number % 40 == 21 and backend.rank == 1:
            p.grad[SIZE - 7] = math.inf
        dense.grad = values(4, number, backend.rank, shape=(300,)).to(device)
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    return {
        "kernels": optimizer.kernels,
        "frozen_at": optimizer.param_groups[0]["frozen_at"],
        "step": optimizer.param_groups[0]["step"],
        "counts": [float(state["step"]), float(state["variance_step"])],
        "skipped": optimizer.skipped_steps,
        "phase": optimizer.phase(),
        "p": p.detach().cpu(),
        "dense": dense.detach().cpu(),
        "variance": state["exp_avg_sq"].cpu(),
        "master": state["master"].cpu() if "master" in state else None,
    }


CASES: dict[str, dict[str, Any]] = {
    "auto": {"freeze_step": "auto"},
    "auto, beside a dense group": {"freeze_step": "auto", "with_dense": True},
    "refresh": {"freeze_step": 30, "variance_refresh": 20},
    "masters": {"freeze_step": 30, "variance_refresh": 25, "dtype": torch.bfloat16, "master_weights": True},
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_on_a_gpu_decide_as_ranks_on_the_cpu_and_end_with_their_numbers(case: str) -> None:
    seen = run_threads(2, lambda backend: trained(backend, "cuda", **CASES[case]))
    right = run_threads(2, lambda backend: trained(backend, "cpu", **CASES[case]))
    for rank, (one, other) in enumerate(zip(seen, right, strict=True)):
        assert one["kernels"] == "gpu", one["kernels"]
        for key in ("frozen_at", "step", "counts", "skipped", "phase"):
            assert one[key] == other[key], (case, rank, key, one[key], other[key])
        assert one["skipped"] == 3
        assert one["p"].equal(seen[0]["p"]), f"{case}: ranks 0 and {rank} differ"
        off = (one["variance"] - other["variance"]).abs() / other["variance"].clamp(min=1e-30)
        assert float(off.max()) <= 8 * STEPS * UNIT, f"{case}: variance off by {float(off.max())}, relatively"
        # Gradients do not depend on parameters, so only roundings differ, and a sign that one decides: an entry that it
        # hits is off by a few learning rates at most, and there are few.
        apart = (one["p"].float() - other["p"].float()).abs()
        close = 1e-3 if case != "masters" else 2.0**-6
        share = float((apart > close).float().mean())
        told = f"{case}, rank {rank}: {share:.4f} of the entries are off by more than {close}, at most {apart.max()}"
        assert share <= 0.01, told
        assert float((one["dense"] - other["dense"]).abs().max()) <= 1e-4
        if one["master"] is not None:
            assert one["master"].bfloat16().equal(one["p"])


def test_what_was_dead_lives_after_a_refresh_on_the_device() -> None:
    start = values(0, shape=(SIZE,))[: SIZE // 4]
    for end, refresh in ((True, 20), (False, None)):
        options: dict[str, Any] = {"freeze_step": 30, "variance_refresh": refresh, "weight_decay": 0.0}
        for one in run_threads(2, lambda backend: trained(backend, "cuda", **options)):  # noqa: B023
            moved = one["p"][: SIZE // 4] != start
            assert bool(moved.all()) if end else not bool(moved.any()), (refresh, int(moved.sum()))


def test_the_freeze_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "onebit.optim.freeze"):
        run_threads(2, lambda backend: trained(backend, "cuda", freeze_step="auto"))
    said = [record.getMessage() for record in caplog.records if record.name == "onebit.optim.freeze"]
    assert len(said) == 1, said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping_on_the_device_is_that_of_the_cpu_and_waits_for_nothing(norm_type: float, dtype: torch.dtype) -> None:
    def clip(backend: Backend, device: str) -> tuple[Tensor, Tensor]:
        p, q = (Parameter(torch.zeros(SIZE, device=device, dtype=d)) for d in (torch.float32, dtype))
        for index, parameter in enumerate((p, q)):
            parameter.grad = gradient(backend.rank, 90, index).to(device, parameter.dtype)
        total = clip_grad_norm_([p, q], 0.5, norm_type, backend=backend)
        return total.cpu(), torch.cat([p.grad, q.grad.float()]).cpu()  # type: ignore[union-attr, list-item]

    on_gpu = run_threads(2, lambda backend: clip(backend, "cuda"))
    on_cpu = run_threads(2, lambda backend: clip(backend, "cpu"))
    assert bits([on_gpu[0][0]]) == bits([on_gpu[1][0]])
    for (total, clipped), (expected, right) in zip(on_gpu, on_cpu, strict=True):
        # A norm of bf16 numbers is rounded to bf16 by torch, to one of two neighbours at most.
        slack = 1e-5 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(total, expected, rtol=slack, atol=0)
        torch.testing.assert_close(clipped, right, rtol=2 * slack, atol=1e-9)

    def one_rank() -> None:
        p = Parameter(torch.zeros(SIZE, device="cuda"))
        p.grad = torch.ones_like(p)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            clip_grad_norm_([p], 1.0, norm_type)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    one_rank()


def test_a_scaler_on_the_device_is_followed_without_a_wait_and_ranks_skip_together() -> None:
    def train(backend: Backend) -> tuple[Tensor, int, float]:
        p = Parameter(values(0, shape=(SIZE,)).cuda())
        optimizer = OnebitAdam([p], lr=1e-2, freeze_step=3, backend=backend)
        scaler = GradScaler("cuda", init_scale=2.0**12)
        for number in range(10):
            scaler.scale(torch.ones((), device="cuda"))
            p.grad = gradient(backend.rank, number).cuda() * scaler.get_scale()
            if number in (1, 6) and backend.rank == 1:
                p.grad[4000] = math.inf
            scaler.step(optimizer)
            scaler.update()
        return p.detach().cpu(), optimizer.skipped_steps, scaler.get_scale()

    (first, skipped, scale), (second, skipped_too, lower) = run_threads(2, train)
    assert first.equal(second)
    assert (skipped, skipped_too) == (2, 2)
    assert (scale, lower) == (2.0**12, 2.0**10)


def test_devices_of_one_optimizer_go_together_on_one_rank() -> None:
    def trained_on(devices: tuple[str, str]) -> list[Tensor]:
        params = [Parameter(values(i, shape=(SIZE,)).to(device)) for i, device in enumerate(devices)]
        optimizer = OnebitAdam([{"params": [p]} for p in params], lr=1e-2, freeze_step=3, backend="single")
        for number in range(8):
            for i, p in enumerate(params):
                p.grad = gradient(i, number).to(p.device)
            optimizer.step()
        return [p.detach().cpu() for p in params]

    for one, other in zip(trained_on(("cpu", "cuda")), trained_on(("cpu", "cpu")), strict=True):
        # Eight steps of lr 0.01, of numbers of size 1 rounded a few times and divided by roots of at least 0.001.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
