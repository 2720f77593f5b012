"""FusedAdam on a GPU: the suite that also runs without one, and what only a GPU has: streams, graphs, its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from onebit.compress import InputError
from onebit.optim import FusedAdam
from tests.optim.fused_adam_suite import (
    SHAPES,
    FusedAdamSuite,
    Make,
    assert_near,
    bits,
    everything,
    parameters,
    set_gradients,
    twins,
)

DEVICE = "cuda"


@pytest.fixture
def device() -> str:
    return DEVICE


class TestOnAGpu(FusedAdamSuite):
    @pytest.fixture
    def make(self) -> Make:
        return FusedAdam


def with_gradients(seed: int, **options: Any) -> tuple[list[Tensor], FusedAdam]:
    """Parameters that keep their gradients' memory, and an optimizer that has made one step."""
    params = parameters(SHAPES, DEVICE) + parameters(SHAPES, DEVICE, torch.bfloat16)
    optimizer = FusedAdam(params, **options)
    set_gradients(seed, params)
    optimizer.step()
    return params, optimizer


def refill(seed: int, params: list[Tensor]) -> None:
    """New gradients in the memory of the old ones."""
    others = twins(params)
    set_gradients(seed, others)
    for p, other in zip(params, others, strict=True):
        assert p.grad is not None
        assert other.grad is not None
        p.grad.copy_(other.grad)


def differing(a: list[bytes], b: list[bytes]) -> list[int]:
    return [index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]


def test_our_kernels_are_used() -> None:
    assert FusedAdam(parameters([(3,)], DEVICE)).kernels == "gpu"


def test_torchs_fused_kernel_agrees() -> None:
    params = parameters(SHAPES, DEVICE)
    theirs = twins(params)
    optimizer, reference = FusedAdam(params, weight_decay=0.0), torch.optim.AdamW(theirs, weight_decay=0.0, fused=True)
    for step in range(100):
        set_gradients(step, params, theirs)
        optimizer.step()
        reference.step()
    for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
        assert_near(p, q, 0.1, f"parameter {i}")


