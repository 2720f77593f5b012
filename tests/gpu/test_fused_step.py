"""OnebitAdam's fused step on CUDA: the CPU's numbers, the same bits on all ranks, no waiting, little memory, graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.launcher import run_ranks
from tests.optim.samples import all_params, parameters, patchy, step, through_a_file, values

FREEZE = 3
LARGE = 1 << 25
UNIT = 2.0**-24  # one rounding to fp32, relative
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "coupled decay, maximize": {"adamw_mode": False, "weight_decay": 0.1, "maximize": True},
    "buckets": {"bucket_mb": 0.01},
    "one scale a tensor": {"codec": SignCodec(block_size=None, scale="rms")},
    "no bias correction": {"bias_correction": False},
}
WORLD_SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]


def start(device: str, dtype: torch.dtype) -> list[Parameter]:
    """Small tensors of any strides, one larger than a block with dead entries, one of many blocks, one in bf16."""
    params = [*parameters(dtype=dtype), Parameter(values(20, shape=(40, 60)).to(dtype))]
    params += [Parameter(values(21, shape=(300, 1024)).to(dtype)), Parameter(values(22, shape=(2000,)).bfloat16())]
    return [Parameter(p.detach().to(device)) for p in params]


def given(params: list[Parameter], rank: int, number: int) -> list[Tensor | None]:
    """This rank's gradients, on the parameters' device; some are None, and half of one tensor never has any."""
    made = patchy([p.detach().cpu() for p in params], rank, number)
    dead = made[7]
    if dead is not None:
        dead[values(1, shape=(40, 60)) < 0.5] = 0.0
    return [None if g is None else g.to(p.device) for g, p in zip(made, params, strict=True)]


def gradient(p: Tensor) -> Tensor:
    """The gradient in place, flat."""
    assert p.grad is not None
    return p.grad.view(-1)


def make(params: list[Parameter], backend: Backend, **options: Any) -> OnebitAdam:
    return OnebitAdam(params, **{"lr": 1e-2, "freeze_step": FREEZE, **options}, backend=backend)


def warmed_up(backend: Backend, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Parameters and state on the CPU, two compressed steps after the freeze."""
    params = start("cpu", dtype)
    optimizer = make(params, backend, **options)
    for number in range(FREEZE + 2):
        step(optimizer, given(params, backend.rank, number))
    return [p.detach() for p in params], through_a_file(optimizer.state_dict())


def went_on(
    backend: Backend, device: str, begun: tuple[list[Tensor], dict[str, Any]], options: Mapping[str, Any], bad: bool
) -> dict[str, Any]:
    """Load that state on a device and make more steps; with `bad` one of them has an inf on the last rank."""
    params = [Parameter(p.clone().to(device)) for p in begun[0]]
    optimizer = make(params, backend, **options)
    optimizer.load_state_dict(through_a_file(begun[1]))
    for number in range(10, 16):
        mine = given(params, backend.rank, number)
        if bad and number == 13 and backend.rank == backend.size - 1:
            mine[8] = values(5, shape=(300, 1024)).to(device, params[8].dtype)
            mine[8][17, 5] = math.inf
        step(optimizer, mine)
    saved = optimizer.state_dict()
    residual = saved["onebit"]["residuals"][0]
    return {
        "kernels": optimizer.kernels,
        "skipped": optimizer.skipped_steps,
        "step": optimizer.param_groups[0]["step"],
        "steps": [float(saved["state"][i]["step"]) for i in sorted(saved["state"])],
        "params": [p.detach().cpu() for p in params],
        "momenta": [saved["state"][i]["exp_avg"].cpu() for i in sorted(saved["state"])],
        "masters": [saved["state"][i]["master"].cpu() for i in sorted(saved["state"]) if "master" in saved["state"][i]],
        "feedback": [residual["worker"].cpu(), residual["server"].cpu()],
    }


def largest(x: Tensor) -> float:
    return float(x.float().abs().max()) if x.numel() else 0.0


