"""What metrics() tells of fused steps on a GPU, where the host may be behind, is what it tells of steps on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import CompressedOptimizer, OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.optim.samples import values

SIZE, STEPS = 5000, 12
OPTIMIZERS: dict[str, tuple[type[CompressedOptimizer], dict[str, Any]]] = {
    "OnebitAdam": (OnebitAdam, {"freeze_step": 3}),
    "ZeroOneAdam": (ZeroOneAdam, {"var_freeze_step": 3, "local_step_scaler": 4, "local_step_clipper": 2}),
    "OnebitLamb": (OnebitLamb, {"freeze_step": 3}),
}


def seen(backend: Backend, name: str, device: str) -> list[dict[str, Any]]:
    """After each step; one of them is skipped."""
    kind, options = OPTIMIZERS[name]
    p = Parameter(values(0, shape=(SIZE,)).to(device))
    optimizer = kind([p], lr=1e-3, backend=backend, **options)
    found = []
    for number in range(STEPS):
        p.grad = values(3, number, backend.rank, shape=(SIZE,)).to(device)
        if number == 4 and backend.rank == 1:
            p.grad[7] = math.inf
        optimizer.step()
        asked = {"update_rms": True} if isinstance(optimizer, OnebitAdam) else {}
        found.append(optimizer.metrics(compression_error=True, **asked))
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_metrics_of_a_gpu_are_those_of_the_cpu(name: str) -> None:
    for rank, (gpu, cpu) in enumerate(
        zip(run_threads(2, seen, name, "cuda"), run_threads(2, seen, name, "cpu"), strict=True)
    ):
        for number, (found, expected) in enumerate(zip(gpu, cpu, strict=True)):
            where = f"{name}, rank {rank}, after step {number + 1}:\n{found}\n{expected}"
            stages = {key for key in (*found, *expected) if key.startswith("seconds/")}
            assert found.keys() & stages, where  # a fused step has other stages than one that is not
            assert found.keys() - stages == expected.keys() - stages, where
            norms = {"residual_norm", "compression_error", "update_rms", "largest_update_rms"}
            for key in found.keys() - stages - norms:
                assert found[key] == expected[key], where
            for key in norms:
                # Rounding differs, so a sign of an entry near 0 may; a few of 5000 move a norm by less than this.
                assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-2, abs=1e-6), where
