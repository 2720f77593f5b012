"""onebit.comm.ddp.attach: a model in DDP trains as it does without, and DDP sends nothing in compressed steps."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from onebit.comm import Backend
from onebit.comm.ddp import attach
from onebit.optim import OnebitAdam
from tests.comm.ddp_runs import OPTIMIZERS, STEPS, WRAPS, Seen, all_runs, backward, data, model, run, step
from tests.comm.launcher import run_ranks
from tests.comm.samples import bits


@functools.cache
def seen(optimizer: str, world_size: int) -> list[dict[str, tuple[Seen, Seen]]]:
    return run_ranks("gloo", world_size, all_runs, optimizer, timeout=120.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_ranks_end_every_step_with_the_bits_of_the_unwrapped_model(optimizer: str) -> None:
    for rank in seen(optimizer, 2):
        for name, (wrapped, alone) in rank.items():
            differing = [i for i in range(STEPS) if wrapped.params[i] != alone.params[i]]
            assert not differing, (name, differing, wrapped.phases)
            assert (wrapped.phases, wrapped.skipped) == (alone.phases, alone.skipped), name


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_ranks_stay_equal_and_warm_up_as_the_unwrapped_model_does(optimizer: str) -> None:
    first, *others = seen(optimizer, 3)
    for name, (wrapped, alone) in first.items():
        for number in range(STEPS):
            # Between synchronisations the parameters of 0/1 Adam's ranks differ, and so they do in the model alone.
            if optimizer != "ZeroOneAdam" or number < 7:
                assert all(o[name][0].params[number] == wrapped.params[number] for o in others), (name, number)
        for mine, right in zip(wrapped.params[2], alone.params[2], strict=True):
            got, expected = (torch.frombuffer(bytearray(one), dtype=torch.float32) for one in (mine, right))
            # A sum of three in another order is another last place of the gradient, and steps are 1e-2 long.
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_are_averaged_in_backward_in_all_dense_steps_but_the_first_and_in_no_other(optimizer: str) -> None:
    for rank in seen(optimizer, 2):
        for name in WRAPS:
            wrapped, alone = rank[name]
            dense = [phase in ("warmup", "refresh", "variance") for phase in wrapped.phases]
            assert wrapped.averaged == [False, *dense[1:]]
            assert 2 < sum(dense) < STEPS
            # 2(n-1)/n · 4 bytes an element each time, over two ranks.
            numel = sum(p.numel() for p in model().parameters())
            assert wrapped.sent_by_hook == 4 * numel * sum(wrapped.averaged)
            # What travels along with the gradients travels by itself; both are filled up to a multiple of the ranks.
            assert wrapped.sent == pytest.approx(alone.sent, abs=8 * STEPS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ranks_whose_scales_differ_skip_together_and_nothing_scaled_is_averaged(optimizer: str) -> None:
    for rank in seen(optimizer, 2):
        wrapped, _ = rank["GradScaler"]
        assert wrapped.skipped >= 2
        assert not any(wrapped.averaged)


def gloo_sums(backend: Backend) -> list[list[int]]:
    """How many all_reduces Gloo itself began in each step, of OnebitAdam attached and of torch's AdamW."""
    counts: list[list[int]] = [[], []]
    for hooked, found in zip((True, False), counts, strict=True):
        inner = model()
        called = DistributedDataParallel(inner, bucket_cap_mb=0.01)
        optimizer: Any = torch.optim.AdamW(inner.parameters())
        if hooked:
            optimizer = OnebitAdam(inner.parameters(), freeze_step=3)
            attach(called, optimizer)
        for number in range(5):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                step(called, optimizer, data(backend.rank, number), number)
            found.append(sum(event.name == "gloo:all_reduce" for event in profiled.events()))
    return counts


def test_no_allreduce_runs_on_the_transport_after_the_freeze() -> None:
    for attached, plain in run_ranks("gloo", 2, gloo_sums):
        assert [count > 0 for count in attached] == [False, True, True, False, False], attached
        assert all(count > 0 for count in plain), "the profiler would not have seen them"


def micro_batches(backend: Backend, hooked: bool) -> tuple[list[bytes], list[bytes]]:
    """Linear in its parameters and data of small whole numbers, so sums are exact: 4 batches of 1, and 1 of 4."""
    ends = []
    for pieces in (4, 1):
        inner = nn.Linear(64, 32, bias=False)
        nn.init.zeros_(inner.weight)
        called = DistributedDataParallel(inner)
        optimizer: Any = torch.optim.AdamW(inner.parameters(), lr=2.0**-7)
        if hooked:
            optimizer = OnebitAdam(inner.parameters(), lr=2.0**-7, freeze_step=3)
            attach(called, optimizer)
        generator = torch.Generator().manual_seed(backend.rank)
        for _ in range(7):
            x = torch.randint(-8, 8, (4, 64), generator=generator).float()
            optimizer.zero_grad()
            parts = x.chunk(pieces)
            for part in parts[:-1]:
                with called.no_sync():
                    called(part).sum().backward()
            called(parts[-1]).sum().backward()
            optimizer.step()
        ends.append(bits(list(inner.parameters())))
    return ends[0], ends[1]


@pytest.mark.parametrize("hooked", [False, True], ids=["torch's AdamW", "OnebitAdam"])
def test_micro_batches_equal_one_batch_bit_for_bit_where_torchs_own_do(hooked: bool) -> None:
    for in_pieces, at_once in run_ranks("gloo", 2, micro_batches, hooked):
        assert in_pieces == at_once