def assert_like_the_cpu(seen: dict[str, Any], right: dict[str, Any], bad: bool, case: str) -> None:
    """Momentum is the same bits: it is made of the same operations; an update may see another last place of 1 - β₁ᵗ."""
    assert (seen["kernels"], right["kernels"]) == ("gpu", "cpu"), case
    for key in ("skipped", "step", "steps"):
        assert seen[key] == right[key], (case, key, seen[key], right[key])
    for key in ("momenta", "feedback", "params", "masters"):
        for i, (one, other) in enumerate(zip(seen[key], right[key], strict=True)):
            where = f"{case}: {key} {i}, {tuple(one.shape)} {one.dtype}"
            off = largest(one.float() - other.float())
            count = int((one != other).sum())
            if key in ("momenta", "feedback") and not bad:
                assert off == 0, f"{where}: {count} of {one.numel()} differ, by up to {off}"
                continue
            unit = UNIT if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
            bound = 8 * unit * max(largest(other), 1.0)
            assert off <= bound, f"{where}: {count} of {one.numel()} differ, by up to {off}, allowed {bound}"


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", OPTIONS)
def test_ranks_that_share_a_device_get_the_numbers_of_ranks_on_the_cpu(variant: str, dtype: torch.dtype) -> None:
    options = {**OPTIONS[variant], "master_weights": dtype == torch.bfloat16}
    # Coupled decay reads parameters, so one last place of them may decide a sign; without, nothing can.
    bad = variant == "coupled decay, maximize"
    begun = run_threads(2, warmed_up, dtype, options)

    def on(device: str) -> list[dict[str, Any]]:
        return run_threads(2, lambda backend: went_on(backend, device, begun[backend.rank], options, False))

    seen, right = on("cuda"), on("cpu")
    for rank in range(2):
        assert_like_the_cpu(seen[rank], right[rank], bad, f"{variant}, rank {rank}")
    for one, other in zip(seen[0]["params"], seen[1]["params"], strict=True):
        assert torch.equal(one, other), f"replicas differ: {int((one != other).sum())} of {one.numel()}"


def test_a_bad_step_is_skipped_by_the_device_as_the_host_skips_it_on_the_cpu() -> None:
    begun = run_threads(2, warmed_up, torch.float32, {})

    def on(device: str) -> list[dict[str, Any]]:
        return run_threads(2, lambda backend: went_on(backend, device, begun[backend.rank], {}, True))

    seen, right = on("cuda"), on("cpu")
    for rank in range(2):
        assert seen[rank]["skipped"] == 1
        assert_like_the_cpu(seen[rank], right[rank], True, f"rank {rank}")


def check_numbers_are_those_of_cpu_ranks(backend: Backend) -> None:
    for bad in (False, True):
        begun = run_threads(backend.size, warmed_up, torch.float32, {})
        right = run_threads(backend.size, lambda b: went_on(b, "cpu", begun[b.rank], {}, bad))  # noqa: B023
        seen = went_on(backend, "cuda", begun[backend.rank], {}, bad)
        assert_like_the_cpu(seen, right[backend.rank], bad, f"bad {bad}")


def check_replicas_are_bit_equal_in_all_phases(backend: Backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = start("cuda", dtype)
        optimizer = make(params, backend, master_weights=dtype != torch.float32, variance_refresh=4)
        for number in range(12):
            step(optimizer, given(params, backend.rank, number))
            mine = torch.cat([p.detach().reshape(-1) for p in params]).view(torch.uint8)
            every = torch.empty(backend.size * mine.numel(), dtype=torch.uint8, device="cuda")
            backend.all_gather(every, mine).wait()
            rows = every.view(backend.size, -1)
            wrong = (rows != mine).sum(1).tolist()
            assert not any(wrong), f"{dtype}, step {number}, {optimizer.phase()}: bytes that differ by rank {wrong}"


def ready(backend: Backend, numel: int = LARGE, **options: Any) -> tuple[OnebitAdam, list[Parameter]]:
    """An optimizer of one large tensor and small ones, two compressed steps after the freeze."""
    params = [Parameter(torch.zeros(shape, device="cuda")) for shape in [(numel,), (1000, 7), (1,), ()]]
    optimizer = make(params, backend, **{"freeze_step": 1, **options})
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(backend.rank))
    for _ in range(3):
        optimizer.step()
    return optimizer, params


def check_a_step_waits_for_nothing_good_or_bad(backend: Backend) -> None:
    optimizer, params = ready(backend, 1 << 20)
    assert optimizer.phase() == "compressed"
    with no_synchronisation():
        for number in range(6):
            gradient(params[0])[77:78].fill_(torch.nan if number in (2, 3) and backend.rank == 0 else 1.0)
            optimizer.step()
    assert optimizer.skipped_steps == 2
    assert optimizer.param_groups[0]["step"] == 7
    assert {float(optimizer.state[p]["step"]) for p in params} == {7.0}
    torch.cuda._sleep(2_000_000_000)  # about a second
    begun = time.monotonic()
    optimizer.step()
    host = time.monotonic() - begun
    assert host < 0.3, f"the host took {host:.3f} s for a step behind a busy device"


