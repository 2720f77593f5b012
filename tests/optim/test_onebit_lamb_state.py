"""OnebitLamb's state stays whole: bad steps leave it, resumed runs go on from it, AdamW's is taken or refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, InputError, run_threads
from onebit.optim import OnebitLamb
from tests.comm.samples import bits
from tests.optim.lamb_runs import PUBLISHED, SOON, everything
from tests.optim.samples import contents, feedback, gradients, parameters, patchy, step, through_a_file


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_bad_step_changes_nothing_in_either_phase(world_size: int, bad: float) -> None:
    def spoil(backend: Backend) -> None:
        params = parameters()
        groups = [{"params": params[:4]}, {"params": params[4:], **PUBLISHED}]
        optimizer = OnebitLamb(groups, backend=backend, **SOON)
        for number in range(10):
            before = everything(optimizer)
            spoiled = gradients(params, backend.rank, number)
            if backend.rank == world_size - 1:
                assert spoiled[3] is not None
                spoiled[3][77] = bad
            step(optimizer, spoiled)
            assert optimizer.skipped_steps == number + 1
            assert everything(optimizer) == before
            step(optimizer, gradients(params, backend.rank, number))
            assert everything(optimizer) != before

    run_threads(world_size, spoil)


@pytest.mark.parametrize(
    ("world_size", "dtype", "master"),
    [(1, torch.float32, False), (2, torch.bfloat16, False), (2, torch.float16, True), (3, torch.float32, False)],
    ids=str,
)
def test_a_run_resumed_after_any_step_is_bit_equal_to_one_without_a_break(
    world_size: int, dtype: torch.dtype, master: bool
) -> None:
    steps = 9

    def resume(backend: Backend) -> None:
        def make() -> tuple[OnebitLamb, list[Parameter]]:
            params = parameters(dtype=dtype)
            first = {"params": params[:4], "freeze_step": 2, "lr": 1e-2, **PUBLISHED}
            groups = [first, {"params": params[4:], "freeze_step": 5}]
            return OnebitLamb(groups, freeze_step=99, backend=backend, master_weights=master), params

        optimizer, params = make()
        checkpoints, expected = [], []
        for number in range(steps):
            checkpoints.append(through_a_file({"x": [p.detach() for p in params], "o": optimizer.state_dict()}))
            step(optimizer, patchy(params, backend.rank, number))
            expected.append((contents(optimizer), feedback(optimizer)))  # type: ignore[arg-type]
        for start, checkpoint in enumerate(checkpoints):
            resumed, own = make()
            step(resumed, gradients(own, backend.rank, 70 + start))
            with torch.no_grad():
                for p, value in zip(own, checkpoint["x"], strict=True):
                    p.copy_(value)
            resumed.load_state_dict(checkpoint["o"])
            for number in range(start, steps):
                step(resumed, patchy(own, backend.rank, number))
                assert (contents(resumed), feedback(resumed)) == expected[number]  # type: ignore[arg-type]

    run_threads(world_size, resume)


def test_a_run_that_adamw_began_goes_on_in_warm_up_and_is_refused_after_the_freeze() -> None:
    def go_on(backend: Backend) -> None:
        params = parameters()
        reference = torch.optim.AdamW(params, lr=1e-2)
        for number in range(3):
            step(reference, gradients(params, 0, number))
        state = through_a_file(reference.state_dict())
        optimizer = OnebitLamb(params, freeze_step=5, backend=backend)
        optimizer.load_state_dict(through_a_file(state))
        assert optimizer.phase() == "warmup"
        for number in range(3, 6):
            step(optimizer, gradients(params, backend.rank, number))
        mean = optimizer.lamb_coefficients()["coeff"]
        assert float(mean.min()) > 0.01, "the mean of two coefficients is not a tenth of them"
        late = OnebitLamb(params, freeze_step=3, backend=backend)
        late.load_state_dict(state)
        before = bits(params)
        with pytest.raises(InputError, match=r"step 4 comes after freeze_step=3, but the loaded state has no"):
            step(late, gradients(params, backend.rank, 3))
        assert bits(params) == before

    run_threads(2, go_on)
