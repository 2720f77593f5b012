"""Parameters in half precision have the fp32 moments of fp32 parameters, and are rounded once a step or interval."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam, ZeroOneAdam
from tests.comm.samples import bits, state_bits
from tests.optim.samples import Gradients, gradients, parameters, step
from tests.optim.zero_one_runs import KINDS, SOON, saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_half_precision_parameters_have_the_fp32_moments_of_fp32_parameters_and_are_rounded_once_a_step(
    world_size: int, dtype: torch.dtype
) -> None:
    def exact(params: Sequence[Tensor], rank: int, number: int) -> Gradients:  # the same in fp32 and in half precision
        return [g.to(dtype).to(p.dtype) for p, g in zip(params, gradients(parameters(), rank, number), strict=True)]

    def train(backend: Backend) -> None:
        full, half = parameters(), parameters(dtype=dtype)
        reference = OnebitAdam(full, freeze_step=4, lr=1e-2, backend=backend)
        optimizer = OnebitAdam(half, freeze_step=4, lr=1e-2, backend=backend)
        for number in range(10):
            with torch.no_grad():
                for p, h in zip(full, half, strict=True):
                    p.copy_(h)  # from the same rounded start at each step
            step(reference, exact(full, backend.rank, number))
            step(optimizer, exact(half, backend.rank, number))
            for p, h in zip(full, half, strict=True):
                assert h.dtype == dtype
                assert bits(h) == bits(p.detach().to(dtype))
                for key, value in reference.state[p].items():
                    assert value.dtype == torch.float32
                    assert bits(optimizer.state[h][key]) == bits(value)

    run_threads(world_size, train)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_of_half_precision_parameters_go_the_way_of_fp32_parameters(
    world_size: int, dtype: torch.dtype
) -> None:
    def exact(params: Sequence[Tensor], rank: int, number: int) -> Gradients:  # the same in fp32 and in half precision
        return [g.to(dtype).to(p.dtype) for p, g in zip(params, gradients(parameters(), rank, number), strict=True)]

    def train(backend: Backend) -> None:
        full = [Parameter(p.detach().float()) for p in parameters(dtype=dtype)]
        half = parameters(dtype=dtype)
        reference = ZeroOneAdam(full, backend=backend, **SOON)
        optimizer = ZeroOneAdam(half, backend=backend, master_weights=True, **SOON)
        for number, kind in enumerate(KINDS):
            step(reference, exact(full, backend.rank, number))
            step(optimizer, exact(half, backend.rank, number))
            for p, h, state, other in zip(full, half, saved(reference), saved(optimizer), strict=True):
                assert h.dtype == dtype
                assert bits(h) == bits(p.detach().to(dtype)), f"step {number + 1}"
                for key, value in state.items():
                    if key != "interval_start":
                        assert state_bits(other[key]) == state_bits(value)
                if kind != "local" or world_size == 1:
                    assert bits(other["master"]) == bits(p)

    run_threads(world_size, train)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_masters_an_interval_is_rounded_once_at_its_end(dtype: torch.dtype) -> None:
    def train(backend: Backend) -> None:
        # Numbers below 1 are eps / 2 apart: two of these steps are rounded away together, three are not.
        small = torch.finfo(dtype).eps / 8 * 0.9
        p = Parameter(torch.ones(64, dtype=dtype))
        options = {**SOON, "weight_decay": 0.0, "lr": small}
        optimizer = ZeroOneAdam([p], backend=backend, **options)
        for number in range(len(KINDS)):
            step(optimizer, [torch.ones(64)])
            assert bool((p < 1).all()) == (number >= 17), f"step {number + 1}: {p[0]}"

    run_threads(2, train)