def check_a_skipped_step_changes_no_bit_but_error_feedbacks_last(backend: Backend) -> None:
    optimizer, params = ready(backend, 1 << 20)
    before, values_before = optimizer.state_dict(), [p.detach().clone() for p in params]
    for number in range(4):
        gradient(params[number % 2])[5] = torch.inf if backend.rank == backend.size - 1 else 1.0
        optimizer.step()
        gradient(params[number % 2])[5] = 1.0
    after = optimizer.state_dict()
    assert optimizer.skipped_steps == 4
    for p, value in zip(params, values_before, strict=True):
        assert torch.equal(p, value)
    for i, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][i][key]), (i, key)
    was, now = (state["onebit"]["residuals"][0] for state in (before, after))
    for part in ("worker", "server"):
        off = largest(was[part] - now[part])
        # As in the CPU's test: 4 steps of fewer than 8 + 4n roundings of numbers up to ten times the residuals.
        bound = 4 * (8 + 4 * backend.size) * UNIT * 10 * largest(was[part])
        assert off <= bound, (part, off, bound)


def check_memory(backend: Backend) -> None:
    for coupled in (False, True):
        optimizer, params = ready(backend, adamw_mode=not coupled)
        numel = sum(p.numel() for p in params)
        (fused,) = optimizer._fused.values()
        residual = optimizer._reducers[0].residual
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        state += [fused.payload(part) for part in fused.reduce.parts]
        state += [part.mask for part in fused.reduce.parts if part.mask is not None]
        held = sum(t.numel() * t.element_size() for t in [*state, *residual.worker, *residual.server])
        assert held <= (8.2 + 4 / backend.size) * numel, f"{held / numel:.3f} bytes of state per parameter"
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        taken = (torch.cuda.max_memory_allocated() - before) / numel
        wire = sum(part.sent.numel() for part in fused.reduce.parts) * (3 + 1 / backend.size) / numel
        assert taken + wire <= 0.5, f"{taken:.4f} new bytes per parameter in a step, {wire:.4f} in buffers of the wire"
        del optimizer, params, fused, residual, state
        torch.cuda.empty_cache()


def check_the_work_of_a_step_can_be_captured_and_replayed(backend: Backend) -> None:
    """What an exchange launches, collectives included; the host's counts are nobody's in a replay."""
    eager, eager_params = ready(backend, 1 << 20)
    optimizer, params = ready(backend, 1 << 20)

    def work() -> None:
        with torch.no_grad():
            exchange: Any = optimizer._exchange(optimizer.param_groups[0], optimizer._of_groups()[0])
            exchange.sending.finish()
            exchange.settle(exchange.all_finite())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for number in range(4):
        for p, q in zip(params, eager_params, strict=True):
            if number:
                gradient(p).mul_(0.5)
                gradient(q).copy_(gradient(p))
            if number == 2:
                gradient(p)[0] = gradient(q)[0] = torch.nan if backend.rank == 0 else 1.0
        if number:
            graph.replay()
        eager.step()
        if number == 2:
            for p in (*params, *eager_params):
                gradient(p)[0] = 1.0
        torch.cuda.synchronize()
        for i, (p, q) in enumerate(zip(params, eager_params, strict=True)):
            wrong = int((p != q).sum())
            assert not wrong, f"after {number} replays {wrong} of {p.numel()} of parameter {i} differ from eager steps"
    assert eager.skipped_steps == 1
    (fused,) = optimizer._fused.values()
    assert fused.steps.unique().tolist() == [6.0]  # 3, the one on the side, and 2 of 3 replays


CHECKS: list[Check] = [
    check_numbers_are_those_of_cpu_ranks,
    check_replicas_are_bit_equal_in_all_phases,
    check_a_step_waits_for_nothing_good_or_bad,
    check_a_skipped_step_changes_no_bit_but_error_feedbacks_last,
    check_memory,
    check_the_work_of_a_step_can_be_captured_and_replayed,
]


@pytest.fixture(scope="module", params=WORLD_SIZES)
def failures(request: pytest.FixtureRequest) -> list[Failures]:
    return run_ranks("nccl", request.param, failures_of, CHECKS, timeout=240.0)


@pytest.mark.skipif(not WORLD_SIZES, reason="needs two CUDA devices")
@pytest.mark.parametrize("check", CHECKS, ids=short)
def test_over_nccl(failures: list[Failures], check: Check) -> None:
    assert_passed(failures, check.__name__)


def test_one_rank_compresses_nothing_and_steps_as_torch_does() -> None:
    params, twins = ([Parameter(values(0, shape=(300, 40)).cuda())] for _ in range(2))

    def train(backend: Backend) -> None:
        optimizer, torchs = make(params, backend), torch.optim.AdamW(twins, lr=1e-2)
        assert optimizer.kernels == "torch"
        for number in range(FREEZE):
            g = values(1, number, shape=(300, 40)).cuda()
            params[0].grad, twins[0].grad = g, g.clone()
            optimizer.step()
            torchs.step()
        assert all(torch.equal(p, q) for p, q in zip(all_params(optimizer), twins, strict=True))

    run_threads(1, train)
