"""One loop with everything at once, over every backend: autocast, accumulation, clipping, a schedule, late layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from onebit.comm import Backend
from onebit.optim import clip_grad_norm_
from tests.comm.launcher import MPI, run_ranks
from tests.comm.samples import bits
from tests.optim.loops import (
    KINDS,
    STEPS,
    WARM_UP,
    assert_equal_on_ranks,
    backward,
    loss_of,
    make,
    network,
    one_thread,
    settled,
)


@one_thread()
def everything(backend: Backend, kind: str) -> Any:
    """What one rank ends with: parameters, their average, the learning rate of every step and the clipped norms."""
    model = network()
    head = list(model[3].parameters())
    for p in head:
        p.requires_grad_(False)
    optimizer = make(kind, model.parameters(), backend, check_every=None if kind == "ZeroOneAdam" else 3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS + 4)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    rates, norms = [], []
    for number in range(STEPS + 4):
        if number == WARM_UP + 1:
            for p in head:
                p.requires_grad_(True)
            optimizer.add_param_group({"params": head, "lr": 5e-3})
        for micro in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, backend.rank, 2 * number + micro) / 2
            backward(loss)
        norms.append(float(clip_grad_norm_(optimizer, 0.1)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
        settled(optimizer)
        average.update_parameters(model)
    assert_equal_on_ranks(backend, [*model.parameters(), *average.module.parameters()])
    assert optimizer.skipped_steps == 0
    return bits(list(model.parameters())), bits(list(average.module.parameters())), rates, norms


def check(kind: str, backend: str, world_size: int) -> None:
    per_rank = run_ranks(backend, world_size, everything, kind, timeout=120.0)
    assert per_rank == run_ranks("threads", world_size, everything, kind)
    assert all(result == per_rank[0] for result in per_rank)


@pytest.mark.parametrize("kind", KINDS)
def test_two_gloo_processes_train_as_threads_do_bit_for_bit(kind: str) -> None:
    check(kind, "gloo", 2)


@pytest.mark.parametrize(("backend", "world_size"), [("gloo", 3), MPI[0]])
def test_three_processes_and_mpi_do_too(backend: str, world_size: int) -> None:
    check("OnebitAdam", backend, world_size)
