"""overlap=True over NCCL: every bit is that of steps without it, and a step that is given up is skipped by all."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from onebit.comm import Backend
from onebit.optim import OnebitAdam, check_replicas
from tests.comm.launcher import run_ranks
from tests.optim.overlapping import Network, Seen, backward, train

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ZERO_ONE = {"var_freeze_step": 5, "var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "1-bit Adam": ("adam", {"freeze_step": 3}, {"bad": (1, 5)}),
    "fresh variance": ("adam", {"freeze_step": 2, "variance_refresh": 3}, {"steps": 10}),
    "masters": ("adam", {"freeze_step": 3, "master_weights": True}, {"dtype": torch.bfloat16}),
    "accumulation": ("adam", {"freeze_step": 3}, {"micro_batches": 3}),
    "0/1 Adam": ("zero_one", ZERO_ONE, {"steps": 16}),
    "1-bit LAMB": ("lamb", {"freeze_step": 3}, {}),
}


def both(backend: Backend, case: str) -> list[list[Seen]]:
    """What one rank saw with overlap and without."""
    name, options, how = CASES[case]
    # cuBLAS must take the same kernels in both runs for gradients to have the same bits.
    torch.use_deterministic_algorithms(True, warn_only=True)
    runs = functools.partial(train, backend, name, options=options, device="cuda", **how)
    return [runs(overlap) for overlap in (True, False)]


@two_gpus
@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_steps_without_overlap(case: str) -> None:
    for rank, (with_overlap, without) in enumerate(run_ranks("nccl", 2, both, case, timeout=180.0)):
        plain = [dataclasses.replace(seen, overlapped=(0, 0)) for seen in with_overlap]
        for number, (mine, other) in enumerate(zip(plain, without, strict=True)):
            assert mine == other, f"{case}: rank {rank} differs first at step {number}: {mine} against {other}"
        early = [seen.overlapped for seen in with_overlap]
        assert any(started for started, _ in early), f"{case}: nothing was sent during backward, {early}"


def give_up(backend: Backend) -> tuple[int, float]:
    """Rank 1 drops its gradients in two steps that rank 0 makes; returns what was skipped, and a sum of parameters."""
    network = Network().to("cuda")
    options = {"lr": 1e-2, "freeze_step": 3, "backend": backend, "overlap": True, "bucket_mb": 0.0125}
    optimizer = OnebitAdam(network.groups(), **options)  # type: ignore[arg-type]
    for number in range(12):
        backward(network, backend.rank, number)
        if number in (2, 7) and backend.rank == 1:
            optimizer.zero_grad()
        else:
            optimizer.step()
            optimizer.zero_grad()
    check_replicas(optimizer)
    return optimizer.skipped_steps, float(sum(p.detach().double().sum() for p in network.parameters()))


@two_gpus
def test_a_step_that_one_rank_gives_up_is_skipped_by_all() -> None:
    first, second = run_ranks("nccl", 2, give_up, timeout=180.0)
    assert first == second, f"skipped steps and sums of parameters, by rank: {first}, {second}"
    assert first[0] == 2, f"skipped {first[0]} steps, expected 2"
