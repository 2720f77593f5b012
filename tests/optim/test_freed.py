"""What nobody holds is freed at once, as torch's optimizers are, and not when the garbage collector finds it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  the first optimizer imports it, and it keeps what is on the stack then
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import CPUAdam, OnebitAdam, OnebitLamb, ZeroOneAdam
from tests.garbage import tensors_left_to_the_collector
from tests.optim.samples import step, values

CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (CPUAdam, {}),
    (OnebitAdam, {"freeze_step": 3}),
    (OnebitAdam, {"freeze_step": 3, "variance_refresh": 2}),
    (OnebitAdam, {"freeze_step": 3, "overlap": True}),
    (OnebitAdam, {"freeze_step": 3, "local_group": 2}),
    (OnebitAdam, {"freeze_step": 3, "local_group": 2, "shard": True}),
    (OnebitLamb, {"freeze_step": 3}),
    (ZeroOneAdam, {"var_freeze_step": 3}),
    (ZeroOneAdam, {"var_freeze_step": 3, "local_step_scaler": 2}),
]


@pytest.mark.parametrize("steps", [0, 2, 9])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_nothing_of_an_optimizer_is_left_when_it_is_dropped(
    kind: type[Any], options: dict[str, Any], steps: int
) -> None:
    def train(backend: Backend) -> bool:
        params = [Parameter(values(i, shape=(3000 + i,))) for i in range(3)]
        optimizer = kind(params, lr=1e-3, **options, **({} if kind is CPUAdam else {"backend": backend}))
        for number in range(steps):
            step(optimizer, [values(i, number, backend.rank, shape=tuple(p.shape)) for i, p in enumerate(params)])
        optimizer.state_dict()
        dropped = weakref.ref(optimizer)
        del optimizer
        return dropped() is None

    with tensors_left_to_the_collector() as left:
        assert run_threads(4, train) == [True] * 4
    assert left == []
