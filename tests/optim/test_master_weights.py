"""master_weights=True: parameters in half precision follow an fp32 copy, which makes the steps of an fp32 parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from tests.comm.samples import bits
from tests.optim.samples import Gradients, contents, feedback, gradients, parameters, step, through_a_file, values

HALF = [torch.bfloat16, torch.float16]
# Both phases, a refresh at step 6, and decay that reads the parameter.
OPTIONS: dict[str, Any] = {"freeze_step": 3, "variance_refresh": 3, "lr": 1e-2, "weight_decay": 0.1}


def exact(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
    """Gradients that fp32, bf16 and fp16 hold alike: small integers."""
    return [torch.round(2 * g) for g in gradients(parameters(), rank, number) if g is not None]


@pytest.mark.parametrize("kernels", [None, "reference"], ids=["fused", "by torch's operations"])
@pytest.mark.parametrize("adamw_mode", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_masters_are_bit_equal_to_fp32_parameters_and_parameters_are_their_rounding(
    world_size: int, dtype: torch.dtype, adamw_mode: bool, kernels: str | None
) -> None:
    options = {**OPTIONS, "adamw_mode": adamw_mode, "codec": SignCodec(kernels=kernels)}

    def train(backend: Backend) -> None:
        half = parameters(dtype=dtype)
        full = [Parameter(p.detach().float()) for p in half]
        reference = OnebitAdam(full, backend=backend, **options)
        optimizer = OnebitAdam(half, backend=backend, master_weights=True, **options)
        for number in range(9):
            step(reference, exact(full, backend.rank, number))
            step(optimizer, exact(half, backend.rank, number))
            assert bits([optimizer.state[p]["master"] for p in half]) == bits(full)
            assert bits(half) == bits([p.detach().to(dtype) for p in full])
        for p, h in zip(full, half, strict=True):
            assert set(reference.state[p]) == set(optimizer.state[h]) - {"master"}

    run_threads(world_size, train)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_too_small_for_half_precision_add_up(world_size: int, dtype: torch.dtype) -> None:
    def train(backend: Backend, master_weights: bool) -> float:
        p = Parameter(torch.ones(200, dtype=dtype))
        options: dict[str, Any] = {"freeze_step": 5, "lr": 1e-4, "weight_decay": 0.0, "master_weights": master_weights}
        optimizer = OnebitAdam([p], backend=backend, **options)
        for _ in range(100):
            step(optimizer, [torch.ones(200)])
        return float(p.detach().float().mean())

    # 100 steps of 1e-4; half an ulp below 1 is 2⁻⁹ in bf16 and 2⁻¹² in fp16.
    assert set(run_threads(world_size, train, False)) == {1.0}
    for mean in run_threads(world_size, train, True):
        assert abs(mean - 0.99) <= 2**-9


def test_fp32_parameters_have_no_master_and_half_ones_none_unless_asked() -> None:
    def train(backend: Backend) -> list[set[str]]:
        mixed = [Parameter(torch.ones(5, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float16)]
        plain = Parameter(torch.ones(5).bfloat16())
        groups = [{"params": mixed}, {"params": [plain], "master_weights": False}]
        optimizer = OnebitAdam(groups, freeze_step=2, master_weights=True, backend=backend)
        for number in range(5):
            step(optimizer, gradients([*mixed, plain], backend.rank, number))
        for p in mixed:
            assert optimizer.state[p].get("master", torch.zeros(())).dtype == torch.float32
        return [{"master"} & set(optimizer.state[p]) for p in [*mixed, plain]]

    for world_size in (1, 2):
        assert run_threads(world_size, train) == [[set(), {"master"}, {"master"}, set()]] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_are_saved_and_a_resumed_run_is_bit_equal(world_size: int) -> None:
    def make(backend: Backend) -> tuple[OnebitAdam, list[Parameter]]:
        params = parameters(dtype=torch.bfloat16)
        return OnebitAdam(params, backend=backend, master_weights=True, **OPTIONS), params

    def train(backend: Backend) -> None:
        optimizer, params = make(backend)
        seen, checkpoints = [], []
        for number in range(9):
            held = {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
            checkpoints.append(through_a_file(held))
            step(optimizer, gradients(params, backend.rank, number))
            seen.append((contents(optimizer), feedback(optimizer)))
        for start in range(9):
            optimizer, params = make(backend)
            with torch.no_grad():
                for p, value in zip(params, checkpoints[start]["params"], strict=True):
                    p.copy_(value)
            optimizer.load_state_dict(checkpoints[start]["optimizer"])
            for number in range(start, 9):
                step(optimizer, gradients(params, backend.rank, number))
                assert (contents(optimizer), feedback(optimizer)) == seen[number]

    run_threads(world_size, train)


def test_a_state_without_masters_is_taken_and_they_start_as_the_parameters() -> None:
    def train(backend: Backend) -> None:
        params = [Parameter(values(0, shape=(40,)).bfloat16())]
        plain = OnebitAdam(params, freeze_step=9, backend=backend)
        step(plain, gradients(params, backend.rank, 0))
        saved = through_a_file(plain.state_dict())
        for group in saved["param_groups"]:
            del group["master_weights"]
        optimizer = OnebitAdam(params, freeze_step=9, lr=1e-6, master_weights=True, backend=backend)
        optimizer.load_state_dict(saved)
        before = params[0].detach().clone()
        optimizer.param_groups[0]["lr"] = 1e-6
        step(optimizer, gradients(params, backend.rank, 1))
        master = optimizer.state[params[0]]["master"]
        assert master.dtype == torch.float32
        assert 0 < float((master - before.float()).abs().max()) <= 2e-6
        assert bits(params[0]) == bits(before)

    run_threads(2, train)
