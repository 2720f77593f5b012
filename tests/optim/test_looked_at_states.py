"""Reading ``optimizer.state[p]`` makes torch keep an empty entry: what is saved is what it was, and can be loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam, OnebitLamb, ZeroOneAdam
from onebit.optim.base import CompressedOptimizer
from onebit.optim.elastic import reshard
from tests.comm.samples import state_bits
from tests.optim.samples import all_params, gradients, parameters, step

KINDS: dict[str, Callable[..., CompressedOptimizer]] = {
    "OnebitAdam": lambda params, backend: OnebitAdam(params, freeze_step=2, backend=backend),
    "OnebitAdam, shard": lambda params, backend: OnebitAdam(
        params, freeze_step=2, backend=backend, local_group=2, shard=True
    ),
    "OnebitLamb": lambda params, backend: OnebitLamb(params, freeze_step=2, backend=backend),
    "ZeroOneAdam": lambda params, backend: ZeroOneAdam(params, var_freeze_step=2, backend=backend),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_one_rank_has_looked_at_is_saved_as_before(kind: str) -> None:
    """The parameter has had no gradient, stands among others that have, and its rank alone looks at it."""

    def train(backend: Backend) -> tuple[dict[str, Any], dict[str, Any]]:
        optimizer = KINDS[kind](parameters(), backend=backend)
        for number in range(4):
            given = gradients(all_params(optimizer), backend.rank, number)
            given[3] = None
            step(optimizer, given)
        before = optimizer.state_dict()
        if backend.rank == 0:
            assert not optimizer.state[all_params(optimizer)[3]]
        return before, optimizer.state_dict()

    seen = run_threads(4, train)
    for before, after in seen:
        assert state_bits(after) == state_bits(before)
    states = [after for _, after in seen]
    fewer = reshard(states, 0, 2)
    assert torch.equal(fewer["state"][0]["exp_avg_sq"], reshard([s for s, _ in seen], 0, 2)["state"][0]["exp_avg_sq"])
