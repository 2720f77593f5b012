"""OnebitLamb on CUDA tensors: as on the CPU, equal on all ranks, and no number of a tensor waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import OnebitLamb, lamb, onebit_lamb
from tests.comm.samples import bits
from tests.optim.samples import contents, gradients, parameters, step

STEPS, FREEZE = 20, 8


def train(backend: Backend, device: str, dtype: torch.dtype) -> tuple[list[list[float]], Any, dict[str, list[float]]]:
    """Parameters after every step, all state at the end bit by bit, and the coefficients."""
    params = [Parameter(p.detach().to(device)) for p in parameters(dtype=dtype)]
    optimizer = OnebitLamb(params, lr=1e-2, freeze_step=FREEZE, backend=backend)
    seen = []
    for number in range(STEPS):
        given = gradients(params, backend.rank, number)
        step(optimizer, [None if g is None else g.to(device) for g in given])
        seen.append([x for p in params for x in p.detach().double().reshape(-1).tolist()])
    told = {name: row.tolist() for name, row in optimizer.lamb_coefficients().items()}
    return seen, contents_on_host(optimizer), told


def contents_on_host(optimizer: OnebitLamb) -> Any:
    copies = {p: Parameter(p.detach().cpu()) for group in optimizer.param_groups for p in group["params"]}
    on_host = OnebitLamb(list(copies.values()), freeze_step=FREEZE)
    for p, copy in copies.items():
        on_host.state[copy] = {key: value.cpu() for key, value in optimizer.state[p].items()}
    return contents(on_host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_does_what_it_does_on_the_cpu_and_the_same_on_all_ranks(world_size: int, dtype: torch.dtype) -> None:
    on_gpu = run_threads(world_size, train, "cuda", dtype)
    on_cpu = run_threads(world_size, train, "cpu", dtype)
    assert all(one[1:] == on_gpu[0][1:] for one in on_gpu)
    # The norms are added up in another order. Single signs that rounding decides may differ, each by two scales times
    # lr·c/√v, of which some per cent of a parameter come in these few steps; warm-up has no signs.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    warm_gpu, warm_cpu = torch.tensor(on_gpu[0][0][FREEZE - 1]), torch.tensor(on_cpu[0][0][FREEZE - 1])
    off = float((warm_gpu - warm_cpu).abs().max())
    assert off <= tolerance * float(warm_cpu.abs().max()), f"warm-up is off by {off}"
    last_gpu, last_cpu = torch.tensor(on_gpu[0][0][-1]), torch.tensor(on_cpu[0][0][-1])
    relative = float((last_gpu - last_cpu).norm() / last_cpu.norm())
    assert relative <= 0.05, f"{relative}; coefficients {on_gpu[0][2]} and {on_cpu[0][2]}"


def test_neither_phase_waits_for_the_device_between_the_average_and_the_new_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for phase in (onebit_lamb._Dense, onebit_lamb._Compressed):
        original = phase.commit

        def strict(self: Any, original: Any = original) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                original(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(phase, "commit", strict)
    params = [Parameter(torch.randn(n, device="cuda")) for n in (5, 1000, 70_000)]
    optimizer = OnebitLamb(params, freeze_step=4)
    for number in range(10):
        step(optimizer, [torch.randn_like(p) for p in params])
        assert optimizer.phase() == ("warmup" if number < 3 else "compressed")
    assert bits([p.detach().cpu() for p in params]) != bits([torch.zeros(n) for n in (5, 1000, 70_000)])


@pytest.mark.parametrize("numel", [1, 1025, 30_000_001])
def test_norms_are_accurate(numel: int) -> None:
    x = torch.randn(numel, device="cuda", generator=torch.Generator("cuda").manual_seed(numel))
    assert float(lamb.norms([x])) == pytest.approx(float(x.double().norm()), rel=1e-5)
