"""OnebitAdam past its warm-up: right by a float64 oracle, the same on all ranks, dead where it must be; it learns."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitAdam
from tests.comm.oracle import UNIT
from tests.comm.samples import arrays, bits, server_parts, worker_parts
from tests.optim import oracle
from tests.optim.samples import (
    SHAPES,
    Gradients,
    all_params,
    contents,
    gradients,
    parameters,
    patchy,
    run,
    step,
    values,
)

STEPS = 200
FREEZE = 30
FREEZE_SOON: dict[str, Any] = {"freeze_step": 4, "lr": 1e-2}

# Options, codec, and which gradients: such that rounding decides no sign.
VARIANTS: dict[str, tuple[dict[str, Any], SignCodec, int]] = {
    "defaults": ({"lr": 1e-2}, SignCodec(), 0),
    "small blocks": ({"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-3}, SignCodec(block_size=64), 0),
    "published codec": ({"lr": 1e-2, "weight_decay": 0.0}, SignCodec(block_size=None, scale="rms"), 0),
    "coupled decay, maximize": (
        {"lr": 1e-2, "weight_decay": 0.1, "adamw_mode": False, "maximize": True},
        SignCodec(),
        1,
    ),
    "missing gradients": ({"lr": 1e-2}, SignCodec(block_size=64), 0),
    "no bias correction": ({"lr": 1e-3, "bias_correction": False, "weight_decay": 0.5}, SignCodec(block_size=64), 0),
}


def rate(step: int) -> float:
    """A schedule: what an optimizer's learning rate is multiplied by at a step, counted from 0."""
    return 1.0 + 0.5 * math.sin(step)


CASES = [("defaults", n) for n in (1, 2, 3, 4)] + [("small blocks", n) for n in (1, 2, 4)]
CASES += [
    ("published codec", 3),
    ("coupled decay, maximize", 1),
    ("coupled decay, maximize", 3),
    ("no bias correction", 2),
]
CASES += [("missing gradients", 1), ("missing gradients", 3)]