def left_early(backend: Backend) -> list[bool]:
    """The last group of micro-batches is cut short, so no backward of it was synchronised."""
    inner = model()
    called = DistributedDataParallel(inner)
    optimizer = OnebitAdam(inner.parameters(), freeze_step=20)
    attach(called, optimizer)
    step(called, optimizer, data(backend.rank, 0), 0)
    seen = []
    for number in range(1, 5):
        with contextlib.nullcontext() if number % 2 else called.no_sync():
            optimizer.zero_grad()
            backward(called, data(backend.rank, number))
            seen.append(optimizer.gradients_averaged)
        optimizer.step()
    optimizer.step()  # of gradients that are still there
    reference = [torch.empty_like(p) for p in inner.parameters()]
    for mine, p in zip(reference, inner.parameters(), strict=True):
        mine.copy_(p.detach())
        dist.broadcast(mine, 0)
    assert bits(list(inner.parameters())) == bits(reference)
    return seen


def test_a_step_of_gradients_that_ddp_did_not_average_averages_them_itself() -> None:
    assert run_ranks("gloo", 2, left_early) == [[True, False, True, False]] * 2


def mixed_groups(backend: Backend) -> tuple[Any, Any]:
    """One group compresses from the third step on, the other never does."""
    ends = []
    for wrapped in (True, False):
        inner = model()
        called: nn.Module = DistributedDataParallel(inner) if wrapped else inner
        groups = [{"params": inner.conv.parameters(), "compress": False}, {"params": inner.hidden.parameters()}]
        optimizer = OnebitAdam([*groups, {"params": inner.out.parameters()}], freeze_step=2)
        if wrapped:
            attach(called, optimizer)
        for number in range(6):
            step(called, optimizer, data(backend.rank, number), number)
        ends.append(bits(list(inner.parameters())))
    return ends[0], ends[1]


def test_where_groups_differ_the_optimizer_averages_what_is_dense() -> None:
    for wrapped, alone in run_ranks("gloo", 2, mixed_groups):
        assert wrapped == alone


def half_precision(backend: Backend) -> tuple[Any, Any, list[bool]]:
    options = {"master_weights": True}
    wrapped, alone = (
        run(backend, "OnebitAdam", wrap, dtype=torch.bfloat16, options=options, steps=8) for wrap in ({}, None)
    )
    return wrapped.params, alone.params[3], wrapped.averaged


def test_bf16_ranks_stay_equal_and_means_are_rounded_once() -> None:
    (first, alone, averaged), (second, _, _) = run_ranks("gloo", 2, half_precision)
    assert first == second
    assert averaged == [False, True, True, True, False, False, True, False]
    for mine, right in zip(first[3], alone, strict=True):
        got, expected = (torch.frombuffer(bytearray(one), dtype=torch.bfloat16).float() for one in (mine, right))
        # Four steps of 1e-2; a mean that is rounded to 8 bits moves an entry by a share of that, and by one rounding.
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2e-3)


def poisoned(backend: Backend) -> tuple[list[int], bool]:
    """A gradient that is not finite on one rank, in a step that DDP averages and in one that is compressed."""
    inner = model()
    called = DistributedDataParallel(inner)
    optimizer = OnebitAdam(inner.parameters(), freeze_step=4)
    attach(called, optimizer)
    skipped = []
    for number in range(9):
        x = data(backend.rank, number)
        if number in (2, 6) and backend.rank == 1:
            x[0, 0, 0, 0] = torch.inf
        step(called, optimizer, x, number)
        skipped.append(optimizer.skipped_steps)
    return skipped, all(bool(p.isfinite().all()) for p in inner.parameters())


def test_a_bad_number_on_one_rank_is_skipped_by_all_in_every_phase() -> None:
    assert run_ranks("gloo", 2, poisoned) == [([0, 0, 1, 1, 1, 1, 2, 2, 2], True)] * 2


def resumed(backend: Backend) -> bool:
    """Saved in the middle, loaded by a new optimizer of a model that is wrapped anew."""
    whole = run(backend, "OnebitAdam", {}).params[-1]
    state: dict[str, Any] = {}
    for first, last in ((0, 6), (6, STEPS)):
        inner = model()
        optimizer = OnebitAdam(inner.parameters(), lr=1e-2, **OPTIMIZERS["OnebitAdam"][1])
        if state:
            inner.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        called = DistributedDataParallel(inner)
        attach(called, optimizer)
        for number in range(first, last):
            step(called, optimizer, data(backend.rank, number), number)
        state = {"model": inner.state_dict(), "optimizer": optimizer.state_dict()}
    return bits(list(inner.parameters())) == whole


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit() -> None:
    assert run_ranks("gloo", 2, resumed) == [True, True]


def test_one_rank_trains_as_without_ddp() -> None:
    (wrapped,) = run_ranks("gloo", 1, run, "OnebitAdam", {})
    (alone,) = run_ranks("gloo", 1, run, "OnebitAdam", None)
    assert wrapped.params == alone.params
    assert wrapped.sent == 0


def compiled(backend: Backend) -> bool:
    wrapped = DistributedDataParallel(model())
    optimizer = OnebitAdam(wrapped.parameters(), freeze_step=2)
    attach(torch.compile(wrapped), optimizer)  # compiles at the first call, which this does not make
    step(wrapped, optimizer, data(backend.rank, 0), 0)
    return optimizer.averager is not None


def test_a_compiled_ddp_model_can_be_attached() -> None:
    assert run_ranks("gloo", 1, compiled) == [True]
