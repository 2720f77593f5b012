"""A short form of the fault campaign: nothing is lost when ranks are struck or gradients are spoiled at random."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, run_threads
from tests.comm.launcher import mpi_survives, needs_mpi
from tests.faults.endure import FAULTS, Plan, strike_before
from tests.faults.spoil import spoil_all
from tests.faults.strikes import LIMIT, Strikes, strike
from tests.faults.training import MAKERS

KINDS = ["gloo", pytest.param("mpi", marks=[pytest.mark.mpi, needs_mpi])]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_struck_harms_no_other_and_no_checkpoint(kind: str, fault: str, tmp_path: Path) -> None:
    if (kind, fault) == ("mpi", "kill") and not mpi_survives():
        pytest.skip("this mpiexec ends the whole job with a rank that is killed; Open MPI's can go on from version 5")
    tally, dice = Strikes(), random.Random(f"{kind} {fault}")
    optimizer = sorted(MAKERS)[FAULTS.index(fault) % len(MAKERS)]
    for attempt in range(3):  # a run does not count if this machine is too busy for it
        folder = tmp_path / f"{attempt}"
        folder.mkdir()
        plan = Plan.draw(
            dice, kind=kind, optimizer=optimizer, fault=fault, world_size=2, limit=LIMIT, folder=f"{folder}"
        )
        tally.count(plan, *strike(plan))
        if tally.runs:
            break
    assert not tally.said
    assert tally.runs == 1 or tally.slow == 3
    if tally.runs:
        told = 1 if fault in ("kill", "stop") else 2
        assert (tally.raised, tally.unharmed) == ((0, told) if fault == "pause" else (told, 0))


@pytest.mark.parametrize("call", range(5))
def test_a_strike_at_a_call_comes_once_and_right_before_it(call: int) -> None:
    def run(backend: Backend) -> list[str]:
        seen: list[str] = []

        class Seen(SimpleNamespace):
            def wait(self, timeout: float) -> None:
                seen.append("wait")

        def start(output: Tensor, input: Tensor) -> Seen:
            seen.append("start")
            return Seen()

        backend._all_gather = start  # type: ignore[method-assign, assignment]
        strike_before(backend, call, SimpleNamespace(now=lambda: seen.append("strike")))  # type: ignore[arg-type]
        for _ in range(2):
            backend.all_gather(torch.empty(1), torch.zeros(1)).wait()
        return seen

    [seen] = run_threads(1, run)
    calls = ["start", "wait", "start", "wait"]
    assert seen == [*calls[:call], *["strike"] * (call < 4), *calls[call:]]


def test_numbers_that_are_not_finite_leave_no_trace_in_any_optimizer_and_phase() -> None:
    for tally in spoil_all(60, seed=7):
        assert not tally.said
    assert tally.diverged == 0
    assert tally.runs == tally.bit_equal + tally.within_rounding + tally.signs + tally.cut
