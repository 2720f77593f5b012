"""Thousands of compressed steps of real processes: memory stays flat, error feedback bounded, replicas bit-equal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onebit.comm import Backend
from onebit.optim import ZeroOneAdam, check_replicas
from tests.comm.launcher import RanksFailed, run_ranks
from tests.faults.training import feedback, make
from tests.optim.samples import all_params, checksum, contents

WARM_UP = 5  # steps, after which no optimizer of `training` is in its own warm-up any more
WARM = 0.2  # of the steps; until then caches, and the allocator's pools, may still fill
LOOKS = 100  # how often memory and error feedback are looked at
# A pool of small objects that Python adds has 1 MiB, and so may a step by which glibc's heap grows; a few of each may
# come late. Beyond that, memory is lost by steps: with 16,000 of them after the warm-up, this sees 256 bytes per step.
SLACK = 4 << 20  # bytes
GROWTH = 1.25  # of the largest feedback; the gradients of all steps are alike, and looks differ by a twentieth
ENOUGH = 3600.0  # seconds for all of it


@dataclass
class Endured:
    """What one rank of a soak saw.

    Attributes:
        memory: bytes resident, at each of LOOKS looks.
        feedback: the norm of error feedback at each of them.
        final: a checksum of parameters, moments and counts.
    """

    memory: list[int] = field(default_factory=list)
    feedback: list[float] = field(default_factory=list)
    final: str = ""

    @property
    def memory_growth(self) -> int:
        """Bytes gained after the warm-up: the least of the last looks less the most of it."""
        warm = _warm(self.memory)
        return min(self.memory[-len(self.memory) // 10 :]) - max(self.memory[:warm])

    @property
    def feedback_growth(self) -> float:
        """The largest feedback after the warm-up, by the largest of it."""
        warm = _warm(self.feedback)
        return float(np.max(self.feedback[warm:]) / np.max(self.feedback[:warm]))  # NaN if there is one


def soak(backend: Backend, name: str, steps: int) -> Endured:
    """Make so many compressed steps. For `run_ranks`."""
    optimizer = make(name, backend, bucket_mb=None)  # one bucket for each group: ranks wait less for each other
    params, noise, seen = all_params(optimizer), torch.Generator().manual_seed(backend.rank), Endured()
    for number in range(WARM_UP + steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=noise)
        optimizer.step()
        if number >= WARM_UP and (number - WARM_UP) % (steps // LOOKS) == 0:
            seen.memory.append(resident())
            seen.feedback.append(float(feedback(optimizer.state_dict()).norm()))
    if isinstance(optimizer, ZeroOneAdam):
        optimizer.synchronize()
    check_replicas(optimizer)
    seen.final = checksum(contents(optimizer))
    return seen


def found(endured: Sequence[Endured]) -> list[str]:
    """What should not have been on any of the ranks."""
    said = []
    for rank, seen in enumerate(endured):
        if seen.memory_growth > SLACK:
            said.append(f"the memory of rank {rank} grew by {seen.memory_growth} bytes")
        if not seen.feedback_growth <= GROWTH:  # NaN too
            said.append(f"the error feedback of rank {rank} grew {seen.feedback_growth:.2f}-fold")
    if len({seen.final for seen in endured}) > 1:
        said.append("the ranks ended with different bits")
    return said


def soak_all(name: str, ranks: int, steps: int) -> dict[str, Any]:
    """Soak one optimizer over Gloo; returns a row of the campaign's result."""
    row = {"campaign": "soak", "backend": "gloo", "optimizer": name, "ranks": ranks, "steps": steps}
    try:
        endured: list[Endured] = run_ranks("gloo", ranks, soak, name, steps, timeout=ENOUGH, backend_timeout=60.0)
    except RanksFailed as failed:
        return {**row, "memory_growth": None, "feedback_growth": None, "wrong": 1, "said": [str(failed)]}
    said = found(endured)
    return {
        **row,
        "memory_growth": max(seen.memory_growth for seen in endured),
        "feedback_growth": round(max(seen.feedback_growth for seen in endured), 3),
        "wrong": len(said),
        "said": said,
    }


def _warm(looks: Sequence[object]) -> int:
    return max(round(WARM * len(looks)), 1)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
