"""ZeroOneAdam on CUDA, two ranks on one device: the way that two ranks on the CPU go, and resumed bit for bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import ZeroOneAdam

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "var_freeze_step": 8,
    "var_update_scaler": 2,
    "local_step_scaler": 3,
    "local_step_clipper": 4,
}
STEPS = 30


def made(seed: int, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to("cuda")


def train(backend: Backend, device: str, dtype: torch.dtype, bad: bool) -> tuple[list[list[Tensor]], list[str], int]:
    shapes = ((300, 40), (7,), (4, 3, 5, 6))
    params = []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device, dtype)
        params.append(Parameter(x.to(memory_format=torch.channels_last) if len(shape) == 4 else x))
    optimizer = ZeroOneAdam(params, backend=backend, **OPTIONS)
    seen, kinds = [], []
    for number in range(STEPS):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(1000 * number + 10 * i + backend.rank)
            g = torch.randn(p.shape, generator=generator) + 0.5
            if i == 0:
                g[:20] = 0.0  # dead
            if bad and number in (19, 24) and backend.rank == 1:
                g.view(-1)[-1] = math.inf
            p.grad = g.to(device, dtype)
        kinds.append(optimizer.phase())
        optimizer.step()
        seen.append([p.detach().cpu().float().clone() for p in params])
    return seen, kinds, optimizer.left_out_steps


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_ranks_on_a_gpu_go_the_way_of_two_on_the_cpu(dtype: torch.dtype, bad: bool) -> None:
    on_gpu, on_cpu = (run_threads(2, train, device, dtype, bad) for device in ("cuda", "cpu"))
    for rank in range(2):
        assert on_gpu[rank][1:] == on_cpu[rank][1:]
        assert on_gpu[rank][2] == (2 if bad and rank == 1 else 0)
    kinds = on_gpu[0][1]
    assert {"variance", "sync", "local"} == set(kinds)
    for number, kind in enumerate(kinds):
        equal = all(torch.equal(a, b) for a, b in zip(on_gpu[0][0][number], on_gpu[1][0][number], strict=True))
        assert equal == (kind != "local"), f"step {number + 1}, {kind}"
        for seen, expected in zip(on_gpu[0][0][number], on_cpu[0][0][number], strict=True):
            # 30 steps of about lr, each rounded a few times, and the parameter's own rounding.
            close = torch.isclose(seen, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
            worst = float((seen - expected).abs().max())
            # A sign that rounding decides differently moves an entry by a step.
            assert float(close.float().mean()) > 0.99, f"step {number + 1}, {kind}: {worst} off at worst"
            assert worst < 0.1, f"step {number + 1}, {kind}"


def test_a_run_saved_in_the_middle_of_an_interval_resumes_bit_for_bit() -> None:
    def resume(backend: Backend) -> None:
        p = Parameter(made(1, 5000))
        optimizer = ZeroOneAdam([p], backend=backend, **OPTIONS)
        other_p, other = None, None
        for number in range(STEPS):
            g = made(1000 + 2 * number + backend.rank, 5000)
            if number == 20:  # in the middle of an interval
                assert optimizer.phase() == "local"
                other_p = Parameter(p.detach().clone())
                other = ZeroOneAdam([other_p], backend=backend, **OPTIONS)
                other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch takes tensors as they are
            for param, stepped in ((p, optimizer), (other_p, other)):
                if param is not None and stepped is not None:
                    param.grad = g.clone()
                    stepped.step()
            if other_p is not None:
                assert torch.equal(p, other_p), f"step {number + 1}"

    run_threads(2, resume)