def test_ten_thousand_small_tensors_are_all_updated() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    flat = torch.randn(2, 10_000, 1000, device=DEVICE, generator=generator)
    params, theirs = ([row.clone().requires_grad_() for row in flat[0]] for _ in range(2))
    for p, q, g in zip(params, theirs, flat[1], strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    optimizer, reference = FusedAdam(params), torch.optim.AdamW(theirs)
    for _ in range(3):
        optimizer.step()
        reference.step()
    assert_near(torch.stack([p.detach() for p in params]), torch.stack([q.detach() for q in theirs]), 0.1, "all")


@pytest.mark.parametrize("case", ["same", "new gradients", "new lr", "lr on the device", "found_inf", "no gradient"])
def test_nothing_waits_for_the_device(case: str) -> None:
    lr = torch.tensor(1e-3, device=DEVICE) if case == "lr on the device" else 1e-3
    params, optimizer = with_gradients(0, lr=lr)
    found_inf = torch.zeros((), device=DEVICE)
    new = [p.grad.clone() if p.grad is not None else None for p in params]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if case == "new gradients":
            for p, g in zip(params, new, strict=True):
                p.grad = g
        if case == "new lr":
            optimizer.param_groups[0]["lr"] = 1e-4
        if case == "found_inf":
            optimizer.found_inf = found_inf
        if case == "no gradient":
            params[0].grad = None
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_allocated_after_the_first_step() -> None:
    _, optimizer = with_gradients(0)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 0


def test_the_state_is_two_fp32_moments_and_a_step_needs_next_to_nothing_beside_it() -> None:
    numel = 64 << 20
    p = torch.zeros(numel, device=DEVICE, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = FusedAdam([p])
    before = torch.cuda.memory_allocated()
    optimizer.step()
    kept = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    now = torch.cuda.memory_allocated()
    optimizer.step()
    peak = torch.cuda.max_memory_allocated() - now
    assert 8 <= kept / numel < 8.05, f"{kept / numel} bytes per parameter"
    assert peak / numel < 0.01, f"{peak / numel} bytes per parameter during a step"


@pytest.mark.parametrize("master", [False, True])
def test_replays_of_a_captured_step_are_eager_steps_bit_for_bit(master: bool) -> None:
    rates = [torch.tensor(1e-3, device=DEVICE) for _ in range(2)]
    (params, eager), (others, captured) = (
        with_gradients(0, lr=lr, capturable=True, master_weights=master) for lr in rates
    )
    for o in (eager, captured):
        o.found_inf, o.grad_scale = torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 8):
        for of in (params, others):
            refill(step, of)
        for lr, o in zip(rates, (eager, captured), strict=True):
            lr.fill_(1e-3 / step)
            o.found_inf.fill_(float(step == 3))
            o.grad_scale.fill_(2.0**step)
        eager.step()
        if step == 5:  # an eager step between replays
            captured.step()
        else:
            graph.replay()
        wrong = differing(everything(eager), everything(captured))
        assert not wrong, f"step {step}: entries {wrong} of {len(everything(eager))} differ"
    assert {float(captured.state[p]["step"]) for p in others} == {7.0}


def test_a_whole_iteration_may_be_captured_with_gradients_that_it_makes_itself() -> None:
    def iteration(params: list[Tensor], optimizer: FusedAdam, x: Tensor) -> None:
        optimizer.zero_grad()
        w, b, v = params  # no product of matrices: its algorithm may differ between a graph and a stream
        ((x * w + b).tanh() * v).square().mean().backward()
        optimizer.step()

    models = [parameters([(64,), (64,), (32, 64)], DEVICE) for _ in range(2)]
    optimizers = [FusedAdam(m, lr=0.01, capturable=True) for m in models]
    x = torch.randn(32, 64, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for m, o in zip(models, optimizers, strict=True):
                iteration(m, o, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[1].zero_grad()
    with torch.cuda.graph(graph):
        iteration(models[1], optimizers[1], x)
    for step in range(5):
        x.normal_()
        iteration(models[0], optimizers[0], x)
        graph.replay()
        wrong = differing(everything(optimizers[0]), everything(optimizers[1]))
        assert not wrong, f"step {step}: entries {wrong} differ"


@pytest.mark.parametrize("why", ["not capturable", "no step before"])
def test_a_capture_that_cannot_work_is_refused(why: str) -> None:
    params = parameters(SHAPES, DEVICE)
    set_gradients(0, params)
    optimizer = FusedAdam(params, capturable=why != "not capturable")
    if why == "not capturable":
        optimizer.step()
    before = bits(params)
    torch.cuda.synchronize()
    message = "capturable=True" if why == "not capturable" else "before the capture"
    with pytest.raises(InputError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert bits(params) == before


def test_a_step_runs_on_the_current_stream() -> None:
    (params, optimizer), (expected, reference) = with_gradients(0), with_gradients(0)
    refill(1, expected)
    reference.step()
    new = [p.grad.clone() for p in expected if p.grad is not None]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # without the stream's order, the step would read gradients before they are there
        torch._foreach_copy_([p.grad for p in params if p.grad is not None], new)
        optimizer.step()
    stream.synchronize()
    wrong = differing(bits(params), bits(expected))
    assert not wrong, f"parameters {wrong} differ"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("current", [0, 1])
def test_parameters_on_two_devices_are_updated_by_one_optimizer_whatever_the_current_device(current: int) -> None:
    spread = parameters(SHAPES, "cuda:0") + parameters(SHAPES, "cuda:1")
    together = twins([p.to(DEVICE) for p in spread])
    with torch.cuda.device(current):
        optimizer, reference = FusedAdam(spread), FusedAdam(together)
        scaler = torch.ones((), device="cuda:0")
        optimizer.grad_scale = reference.grad_scale = 4 * scaler
        for step in range(4):
            optimizer.found_inf = reference.found_inf = scaler * float(step == 1)
            set_gradients(step, spread, together)
            optimizer.step()
            reference.step()
        assert torch.cuda.current_device() == current
    for device in range(2):
        torch.cuda.synchronize(device)
    wrong = differing(bits(spread), bits(together))
    assert not wrong, f"parameters {wrong} of {len(spread)} differ"


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    numel = 2**31 + 5003
    if torch.cuda.mem_get_info()[0] < 15 * numel:
        pytest.skip("needs 32 GB of free memory")
    p = torch.empty(numel, dtype=torch.bfloat16, device=DEVICE).uniform_(-1, 1)
    grad = torch.empty_like(p).uniform_(-1, 1)
    where = [slice(0, 5000), slice(2**30 - 2500, 2**30 + 2500), slice(2**31 - 2500, 2**31 + 2500), slice(-5000, None)]
    parts = [p[s].clone().requires_grad_() for s in where]
    for part, s in zip(parts, where, strict=True):
        part.grad = grad[s].clone()
    p.requires_grad_()
    p.grad = grad
    optimizer, reference = FusedAdam([p], lr=0.1), FusedAdam(parts, lr=0.1)
    for _ in range(2):
        optimizer.step()
        reference.step()
    for part, s in zip(parts, where, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key][s], reference.state[part][key]), f"{key} of {s}"
        assert torch.equal(p.detach()[s], part.detach()), f"parameter, {s}"


def test_without_cupy_torchs_kernel_runs_and_says_so_once() -> None:
    script = """
import sys, logging, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'cupy':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
logging.basicConfig()
from onebit.optim import FusedAdam
for dtype in (torch.float32, torch.bfloat16):
    p = torch.ones(5000, dtype=dtype, device='cuda', requires_grad=True)
    q = torch.ones(5000, dtype=torch.float32, device='cuda', requires_grad=True)
    ours, theirs = FusedAdam([p]), torch.optim.AdamW([q], fused=True)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    ours.found_inf, ours.grad_scale = torch.zeros(1, device='cuda'), torch.ones(1, device='cuda')
    ours.step()
    theirs.step()
    assert ours.kernels == 'torch'
    assert torch.equal(p, q.to(dtype)), (p, q)
    assert float(ours.state[p]['step']) == 1
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("CuPy") == 1, run.stderr
