"""Parameters in half precision have the fp32 moments of fp32 parameters, and are rounded once a step or interval."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitAdam
from tests.comm.samples import bits
from tests.optim.samples import Gradients, gradients, parameters, step


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