@pytest.mark.parametrize(("variant", "world_size"), CASES)
def test_200_steps_through_the_freeze_follow_the_float64_oracle(variant: str, world_size: int) -> None:
    # The gradients do not depend on the parameters, so a difference in rounding is not fed back and does not explode.
    # What could tear the two apart is a sign that rounding decides; with these gradients there is none, see `closest`.
    options, codec, seed = VARIANTS[variant]
    made = patchy if variant == "missing gradients" else gradients
    start = parameters()

    def train(backend: Backend) -> list[tuple[list[list[Any]], Any]]:
        params = parameters()
        optimizer = OnebitAdam(params, backend=backend, codec=codec, freeze_step=FREEZE, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        seen = []
        for number in range(STEPS):
            step(optimizer, made(params, backend.rank, seed * STEPS + number))
            scheduler.step()
            if number % 20 == 19 or number == FREEZE:
                saved = optimizer.state_dict()
                state = [saved["state"][i] for i in range(len(params))]
                moments = [arrays([s[key] for s in state]) for key in ("exp_avg", "exp_avg_sq")]
                seen.append(([arrays(params), *moments], saved["onebit"]["residuals"][0]))
        return seen

    per_rank = run_threads(world_size, train)
    expected = oracle.OnebitAdam(
        [p.detach().double().numpy() for p in start],
        world_size,
        oracle.Options(freeze_step=FREEZE, **options),
        codec.block_size,
        codec.scale,
    )
    largest, at = [0.0] * len(start), 0
    for number in range(STEPS):
        listed = [made(start, rank, seed * STEPS + number) for rank in range(world_size)]
        given = [[None if g is None else g.double().numpy() for g in of_rank] for of_rank in listed]
        expected.step(given, options["lr"] * rate(number))
        for i in range(len(start)):
            parts = [expected.m[i], expected.v[i], *(g[i] for g in given if g[i] is not None)]
            if expected.mean is not None:
                parts += [expected.mean.server[i], *(worker[i] for worker in expected.mean.worker)]
            largest[i] = max(largest[i], *(float(np.abs(part).max(initial=0)) for part in parts))
        if number % 20 == 19 or number == FREEZE:
            for rank, seen in enumerate(per_rank):
                check(expected, seen[at], rank, number + 1, largest)
            if world_size > 1 and number >= FREEZE:
                for i, held in enumerate(server_parts([seen[at][1] for seen in per_rank])):
                    assert np.abs(held - expected.mean.server[i]).max(initial=0) <= slack(number + 1, largest[i])
            at += 1


def slack(steps: int, largest: float) -> float:
    """How far momentum and feedback may be off after some steps.

    A step rounds fewer than 40 times (see tests/comm/test_allreduce.py), numbers of at most `largest`. It does not
    enlarge the error it starts with: new residual = c - s·sign(c), with s the mean of |c|, is a projection. So errors
    add up like the steps of a random walk, by the root of their number.
    """
    return math.sqrt(40 * steps) * UNIT * largest


def check(
    expected: oracle.OnebitAdam, seen: tuple[list[list[Any]], Any], rank: int, steps: int, largest: Sequence[float]
) -> None:
    (x, m, v), residual = seen
    closest = math.inf if expected.mean is None else expected.mean.closest
    for i in range(len(x)):
        where = f"step {steps}, parameter {i}, rank {rank}; the closest c was {closest} of its scale from 0"
        off = slack(steps, largest[i])
        assert np.abs(m[i] - expected.m[i].reshape(-1)).max(initial=0) <= off, f"momentum, {where}"
        # Two products and a sum a step, all positive, so relative; what is old fades.
        assert np.all(np.abs(v[i] - expected.v[i].reshape(-1)) <= 4 * steps * UNIT * expected.v[i].reshape(-1)), where
        # A step adds lr·m/√v, with m off by `off` at most and less in earlier steps, and rounds x itself a few times.
        root = np.sqrt(expected.v[i].reshape(-1))
        moved = 1.5 * expected.options.lr * steps * off / (root + expected.options.eps)
        size = 4 * math.sqrt(steps) * 4 * UNIT * np.abs(x[i]).max(initial=1)
        assert np.all(np.abs(x[i] - expected.x[i].reshape(-1)) <= moved + size), f"parameters, {where}"
    if expected.mean is not None and len(expected.mean.worker) > 1:
        for i, held in enumerate(worker_parts(residual)):
            assert np.abs(held - expected.mean.worker[rank][i]).max(initial=0) <= slack(steps, largest[i]), where


# --- the same on all ranks, whatever surrounds a parameter


def mixed(indices: Sequence[int] = range(len(SHAPES))) -> list[Parameter]:
    """Parameters of all shapes and dtypes, fp32, bf16 and fp16."""
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float16)
    return [p for i in indices for p in [Parameter(parameters()[i].detach().to(dtypes[i % 4]))]]


@pytest.mark.parametrize("given", [gradients, patchy])
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_parameters_and_moments_are_bit_equal_on_all_ranks_after_every_step(
    world_size: int, given: Callable[..., Gradients]
) -> None:
    first, *others = run_threads(world_size, run, 12, contents, given, mixed, FREEZE_SOON)
    for seen in others:
        assert seen == first
    assert len({repr(state) for state in first}) == 12


