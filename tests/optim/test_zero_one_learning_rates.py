"""Learning rates that end at 0, or next to it, and start again leave ZeroOneAdam's momentum finite and of its size."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import ZeroOneAdam
from tests.comm.samples import bits
from tests.optim.samples import contents, gradients, parameters, step, values
from tests.optim.zero_one_runs import KINDS, SOON, saved


def test_an_interval_without_learning_rate_moves_nothing_and_ranks_agree_about_the_momentum() -> None:
    def train(backend: Backend) -> list[Any]:
        params = parameters()
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        seen = []
        for number in range(len(KINDS)):
            optimizer.param_groups[0]["lr"] = 0.0 if 15 <= number < 19 else 1e-2
            before = bits(params)
            step(optimizer, gradients(params, backend.rank, number))
            assert (bits(params) == before) == (15 <= number < 19)
            assert all(bool(t.isfinite().all()) for t in (*params, *(state["exp_avg"] for state in saved(optimizer))))
            if KINDS[number] != "local":
                seen.append(contents(optimizer))
        return seen

    first, second = run_threads(2, train)
    assert first == second


def test_a_schedule_that_restarts_after_its_lowest_learning_rate_does_not_blow_up_the_momentum() -> None:
    def train(backend: Backend) -> None:
        p = Parameter(torch.zeros(3000))
        optimizer = ZeroOneAdam([p], backend=backend, **SOON)
        for number in range(60):
            optimizer.param_groups[0]["lr"] = 1e-12 if 30 <= number < 40 else 1e-2
            step(optimizer, [values(number, backend.rank, shape=(3000,))])
            # Feedback in units of lr·m would come back as 1e10 times the momentum here. Signs and their error feedback
            # keep it within a few times the largest gradient.
            assert float(saved(optimizer)[0]["exp_avg"].abs().max()) < 10

    run_threads(2, train)
