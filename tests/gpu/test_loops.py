"""Training loops on CUDA: mixed precision, compiled models, CUDA graphs, copies, layers unfrozen late, and workers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.utils.data import DataLoader, TensorDataset

from onebit.comm import Backend, InputError, run_threads
from tests.comm.checks import Check, Failures, assert_passed, failures_of, short
from tests.comm.launcher import run_ranks
from tests.optim.loops import KINDS, STEPS, WARM_UP, assert_equal_on_ranks, backward, batch, make, network, settled
from tests.optim.samples import contents, values

WIDE = 1500  # layers of more than one block of 1024, and of less
DEVICES = torch.cuda.device_count()


def model_on_device() -> nn.Module:
    return network(WIDE).cuda()


def data(rank: int, number: int) -> tuple[Tensor, Tensor]:
    x, y = batch(rank, number, rows=64)
    return x.cuda(), y.cuda()


def loss_on_device(model: Callable[[Tensor], Tensor], rank: int, number: int) -> Tensor:
    x, y = data(rank, number)
    return nn.functional.mse_loss(model(x).float(), y)


def train_step(model: nn.Module, optimizer: Any, rank: int, number: int) -> None:
    optimizer.zero_grad()
    backward(loss_on_device(model, rank, number))
    optimizer.step()


def furthest(made: nn.Module, expected: nn.Module) -> float:
    """The largest difference of two models' parameters."""
    pairs = zip(made.parameters(), expected.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def differing(made: list[Any], expected: list[Any]) -> list[int]:
    """Which parameters' contents are not the same bits."""
    return [i for i, (a, b) in enumerate(zip(made, expected, strict=True)) if a != b]


# --- mixed precision


def amp_run(backend: Backend, kind: str, dtype: torch.dtype) -> tuple[float, int, float, str]:
    """The error after 60 steps that were made, the number of skipped ones, the last scale and what differs on ranks."""
    model = model_on_device()
    optimizer = make(kind, model.parameters(), backend, lr=2e-2 if kind == "OnebitLamb" else 2e-3)
    scaler = GradScaler("cuda", init_scale=2.0**14, growth_interval=5, enabled=dtype == torch.float16)
    number = calls = 0
    while number < 60 and calls < 200:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = loss_on_device(model, backend.rank, number)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        calls += 1
        number = calls - optimizer.skipped_steps  # a skipped step is made again with the same data
    settled(optimizer)
    try:
        assert_equal_on_ranks(backend, list(model.parameters()))
        differs = ""
    except AssertionError as error:
        differs = str(error)
    with torch.no_grad():
        return float(loss_on_device(model, 1000, 0)), optimizer.skipped_steps, scaler.get_scale(), differs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_trains_as_fp32_does_and_ranks_stay_equal(kind: str, dtype: torch.dtype) -> None:
    (full, *_), _ = run_threads(2, amp_run, kind, torch.float32)
    before = float(loss_on_device(model_on_device(), 1000, 0).detach())
    results = run_threads(2, amp_run, kind, dtype)
    told = f"fp32 {full:.4f}, untrained {before:.4f}, (error, skipped, scale, differs) by rank: {results}"
    for error, skipped, _, differs in results:
        assert not differs, told
        # bf16 rounds activations to a part in 256: after 60 steps about a per cent of the error.
        assert error == pytest.approx(full, rel=0.1), told
        assert error < 0.7 * before, told
        assert bool(skipped) == (dtype == torch.float16), told


# --- compiled models


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_compiled_by_inductor_is_trained_as_the_eager_one(kind: str) -> None:
    eager, compiled = model_on_device(), model_on_device()
    called = torch.compile(compiled)
    optimizers = [make(kind, m.parameters(), "single") for m in (eager, compiled)]

    @torch.compile
    def compiled_step() -> None:  # leaves the optimizer's step to Python
        optimizers[1].step()

    for number in range(STEPS):
        train_step(eager, optimizers[0], 0, number)
        optimizers[1].zero_grad()
        backward(loss_on_device(called, 0, number))
        compiled_step()
    apart = furthest(compiled, eager)
    # Sums in another order: entries whose gradient is next to 0 may move the other way, by 1e-2, in a step or two.
    assert apart < 0.05, apart
    pairs = zip(compiled.parameters(), eager.parameters(), strict=True)
    mean = max(float((a - b).detach().abs().mean()) for a, b in pairs)
    assert mean < 1e-4, mean


# --- CUDA graphs


@pytest.mark.parametrize("steps_before", [0, 2, WARM_UP + 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_capture_of_a_step_is_refused_and_harms_nothing(kind: str, steps_before: int) -> None:
    (model, optimizer), (twin, undisturbed) = (
        (m, make(kind, m.parameters(), "single")) for m in (model_on_device(), model_on_device())
    )
    for number in range(steps_before):
        train_step(model, optimizer, 0, number)
        train_step(twin, undisturbed, 0, number)
    optimizer.zero_grad()
    backward(loss_on_device(model, 0, steps_before))
    before = contents(optimizer)
    torch.cuda.synchronize()
    with (
        pytest.raises(InputError, match=r"a CUDA graph is being captured.* call step after each replay"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    assert contents(optimizer) == before
    optimizer.step()
    train_step(twin, undisturbed, 0, steps_before)
    assert contents(optimizer) == contents(undisturbed)


def replayed_run(backend: Backend, kind: str) -> str:
    """Forward and backward in a graph, steps outside of it; what is wrong beside an eager run, if anything."""
    model, eager = model_on_device(), model_on_device()
    optimizer, reference = (make(kind, m.parameters(), backend) for m in (model, eager))
    x, y = data(backend.rank, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch's own notes on CUDA graphs ask
        for _ in range(3):
            model.zero_grad()
            backward(nn.functional.mse_loss(model(x), y))
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        backward(nn.functional.mse_loss(model(x), y))
    for number in range(STEPS):
        for static, fresh in zip((x, y), data(backend.rank, number), strict=True):
            static.copy_(fresh)
        graph.replay()
        optimizer.step()
        train_step(eager, reference, backend.rank, number)
    settled(optimizer)
    settled(reference)
    assert_equal_on_ranks(backend, list(model.parameters()))
    apart = furthest(model, eager)
    # The same kernels; should a library pick others in a capture, entries next to 0 may move the other way in a step.
    return "" if apart < 0.05 else f"replays and eager steps are {apart} apart"


@pytest.mark.parametrize("kind", KINDS)
def test_steps_after_replays_of_forward_and_backward_are_those_of_an_eager_loop(kind: str) -> None:
    assert run_threads(1, replayed_run, kind) == [""]


# --- copies, and layers that are unfrozen late


@pytest.mark.parametrize("after", [2, WARM_UP + 1, WARM_UP + 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_any_phase_goes_on_as_the_original_does(kind: str, after: int) -> None:
    def train(backend: Backend) -> None:
        model = model_on_device()
        optimizer = make(kind, model.parameters(), backend)
        for number in range(after):
            train_step(model, optimizer, backend.rank, number)
        other, copied = copy.deepcopy((model, optimizer))
        for number in range(after, STEPS):
            train_step(model, optimizer, backend.rank, number)
            train_step(other, copied, backend.rank, number)
            wrong = differing(contents(copied), contents(optimizer))
            assert not wrong, f"step {number + 1}: parameters {wrong} of the copy differ, {furthest(other, model)}"

    run_threads(2, train)


def given(params: list[Parameter], rank: int, number: int) -> list[Tensor]:
    return [values(7, i, number, rank, shape=tuple(p.shape)).cuda() for i, p in enumerate(params)]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_unfrozen_after_the_freeze_warm_up_and_the_others_do_not_notice(kind: str) -> None:
    plain = {"variance_refresh": None} if kind == "OnebitAdam" else {}

    def step(optimizer: Any, gradients: list[Tensor | None]) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, g in zip(params, gradients, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()

    def train(backend: Backend) -> None:
        params, copies = ([Parameter(values(i, shape=(3000 + i,)).cuda()) for i in range(4)] for _ in range(2))
        optimizer = make(kind, params, backend, **plain)
        alone = make(kind, [copies[0], copies[3]], backend, **plain)
        for number in range(WARM_UP + 3):
            g = given(params, backend.rank, number)
            step(optimizer, [g[0], None, None, g[3]])
            step(alone, [g[0], g[3]])
        optimizer.add_param_group({"params": params[1:3]})
        fresh = make(kind, copies[1:3], backend, **plain)
        for number in range(STEPS):
            g = given(params, backend.rank, 100 + number)
            step(optimizer, [g[0], g[3], g[1], g[2]])
            step(alone, [g[0], g[3]])
            step(fresh, [g[1], g[2]])
            for part, expected in ((params[0::3], alone), (params[1:3], fresh)):
                wrong = [
                    i
                    for i, (a, b) in enumerate(zip(contents(optimizer, part), contents(expected), strict=True))
                    if a != b
                ]
                assert not wrong, f"step {number + 1} after the new group: {wrong} of {type(expected).__name__} differ"
        settled(optimizer)
        assert_equal_on_ranks(backend, params)

    run_threads(2, train)


def test_a_refresh_takes_in_what_has_its_first_gradient_after_the_freeze() -> None:
    def train(backend: Backend) -> list[float]:
        params = [Parameter(values(i, shape=(3000 + i,)).cuda()) for i in range(3)]
        start = [p.detach().clone() for p in params]
        optimizer = make("OnebitAdam", params, backend)  # refreshes in steps 9 and 14
        for number in range(STEPS):
            for i, (p, g) in enumerate(zip(params, given(params, backend.rank, number), strict=True)):
                p.grad = None if i == 1 and (number < WARM_UP + 2 or backend.rank == 0) else g
            optimizer.step()
        assert_equal_on_ranks(backend, params)
        return [float((p - s).detach().abs().mean()) for p, s in zip(params, start, strict=True)]

    for moved in run_threads(2, train):
        assert min(moved) > 5e-3, f"mean movements {moved}"


# --- over NCCL, in processes


def check_mixed_precision(backend: Backend) -> None:
    for kind in KINDS:
        full, *_ = amp_run(backend, kind, torch.float32)
        error, skipped, scale, differs = amp_run(backend, kind, torch.float16)
        told = f"{kind}: fp32 {full:.4f}, fp16 {error:.4f}, {skipped} skipped, scale {scale}, {differs}"
        assert not differs, told
        assert error == pytest.approx(full, rel=0.1), told


def check_replays(backend: Backend) -> None:
    for kind in KINDS:
        wrong = replayed_run(backend, kind)
        assert not wrong, f"{kind}: {wrong}"


def check_a_capture_is_refused_on_all_ranks_and_steps_go_on(backend: Backend) -> None:
    for kind in KINDS:
        model = model_on_device()
        optimizer = make(kind, model.parameters(), backend)
        for number in range(STEPS):
            if number in (3, WARM_UP + 3):
                torch.cuda.synchronize()
                with (
                    pytest.raises(InputError, match="captured"),
                    torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"),
                ):
                    optimizer.step()
            train_step(model, optimizer, backend.rank, number)
        settled(optimizer)
        assert_equal_on_ranks(backend, list(model.parameters()))


def check_workers(backend: Backend) -> None:
    """Workers forked after CUDA, NCCL and all kernels are up, with pinned memory, twice."""
    rows = TensorDataset(*batch(backend.rank, 0, rows=64 * 12))
    for kind in KINDS:
        model = model_on_device()
        optimizer = make(kind, model.parameters(), backend)
        for _ in range(2):
            loader = DataLoader(rows, batch_size=64, num_workers=2, pin_memory=True, timeout=60)
            for x, y in loader:
                optimizer.zero_grad()
                backward(nn.functional.mse_loss(model(x.cuda(non_blocking=True)), y.cuda(non_blocking=True)))
                optimizer.step()
        settled(optimizer)
        assert_equal_on_ranks(backend, list(model.parameters()))


CHECKS: list[Check] = [
    check_mixed_precision,
    check_replays,
    check_a_capture_is_refused_on_all_ranks_and_steps_go_on,
    check_workers,
]


@pytest.fixture(scope="module")
def failures() -> list[Failures]:
    return run_ranks("nccl", 2, failures_of, CHECKS, timeout=240.0)


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("check", CHECKS, ids=short)
def test_over_nccl(failures: list[Failures], check: Check) -> None:
    assert_passed(failures, check.__name__)
