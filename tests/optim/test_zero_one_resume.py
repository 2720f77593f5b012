"""A run of ZeroOneAdam that is saved after any step goes on bit for bit, and goes on from a state of AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import ZeroOneAdam
from tests.comm.samples import state_bits
from tests.optim.samples import contents, gradients, mean_of, parameters, step, through_a_file
from tests.optim.zero_one_runs import KINDS, SOON, mostly, saved


@pytest.mark.parametrize(
    ("world_size", "dtype", "master_weights"),
    [(1, torch.float32, False), (2, torch.float32, False), (2, torch.bfloat16, True), (3, torch.float16, False)],
    ids=str,
)
def test_a_run_resumed_after_any_step_is_bit_equal_to_one_without_a_break(
    world_size: int, dtype: torch.dtype, master_weights: bool
) -> None:
    def make(backend: Backend) -> tuple[ZeroOneAdam, list[Parameter]]:
        params = parameters(dtype=dtype)
        groups = [{"params": params[:4]}, {"params": params[4:], "local_step_scaler": 1, "lr": 1e-3}]
        return ZeroOneAdam(groups, backend=backend, master_weights=master_weights, **SOON), params

    def seen(optimizer: ZeroOneAdam) -> Any:
        return contents(optimizer), state_bits(optimizer.state_dict())

    def train(backend: Backend) -> None:
        optimizer, params = make(backend)
        checkpoints, expected = [], []
        for number in range(len(KINDS)):
            checkpoints.append(through_a_file({"p": [p.detach() for p in params], "o": optimizer.state_dict()}))
            step(optimizer, mostly(params, backend.rank, number))
            expected.append(seen(optimizer))
        for start in range(len(KINDS)):
            resumed, own = make(backend)
            with torch.no_grad():
                for p, value in zip(own, checkpoints[start]["p"], strict=True):
                    p.copy_(value)
            resumed.load_state_dict(checkpoints[start]["o"])
            for number in range(start, min(start + 6, len(KINDS))):
                step(resumed, mostly(own, backend.rank, number))
                assert seen(resumed) == expected[number], f"saved after {start} steps, now after {number + 1}"

    run_threads(world_size, train)


def test_a_state_of_adamw_is_one_whose_every_step_updated_the_variance() -> None:
    def train(backend: Backend) -> list[Any]:
        params = parameters()
        adamw = torch.optim.AdamW(params, lr=1e-2)
        for number in range(17):  # the next step is the second of an interval
            step(adamw, mean_of([gradients(params, rank, number) for rank in range(2)]))
        optimizer = ZeroOneAdam(params, backend=backend, **SOON)
        optimizer.load_state_dict(through_a_file(adamw.state_dict()))
        assert optimizer.phase() == KINDS[17]
        for number in range(17, 19):
            step(optimizer, gradients(params, backend.rank, number))
        assert {float(state["variance_step"]) for state in saved(optimizer)} == {17.0}
        return contents(optimizer)

    first, second = run_threads(2, train)
    assert first == second