@pytest.mark.parametrize("codec", [SignCodec(), SignCodec(block_size=None, scale="rms")], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bucket_size_and_order_of_registration_change_no_bit(world_size: int, codec: SignCodec) -> None:
    order = [5, 0, 6, 3, 2, 1, 4]

    def permuted(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(mixed(), rank, number)
        return [made[i] for i in order]

    options = {"freeze_step": 4, "lr": 1e-2, "codec": codec}
    usual = run_threads(world_size, run, 10, contents, gradients, mixed, options)
    otherwise = run_threads(
        world_size, run, 10, contents, permuted, lambda: mixed(order), {**options, "bucket_mb": 2.0**-13}
    )
    for one, other in zip(usual, otherwise, strict=True):
        for now, then in zip(one, other, strict=True):
            assert [now[i] for i in order] == then


@pytest.mark.parametrize("world_size", [1, 2])
def test_strides_of_parameters_and_gradients_change_no_bit(world_size: int) -> None:
    def in_rows() -> list[Parameter]:
        return [Parameter(p.detach().contiguous()) for p in parameters()]

    def strided_too(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        return [torch.empty_like(p).copy_(g) for p, g in zip(params, gradients(params, rank, number), strict=True)]

    expected = run_threads(world_size, run, 8, contents, gradients, in_rows, FREEZE_SOON)
    assert not all(p.is_contiguous() for p in parameters())
    for given in (gradients, strided_too):
        assert run_threads(world_size, run, 8, contents, given, parameters, FREEZE_SOON) == expected


def test_groups_do_what_each_would_do_alone() -> None:
    settings: list[dict[str, Any]] = [
        {"freeze_step": 2, "lr": 1e-2},
        {"freeze_step": 5, "lr": 1e-3, "betas": (0.5, 0.9), "weight_decay": 0.3},
        {"freeze_step": 100, "adamw_mode": False},
    ]
    bounds = [slice(0, 3), slice(3, 5), slice(5, 7)]

    def train(backend: Backend) -> None:
        together, alone = parameters(), parameters()
        groups = [{"params": together[b], **o} for b, o in zip(bounds, settings, strict=True)]
        whole = OnebitAdam(groups, freeze_step=1, backend=backend)
        parts = [OnebitAdam(alone[b], backend=backend, **o) for b, o in zip(bounds, settings, strict=True)]
        for number in range(8):
            expected = ["warmup" if number < o["freeze_step"] else "compressed" for o in settings]
            assert [whole.phase(g) for g in range(3)] == expected
            given = gradients(together, backend.rank, number)
            step(whole, given)
            for b, part in zip(bounds, parts, strict=True):
                step(part, given[b])
            assert contents(whole) == [entry for part in parts for entry in contents(part)]

    run_threads(2, train)


def test_a_group_added_in_the_middle_makes_its_own_warm_up_and_disturbs_nobody() -> None:
    def train(backend: Backend) -> None:
        old, new, alone = parameters()[:4], parameters()[4:], parameters()[4:]
        optimizer = OnebitAdam(old, freeze_step=3, backend=backend)
        undisturbed = OnebitAdam(parameters()[:4], freeze_step=3, backend=backend)
        added = OnebitAdam(alone, freeze_step=2, lr=0.5, backend=backend)
        for number in range(9):
            if number == 5:
                optimizer.add_param_group({"params": new, "freeze_step": 2, "lr": 0.5})
            given = gradients([*old, *new], backend.rank, number)
            step(optimizer, given[: len(all_params(optimizer))])
            step(undisturbed, given[:4])
            assert contents(optimizer, old) == contents(undisturbed)
            if number >= 5:
                step(added, given[4:])
                assert contents(optimizer, new) == contents(added)
                assert optimizer.phase(1) == ("warmup" if number < 6 else "compressed")

    run_threads(3, train)


def test_collectives_do_not_depend_on_which_gradients_are_none_nor_on_the_number_of_parameters() -> None:
    def train(backend: Backend, many: int) -> list[tuple[int, int]]:
        params = [Parameter(torch.zeros(10)) for _ in range(many)]
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend)
        seen = []
        for number in range(4):
            backend.traffic.reset()
            given = [None if backend.rank == 1 or number % 2 else torch.ones(10) for _ in params]
            step(optimizer, given)
            agreed = {0: 1, 2: 1}.get(number, 0) + {0: 1}.get(
                number, 0
            )  # when an average is made, and at the first step
            seen.append((backend.traffic.collectives - agreed, optimizer.stats.collectives))
        return seen

    for many in (1, 3, 200):
        assert run_threads(3, train, many) == [[(2, 2), (2, 4), (2, 6), (2, 8)]] * 3


def test_stats_count_both_phases() -> None:
    numel = 4096

    def train(backend: Backend) -> tuple[int, int, int, int]:
        p = Parameter(torch.zeros(numel))
        optimizer = OnebitAdam([p], freeze_step=2, backend=backend)
        sent = []
        for number in range(5):
            before = optimizer.stats.wire_bytes
            step(optimizer, [values(number, backend.rank, shape=(numel,))])
            sent.append(optimizer.stats.wire_bytes - before)
        stats = optimizer.stats
        assert sent[0] == sent[1]
        assert sent[2] == sent[3] == sent[4] < sent[0] / 30
        assert stats.wire_bytes == sum(sent)
        assert set(stats.seconds) >= {"all_to_all", "all_gather", "encode", "reduce_encode", "update"}
        return stats.calls, stats.collectives, sent[0], sent[2]

    # In warm-up a flag per parameter travels along: 4097 numbers, filled up to a multiple of 2.
    compressed = 2 * (numel // 2 // 8 + 16)
    assert run_threads(2, train) == [(5, 10, 4 * (numel + 2), compressed)] * 2


def test_codec_and_bucket_size_do_not_matter_to_one_rank_which_sends_nothing() -> None:
    def train(backend: Backend) -> None:
        coarse = {**FREEZE_SOON, "codec": SignCodec(block_size=None, scale="rms"), "bucket_mb": 1e-3}
        assert run(backend, 9, contents, gradients, mixed, coarse) == run(
            backend, 9, contents, gradients, mixed, FREEZE_SOON
        )
        assert backend.traffic.collectives == backend.traffic.wire_bytes == 0

    run_threads(1, train)


# --- gradients that are missing, and entries that are dead


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_gradient_that_is_none_counts_as_zero_once_its_parameter_is_known(world_size: int) -> None:
    def with_zeros(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = sometimes_none(params, rank, number)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, made, strict=True)]

    def sometimes_none(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(params, rank, number)
        everywhere = number >= 4  # after the freeze; before it, at most on some ranks
        return [None if (i + number) % 3 == 0 and (everywhere or rank > 0) else g for i, g in enumerate(made)]

    expected = run_threads(world_size, run, 10, contents, with_zeros, parameters, FREEZE_SOON)
    assert run_threads(world_size, run, 10, contents, sometimes_none, parameters, FREEZE_SOON) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("late", [False, True], ids=["zero for good", "with gradients after the freeze"])
def test_dead_entries_stay_bit_equal_to_their_start_and_hold_nothing(world_size: int, late: bool) -> None:
    dead = values(1, shape=(3000,)) < 0

    def train(backend: Backend) -> list[Any]:
        params = [Parameter(values(0, shape=(3000,))), Parameter(values(2, shape=(3,)))]
        start = bits([p[dead] for p in params[:1]])
        optimizer = OnebitAdam(params, freeze_step=5, lr=0.1, weight_decay=0.0, backend=backend)
        for number in range(40):
            g = gradients(params, backend.rank, number)
            if number < 5 or not late:
                g[0][dead] = 0.0
            step(optimizer, g)
            assert bits(params[0][dead]) == start
            state = optimizer.state_dict()["state"][0]
            assert not state["exp_avg"][dead].any()
            assert not state["exp_avg_sq"][dead].any()
        if world_size > 1:
            worker = worker_parts(optimizer.state_dict()["onebit"]["residuals"][0])
            assert not worker[0][dead].any()
            assert worker[0][~dead].any()
        assert float((params[0].detach() - values(0, shape=(3000,)))[~dead].abs().min()) > 0
        return contents(optimizer)

    per_rank = run_threads(world_size, train)
    assert all(seen == per_rank[0] for seen in per_rank)
    if late:  # the living must not notice
        without = run_threads(world_size, run, 40, contents, quiet(dead), two_parameters, DEAD_OPTIONS)
        assert per_rank[0] == without[0][-1]


@pytest.mark.parametrize("codec", [SignCodec(), SignCodec(kernels="reference")], ids=["fused", "by torch's operations"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_half_the_entries_with_zero_gradient_stay_bit_equal_to_their_start_for_500_steps(
    world_size: int, codec: SignCodec
) -> None:
    def train(backend: Backend) -> None:
        p = Parameter(values(0, shape=(300,)))
        start = p.detach().clone()
        optimizer = OnebitAdam([p], lr=1e-2, weight_decay=0.0, freeze_step=75, backend=backend, codec=codec)
        for number in range(500):
            g = values(5, number, backend.rank, shape=(300,))
            g[::2] = 0.0
            step(optimizer, [g])
        assert bits(p[::2]) == bits(start[::2])
        assert bool((p[1::2] != start[1::2]).all())

    run_threads(world_size, train)


def two_parameters() -> list[Parameter]:
    return [Parameter(values(0, shape=(3000,))), Parameter(values(2, shape=(3,)))]


def quiet(dead: Tensor) -> Callable[..., Gradients]:
    """Gradients that are zero at the dead entries for good."""

    def made(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        g = gradients(params, rank, number)
        g[0][dead] = 0.0
        return g

    return made


DEAD_OPTIONS: dict[str, Any] = {"freeze_step": 5, "lr": 0.1, "weight_decay": 0.0}


@pytest.mark.parametrize("codec", [SignCodec(), SignCodec(kernels="reference")], ids=["fused", "by torch's operations"])
def test_dead_entries_are_remembered_as_a_bit_each_and_not_as_a_byte(codec: SignCodec) -> None:
    numel = 3007  # no other tensor here has as many elements

    def train(backend: Backend) -> int:
        p = Parameter(values(0, shape=(numel,)))
        optimizer = OnebitAdam([p], freeze_step=2, variance_refresh=3, backend=backend, codec=codec)
        for number in range(7):
            g = values(1, number, backend.rank, shape=(numel,))
            g[::2] = 0.0
            step(optimizer, [g])
        backend.barrier()  # while all ranks have theirs
        held = [t for t in gc.get_objects() if type(t) is Tensor and t.numel() == numel and t.dtype == torch.bool]
        backend.barrier()
        return len(held)

    assert run_threads(2, train) == [0, 0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_in_the_gradient_of_a_dead_entry_does_no_harm(world_size: int, bad: float) -> None:
    dead = values(1, shape=(3000,)) < 0

    def poisoned(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        g = quiet(dead)(params, rank, number)
        if number == 8 and rank == 0:
            g[0][int(dead.nonzero()[3])] = bad
        return g

    def observe(optimizer: OnebitAdam) -> Any:
        return contents(optimizer), optimizer.skipped_steps

    expected = run_threads(world_size, run, 12, observe, quiet(dead), two_parameters, DEAD_OPTIONS)
    assert run_threads(world_size, run, 12, observe, poisoned, two_parameters, DEAD_OPTIONS) == expected


def test_decoupled_weight_decay_acts_on_dead_entries_and_nothing_else_does() -> None:
    def train(backend: Backend) -> None:
        p = Parameter(torch.ones(100))
        optimizer = OnebitAdam([p], freeze_step=2, lr=0.1, weight_decay=0.5, backend=backend)
        for _ in range(10):
            step(optimizer, [torch.zeros(100)])
        # Ten factors, each rounded, and ten products.
        torch.testing.assert_close(p.detach(), torch.full((100,), 0.95**10), rtol=20 * UNIT, atol=0.0)

    run_threads(2, train)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_parameter_without_gradients_in_warm_up_is_left_alone_for_good_and_told_once(
    world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    def late(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(params, rank, number)
        if number < 6 or rank > 0:
            made[3] = None
        return made

    def never(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        return [None if i == 3 else g for i, g in enumerate(gradients(params, rank, number))]

    with caplog.at_level(logging.WARNING, "onebit"):
        expected = run_threads(world_size, run, 10, contents, never, parameters, FREEZE_SOON)
        assert not caplog.records
        seen = run_threads(world_size, run, 10, contents, late, parameters, FREEZE_SOON)
    assert seen == expected
    assert seen[0][-1][3] == (bits(parameters()[3]), {})
    (record,) = caplog.records
    assert "rank 0: parameters [3] have their first gradient after the freeze" in record.getMessage()
    assert "add_param_group" in record.getMessage()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_steps_without_any_gradient_change_nothing_but_the_count(world_size: int, bias_correction: bool) -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=2, backend=backend, bias_correction=bias_correction)
        for number in range(4):
            step(optimizer, [None] * len(params))
            assert optimizer.phase() == ("warmup" if number < 1 else "compressed")
        assert bits(params) == bits(parameters())
        assert not any(optimizer.state[p] for p in params)
        optimizer.state_dict()

    run_threads(world_size, train)


def test_groups_without_parameters_or_elements_are_stepped_and_saved() -> None:
    def train(backend: Backend) -> None:
        empty = [Parameter(torch.empty(0)), Parameter(torch.empty(3, 0))]
        optimizer = OnebitAdam([{"params": empty}, {"params": []}], freeze_step=2, backend=backend)
        for _ in range(4):
            step(optimizer, [torch.zeros_like(p) for p in empty])
            optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.phase() == "compressed"

    for world_size in (1, 2):
        run_threads(world_size, train)


# --- half precision


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


# --- as any torch optimizer


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned() -> None:
    def train(backend: Backend) -> list[Any]:
        p = Parameter(values(0, shape=(50,)))
        target = values(1, backend.rank, shape=(50,))
        optimizer = OnebitAdam([p], freeze_step=2, backend=backend)
        calls = []

        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = ((p - target) ** 2).mean()
            loss.backward()
            calls.append(loss.item())
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        assert losses == calls
        assert p.grad is not None
        return contents(optimizer)

    def by_hand(backend: Backend) -> list[Any]:
        p = Parameter(values(0, shape=(50,)))
        optimizer = OnebitAdam([p], freeze_step=2, backend=backend)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            ((p - values(1, backend.rank, shape=(50,))) ** 2).mean().backward()
            optimizer.step()
        return contents(optimizer)

    assert run_threads(2, train) == run_threads(2, by_hand)


def test_a_learning_rate_in_a_tensor_acts_as_the_number_and_may_be_changed_in_place() -> None:
    def train(backend: Backend, tensor: bool) -> list[Any]:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=3, lr=torch.tensor(0.5) if tensor else 0.5, backend=backend)
        seen = []
        for number in range(8):
            if tensor:
                optimizer.param_groups[0]["lr"].fill_(0.5 / 2**number)
            else:
                optimizer.param_groups[0]["lr"] = 0.5 / 2**number
            step(optimizer, gradients(params, backend.rank, number))
            seen.append(contents(optimizer))
        return seen

    assert run_threads(2, train, True) == run_threads(2, train, False)


def test_gradients_are_not_changed_and_need_no_averaging() -> None:
    def train(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitAdam(params, freeze_step=3, backend=backend, maximize=True, adamw_mode=False)
        for number in range(6):
            given = gradients(params, backend.rank, number)
            step(optimizer, given)
            assert bits([p.grad for p in params]) == bits(given)

    for world_size in (1, 2):
        run_threads(world_size, train)


@pytest.mark.parametrize("world_size", [3])
def test_it_learns_as_well_as_adamw_on_the_mean_gradient(world_size: int) -> None:
    features, hidden, batch, steps = 16, 32, 64, 400

    def weights() -> list[Parameter]:
        shapes = ((hidden, features), (hidden,), (1, hidden))
        return [Parameter(values(3, i, shape=shape) / math.sqrt(shape[-1])) for i, shape in enumerate(shapes)]

    def loss_of(params: Sequence[Tensor], x: Tensor) -> Tensor:
        y = torch.sin(x.sum(1) / 2)
        out = torch.tanh(x @ params[0].t() + params[1]) @ params[2].t()
        return ((out[:, 0] - y) ** 2).mean()

    def losses(backend: Backend, compressed: bool) -> float:
        params = weights()
        freeze = steps // 5 if compressed else steps
        optimizer = OnebitAdam(params, lr=1e-2, betas=(0.9, 0.99), freeze_step=freeze, backend=backend)
        for number in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - number / steps)
            optimizer.zero_grad()
            loss_of(params, values(4, number, backend.rank, shape=(batch, features))).backward()
            optimizer.step()
        with torch.no_grad():
            return float(loss_of(params, values(5, shape=(4096, features))))

    adamw = run_threads(world_size, losses, False)  # warm-up is AdamW bit for bit, see test_warmup.py
    onebit = run_threads(world_size, losses, True)
    with torch.no_grad():
        at_start = float(loss_of(weights(), values(5, shape=(4096, features))))
    assert len(set(onebit)) == 1
    assert adamw[0] < at_start / 4
    # No theorem. Of what AdamW has gained it misses about a hundredth here, still on its way down as AdamW is.
    assert onebit[0] - adamw[0] < 0.03 * (at_start - adamw[0])
