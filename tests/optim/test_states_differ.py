"""Ranks whose moments differ, as where each has loaded its own, are told before a step is made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, MismatchError, run_threads
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam

OPTIMIZERS: dict[str, Any] = {"OnebitAdam": OnebitAdam, "OnebitLamb": OnebitLamb, "ZeroOneAdam": ZeroOneAdam}


def local_adamw(seed: int) -> dict[str, Any]:
    """The state of an AdamW of one rank alone."""
    p = Parameter(torch.ones(50))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    optimizer.step()
    return optimizer.state_dict()


def test_moments_that_each_rank_has_loaded_from_a_run_of_its_own_are_refused() -> None:
    def train(backend: Backend, same: bool) -> None:
        p = Parameter(torch.ones(50))
        optimizer = OnebitAdam([p], freeze_step=2, backend=backend)
        optimizer.load_state_dict(local_adamw(0 if same else backend.rank))
        p.grad = torch.ones(50)
        if same:
            optimizer.step()
            return
        moments = optimizer.state[p]["exp_avg"].clone()
        with pytest.raises(MismatchError, match=r"exp_avg of parameter 0 of group 0 .*load one rank's moments"):
            optimizer.step()
        assert torch.equal(p, torch.ones(50))
        assert torch.equal(optimizer.state[p]["exp_avg"], moments)

    run_threads(2, train, True)
    run_threads(2, train, False)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("master_weights", [False, True])
def test_a_group_may_be_added_after_any_step(kind: str, master_weights: bool) -> None:
    """What ranks hold of their own between steps, as 0/1 Adam's do, is no difference."""
    if kind == "ZeroOneAdam":
        options = {"var_freeze_step": 2, "local_step_scaler": 2, "local_step_clipper": 4}
    else:
        options = {"freeze_step": 2}

    def train(backend: Backend, after: int) -> None:
        params = [Parameter(torch.ones(2000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = OPTIMIZERS[kind](params[:1], backend=backend, master_weights=master_weights, **options)
        draw = torch.Generator().manual_seed(backend.rank)
        for number in range(after + 2):
            if number == after:
                optimizer.add_param_group({"params": params[1:]})
            for p in params:
                p.grad = torch.randn(2000, generator=draw).bfloat16()
            optimizer.step()

    for after in (1, 2, 3, 5, 6, 7, 8):
        run_threads(2, train, after)
