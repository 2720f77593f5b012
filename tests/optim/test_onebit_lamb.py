"""OnebitLamb: LAMB in warm-up and the published algorithm after it by a float64 oracle, the same on all ranks, safe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from onebit.comm import Backend, CompressedAllreduce, InputError, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitLamb, lamb
from tests.comm.oracle import UNIT
from tests.comm.samples import arrays, bits
from tests.optim import lamb_oracle as oracle
from tests.optim.samples import (
    SHAPES,
    Gradients,
    contents,
    feedback,
    gradients,
    parameters,
    patchy,
    step,
    through_a_file,
    values,
)

FREEZE = 30
EVERY = 5  # steps between two looks at the numbers
LATER = 10_000  # a freeze that does not come
SOON: dict[str, Any] = {"freeze_step": 4, "lr": 1e-2}

PUBLISHED = {"factor_min": 0.5, "factor_max": 4.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {"lr": 1e-2},
    "no factor, strong decay, maximize": {"lr": 1e-2, "weight_decay": 0.5, "maximize": True, "betas": (0.8, 0.98)},
    "published factor": {**PUBLISHED, "lr": 1e-2},
    "bounds that act": {
        **{"lr": 3e-2, "max_coeff": 0.3, "min_coeff": 0.1, "coeff_beta": 0.5},
        **{"factor_min": 0.5, "factor_max": 1.1},
    },
    "no decay": {**PUBLISHED, "lr": 1e-2, "weight_decay": 0.0, "factor_threshold": 0.02},
    "strong decay, maximize": {
        **PUBLISHED,
        **{"lr": 1e-2, "weight_decay": 0.5, "maximize": True, "betas": (0.8, 0.98)},
    },
    "no bias correction": {"lr": 1e-3, "bias_correction": False, "factor_min": 0.9, "factor_max": 4.0},
}
FACTOR_ALONE = ("no factor, strong decay, maximize", "published factor")  # in warm-up as another one


def rate(number: int) -> float:
    """A schedule: what the learning rate is multiplied by at a step, counted from 0."""
    return 1.0 + 0.5 * math.sin(number)


def train(
    backend: Backend,
    steps: int,
    observe: Callable[[OnebitLamb], Any],
    given: Callable[[Sequence[Tensor], int, int], Gradients] = gradients,
    start: Callable[[], list[Parameter]] = parameters,
    every: int = 1,
    **options: Any,
) -> list[Any]:
    """Make steps on one rank; returns what was observed after each, or after every so many."""
    params = start()
    optimizer = OnebitLamb(params, backend=backend, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    seen = []
    for number in range(steps):
        step(optimizer, given(params, backend.rank, number))
        scheduler.step()
        if number % every == every - 1:
            seen.append(observe(optimizer))
    return seen


def of_threads(world_size: int, *args: Any, **options: Any) -> list[list[Any]]:
    """What every rank observed."""
    return run_threads(world_size, lambda backend: train(backend, *args, **options))


def everything(optimizer: OnebitLamb) -> Any:
    """Parameters, state and what is told of it, bit by bit."""
    return contents(optimizer), bits(list(optimizer.lamb_coefficients().values()))


# --- by the oracle


def sizeable() -> list[Parameter]:
    """Single numbers are not small: those near 0 would change by many times themselves in a step, errors as well."""
    params = parameters()
    with torch.no_grad():
        for p in params:
            if p.numel() == 1:
                p.add_(1.0)
    return params


def numbers(optimizer: OnebitLamb) -> dict[str, list[Any]]:
    """What the oracle has, too."""
    params = optimizer.param_groups[0]["params"]
    saved = optimizer.state_dict()["state"]
    states = [saved[i] for i in range(len(params))]
    moments = {key: arrays([s[key] for s in states if key in s]) for key in ("exp_avg", "exp_avg_sq")}
    fresh = arrays([s["exp_avg_sq_fresh"] for s in states if "exp_avg_sq_fresh" in s])
    told = {name: row.double().tolist() for name, row in optimizer.lamb_coefficients().items()}
    return {"x": arrays(params), **moments, "fresh": fresh, **told}


def oracle_of(world_size: int, steps: int, given: Callable[..., Gradients], codec: SignCodec, **options: Any) -> Any:
    """Yields the oracle after every step."""
    start = sizeable()
    expected = oracle.OnebitLamb(
        [p.detach().double().numpy() for p in start],
        world_size,
        oracle.Options(**options),
        codec.block_size,
        codec.scale,
    )
    for number in range(steps):
        listed = [given(start, rank, number) for rank in range(world_size)]
        doubles = [[None if g is None else g.double().numpy() for g in of_rank] for of_rank in listed]
        expected.step(doubles, expected.options.lr * rate(number))
        yield expected


def slack_of_coefficients(expected: oracle.OnebitLamb) -> Any:
    """How far fp32 may be from the coefficient of each tensor, and from a mean of such.

    c = ‖x‖/‖u‖ goes with ‖u‖, which one number's momentum can bring close to 0: it may be off by 1e-5 of the usual u of
    about 1, so c by c²·1e-5/‖x‖.
    """
    c, x = np.array(expected.coefficients), np.array([np.linalg.norm(x) for x in expected.x])
    return 1e-5 * (c + np.where(x > 0, c * c / np.where(x > 0, x, 1.0), 0.0))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in FACTOR_ALONE])
@pytest.mark.parametrize(("world_size", "given"), [(1, gradients), (2, patchy), (3, gradients)])
def test_100_steps_of_warm_up_are_lamb_by_definition(
    variant: str, world_size: int, given: Callable[..., Gradients]
) -> None:
    options = {"freeze_step": LATER, **VARIANTS[variant]}
    per_rank = of_threads(world_size, 100, numbers, given=given, start=sizeable, every=EVERY, **options)
    largest, slack = [0.0] * len(SHAPES), np.zeros(len(SHAPES))
    for number, expected in enumerate(oracle_of(world_size, 100, given, SignCodec(), **options)):
        largest = [max(n, float(np.linalg.norm(x))) for n, x in zip(largest, expected.x, strict=True)]
        slack = np.maximum(slack, slack_of_coefficients(expected))
        if number % EVERY != EVERY - 1:
            continue
        for seen in per_rank:
            now = seen[number // EVERY]
            for i, x in enumerate(expected.x):
                # The bar of this project, of the tensor at its largest: a rounding is of the x there was. Some ten a
                # step of 2⁻²⁴ that add up like a random walk make less than half of it in 100 steps.
                assert np.linalg.norm(now["x"][i] - x.reshape(-1)) <= 1e-6 * largest[i], f"step {number}, tensor {i}"
            assert np.all(np.abs(np.subtract(now["coeff"], expected.coefficients)) <= slack), f"step {number}"
            assert now["factor"] == [1.0] * len(SHAPES)


CASES = [("defaults", n, SignCodec()) for n in (1, 2, 3, 4)] + [("published factor", n, SignCodec()) for n in (1, 3)]
CASES += [(variant, 2, SignCodec(block_size=64)) for variant in VARIANTS]
CASES += [(variant, 3, SignCodec(block_size=None, scale="rms")) for variant in ("defaults", "no decay")]


@pytest.mark.parametrize(("variant", "world_size", "codec"), CASES, ids=str)
def test_200_steps_through_the_freeze_follow_the_float64_oracle(
    variant: str, world_size: int, codec: SignCodec
) -> None:
    # Gradients do not depend on the parameters, so a difference in rounding is not fed back. A sign that rounding
    # decides could tear the two apart; `closest` tells how near one came.
    options = {"freeze_step": FREEZE, **VARIANTS[variant]}
    per_rank = of_threads(world_size, 200, numbers, start=sizeable, every=EVERY, codec=codec, **options)
    factors, slack = set(), np.zeros(len(SHAPES))
    for number, expected in enumerate(oracle_of(world_size, 200, gradients, codec, **options)):
        closest = math.inf if expected.mean is None else expected.mean.closest
        slack = np.maximum(slack, slack_of_coefficients(expected)) if number < FREEZE else slack
        factors.update(expected.factors)
        where = f"step {number + 1}; the closest c was {closest} of its scale from 0"
        if number % EVERY != EVERY - 1:
            continue
        for seen in per_rank:
            now = seen[number // EVERY]
            for name, of_oracle in (("x", expected.x), ("exp_avg", expected.m), ("exp_avg_sq", expected.v)):
                for i, one in enumerate(of_oracle):
                    # Momentum carries error feedback along: 40 roundings a step that add up like a random walk, over
                    # 200 steps √8000 units of numbers ten times as large. Parameters and variances stay below that.
                    assert np.abs(now[name][i] - one.reshape(-1)).max(initial=0) <= 900 * UNIT * max(
                        1e-2, np.abs(one).max(initial=0)
                    ), f"{name} {i}, {where}"
            for i, one in enumerate(expected.fresh):
                # g′ divides by 1 - β₁ what m is off by, and its square doubles that: 20 times the above.
                assert np.abs(now["fresh"][i] - one.reshape(-1)).max(initial=0) <= 2e4 * UNIT * np.abs(one).max(
                    initial=0
                ), f"fresh {i}, {where}"
            assert np.all(np.abs(np.subtract(now["coeff"], expected.coefficients)) <= slack), where
            # r goes with √v′ of a single entry.
            assert now["factor"] == pytest.approx(expected.factors, rel=1e-3), where
    has_factor = "factor_max" in options
    assert len(factors) > 100 if has_factor else factors == {1.0}
    assert bool(per_rank[0][-1]["fresh"]) == has_factor


# --- the same on all ranks, whatever surrounds a parameter


def mixed(indices: Sequence[int] = range(len(SHAPES))) -> list[Parameter]:
    """Parameters of all shapes and dtypes, fp32, bf16 and fp16."""
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float16)
    return [Parameter(parameters()[i].detach().to(dtypes[i % 4])) for i in indices]


@pytest.mark.parametrize("options", [{"master_weights": True}, PUBLISHED], ids=["masters", "factor"])
@pytest.mark.parametrize("given", [gradients, patchy])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_everything_is_bit_equal_on_all_ranks_after_every_step(
    world_size: int, given: Callable[..., Gradients], options: dict[str, Any]
) -> None:
    options = {**SOON, **options}
    first, *others = of_threads(world_size, 12, everything, given=given, start=mixed, **options)
    for seen in others:
        assert seen == first
    assert len({repr(state) for state in first}) == 12


@pytest.mark.parametrize("factor", [{}, PUBLISHED], ids=["no factor", "factor"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bucket_size_and_order_of_registration_change_no_bit(world_size: int, factor: dict[str, float]) -> None:
    order = [5, 0, 6, 3, 2, 1, 4]

    def permuted(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(mixed(), rank, number)
        return [made[i] for i in order]

    options = {**SOON, **factor}
    usual = of_threads(world_size, 10, contents, start=mixed, **options)
    otherwise = of_threads(
        world_size, 10, contents, given=permuted, start=lambda: mixed(order), bucket_mb=2.0**-13, **options
    )
    for one, other in zip(usual, otherwise, strict=True):
        for now, then in zip(one, other, strict=True):
            assert [now[i] for i in order] == then


def test_strides_of_parameters_change_no_bit() -> None:
    def in_rows() -> list[Parameter]:
        return [Parameter(p.detach().contiguous()) for p in parameters()]

    assert not all(p.is_contiguous() for p in parameters())
    for options in (SOON, {**SOON, **PUBLISHED}):
        assert of_threads(2, 8, contents, **options) == of_threads(2, 8, contents, start=in_rows, **options)


def test_groups_do_what_each_would_do_alone() -> None:
    settings: list[dict[str, Any]] = [
        {"freeze_step": 2, "lr": 1e-2},
        {"freeze_step": 5, "max_coeff": 0.2, "weight_decay": 0.3, **PUBLISHED},
        {"freeze_step": 2, "compress": False},
    ]
    bounds = [slice(0, 3), slice(3, 5), slice(5, 7)]

    def compare(backend: Backend) -> None:
        together, alone = parameters(), parameters()
        groups = [{"params": together[b], **o} for b, o in zip(bounds, settings, strict=True)]
        whole = OnebitLamb(groups, freeze_step=1, backend=backend)
        parts = [
            OnebitLamb([{"params": alone[b], **o}], freeze_step=1, backend=backend)
            for b, o in zip(bounds, settings, strict=True)
        ]
        for number in range(8):
            expected = ["warmup" if number < limit else "compressed" for limit in (2, 5)]
            assert [whole.phase(g) for g in range(3)] == [*expected, "dense"]
            given = gradients(together, backend.rank, number)
            step(whole, given)
            for b, part in zip(bounds, parts, strict=True):
                step(part, given[b])
            assert contents(whole) == [entry for part in parts for entry in contents(part)]
            for g, part in enumerate(parts):
                assert bits(list(whole.lamb_coefficients(g).values())) == bits(list(part.lamb_coefficients().values()))

    run_threads(2, compare)


def test_the_momentum_of_a_tensor_scaled_before_and_after_the_average_is_the_same_average() -> None:
    # The published algorithm scales every tensor to one size. No two tensors share a scale here, so that does nothing.
    factors = [1.0, 8.0, 2.0**-20]

    def average(backend: Backend, scaled: bool) -> list[list[bytes]]:
        said = []
        tensors = [torch.empty(n) for n in (700, 2048, 5)]
        reduce = CompressedAllreduce(tensors, backend)
        for number in range(5):
            tensors = [values(number, backend.rank, i, shape=tuple(t.shape)) for i, t in enumerate(tensors)]
            by = factors if scaled else [1.0] * 3
            tensors = [t * f for t, f in zip(tensors, by, strict=True)]
            reduce(tensors)
            said.append(bits([t / f for t, f in zip(tensors, by, strict=True)]))
        return said

    assert run_threads(2, average, True) == run_threads(2, average, False)


# --- tensors and entries that are special


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("factor", [{}, PUBLISHED], ids=["no factor", "factor"])
def test_dead_entries_stay_as_they_are_and_the_living_do_not_notice(
    world_size: int, weight_decay: float, factor: dict[str, float]
) -> None:
    # The dead lie where they share no block with the living, and are 0, so that norms and scales do not tell either.
    def whole() -> list[Parameter]:
        x = values(0, shape=(2048,))
        x[1024:] = 0
        return [Parameter(x)]

    def half() -> list[Parameter]:
        return [Parameter(values(0, shape=(2048,))[:1024].clone())]

    def living(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        g = torch.zeros_like(params[0])
        g[:1024] = 100.0**-number * values(number, rank, shape=(1024,))  # so that the ratio of the living is below 1
        return [g]

    options = {"freeze_step": 3, "lr": 1e-2, "weight_decay": weight_decay, **factor}

    def seen(optimizer: OnebitLamb) -> Any:
        p = optimizer.param_groups[0]["params"][0]
        assert not p.detach()[1024:].any()
        assert not optimizer.state_dict()["state"][0]["exp_avg"][1024:].any()
        return bits([p.detach()[:1024]]), bits(list(optimizer.lamb_coefficients().values()))

    expected = of_threads(world_size, 40, seen, given=living, start=half, **options)
    assert of_threads(world_size, 40, seen, given=living, start=whole, **options) == expected


@pytest.mark.parametrize("factor", [{}, PUBLISHED], ids=["no factor", "factor"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_frozen_unused_empty_and_zero_tensors_and_zero_gradients_are_safe(
    world_size: int, factor: dict[str, float]
) -> None:
    def special() -> list[Parameter]:
        made = [values(0, shape=(40,)), torch.zeros(30), values(2, shape=(20,)), values(3, shape=(9,)), torch.empty(0)]
        return [Parameter(x, requires_grad=i != 3) for i, x in enumerate(made)]

    def given(params: Sequence[Tensor], rank: int, number: int) -> Gradients:
        made = gradients(params, rank, number)
        assert made[2] is not None
        made[2].zero_()  # no momentum, ever
        made[3] = None  # frozen
        return made

    def seen(optimizer: OnebitLamb) -> Any:
        params = optimizer.param_groups[0]["params"]
        assert all(bool(p.isfinite().all()) for p in params)
        assert bits(params[2:4]) == bits(special()[2:4])
        assert optimizer.state.get(params[3], {}) == {}
        told = optimizer.lamb_coefficients()
        assert told["coeff"][2:4].tolist() == [1.0, 1.0]
        assert all(bool(row.isfinite().all()) for row in told.values())
        return contents(optimizer)

    options = {"freeze_step": 3, "lr": 0.1, "weight_decay": 0.0, **factor}
    first, *others = of_threads(world_size, 12, seen, given=given, start=special, **options)
    assert all(other == first for other in others)
    assert first[-1][1] != bits(torch.zeros(30)), "a tensor that starts at 0 learns"


def test_a_group_without_parameters_or_without_gradients_does_nothing() -> None:
    def train_nothing(backend: Backend) -> None:
        p = Parameter(values(0, shape=(10,)))
        optimizer = OnebitLamb([{"params": []}, {"params": [p]}], freeze_step=2, backend=backend)
        for _ in range(4):
            step(optimizer, [None])
        assert bits(p) == bits(values(0, shape=(10,)))
        assert [row.numel() for row in optimizer.lamb_coefficients(0).values()] == [0, 0]

    run_threads(2, train_nothing)


# --- whole steps and resumed runs


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_bad_step_changes_nothing_in_either_phase(world_size: int, bad: float) -> None:
    def spoil(backend: Backend) -> None:
        params = parameters()
        groups = [{"params": params[:4]}, {"params": params[4:], **PUBLISHED}]
        optimizer = OnebitLamb(groups, backend=backend, **SOON)
        for number in range(10):
            before = everything(optimizer)
            spoiled = gradients(params, backend.rank, number)
            if backend.rank == world_size - 1:
                assert spoiled[3] is not None
                spoiled[3][77] = bad
            step(optimizer, spoiled)
            assert optimizer.skipped_steps == number + 1
            assert everything(optimizer) == before
            step(optimizer, gradients(params, backend.rank, number))
            assert everything(optimizer) != before

    run_threads(world_size, spoil)


@pytest.mark.parametrize(
    ("world_size", "dtype", "master"),
    [(1, torch.float32, False), (2, torch.bfloat16, False), (2, torch.float16, True), (3, torch.float32, False)],
    ids=str,
)
def test_a_run_resumed_after_any_step_is_bit_equal_to_one_without_a_break(
    world_size: int, dtype: torch.dtype, master: bool
) -> None:
    steps = 9

    def resume(backend: Backend) -> None:
        def make() -> tuple[OnebitLamb, list[Parameter]]:
            params = parameters(dtype=dtype)
            first = {"params": params[:4], "freeze_step": 2, "lr": 1e-2, **PUBLISHED}
            groups = [first, {"params": params[4:], "freeze_step": 5}]
            return OnebitLamb(groups, freeze_step=99, backend=backend, master_weights=master), params

        optimizer, params = make()
        checkpoints, expected = [], []
        for number in range(steps):
            checkpoints.append(through_a_file({"x": [p.detach() for p in params], "o": optimizer.state_dict()}))
            step(optimizer, patchy(params, backend.rank, number))
            expected.append((contents(optimizer), feedback(optimizer)))  # type: ignore[arg-type]
        for start, checkpoint in enumerate(checkpoints):
            resumed, own = make()
            step(resumed, gradients(own, backend.rank, 70 + start))
            with torch.no_grad():
                for p, value in zip(own, checkpoint["x"], strict=True):
                    p.copy_(value)
            resumed.load_state_dict(checkpoint["o"])
            for number in range(start, steps):
                step(resumed, patchy(own, backend.rank, number))
                assert (contents(resumed), feedback(resumed)) == expected[number]  # type: ignore[arg-type]

    run_threads(world_size, resume)


def test_a_factor_that_is_asked_for_later_starts_at_1_and_one_that_is_given_up_is_forgotten() -> None:
    def train_on(backend: Backend) -> None:
        params = parameters()
        optimizer = OnebitLamb(params, backend=backend, **SOON)
        [group] = optimizer.param_groups
        for number in range(16):
            if number == 8:
                group.update(PUBLISHED)
            if number == 12:
                group.update(factor_min=1.0, factor_max=1.0)
            step(optimizer, gradients(params, backend.rank, number))
            factors = set(optimizer.lamb_coefficients()["factor"].tolist())
            has_factor = 8 <= number < 12
            assert (factors != {1.0}) == has_factor
            assert any("exp_avg_sq_fresh" in state for state in optimizer.state.values()) == has_factor
            assert max(factors) <= 1.1 ** max(0, number - 7) * (1 + 1e-6)

    for world_size in (1, 2):
        run_threads(world_size, train_on)


def test_a_run_that_adamw_began_goes_on_in_warm_up_and_is_refused_after_the_freeze() -> None:
    def go_on(backend: Backend) -> None:
        params = parameters()
        reference = torch.optim.AdamW(params, lr=1e-2)
        for number in range(3):
            step(reference, gradients(params, 0, number))
        state = through_a_file(reference.state_dict())
        optimizer = OnebitLamb(params, freeze_step=5, backend=backend)
        optimizer.load_state_dict(through_a_file(state))
        assert optimizer.phase() == "warmup"
        for number in range(3, 6):
            step(optimizer, gradients(params, backend.rank, number))
        mean = optimizer.lamb_coefficients()["coeff"]
        assert float(mean.min()) > 0.01, "the mean of two coefficients is not a tenth of them"
        late = OnebitLamb(params, freeze_step=3, backend=backend)
        late.load_state_dict(state)
        before = bits(params)
        with pytest.raises(InputError, match=r"step 4 comes after freeze_step=3, but the loaded state has no"):
            step(late, gradients(params, backend.rank, 3))
        assert bits(params) == before

    run_threads(2, go_on)


# --- numbers per tensor


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, 3_000_017])
def test_norms_are_accurate_and_independent_of_threads_and_strides(numel: int) -> None:
    x = values(numel, shape=(numel,))
    exact = float(x.double().norm())
    before = torch.get_num_threads()
    try:
        made = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.add(float(lamb.norms([x])))
            made.add(float(lamb.norms([torch.stack([x, x], -1)[:, 0]])))
    finally:
        torch.set_num_threads(before)
    (norm,) = made
    # At most 64 squares in a lane and as many lanes, three times over, all positive: relative, and half in the root.
    assert norm == pytest.approx(exact, rel=100 * UNIT)


def test_coefficients_are_bounded_and_factors_move_by_a_tenth_at_most() -> None:
    group = {"min_coeff": 0.01, "max_coeff": 0.3, "factor_min": 0.5, "factor_max": 4.0, "factor_threshold": 0.1}
    x, u = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([5.0, 1e-3, 1e9, 1.0, 0.0])
    assert lamb.trust(x, u, group).tolist() == pytest.approx([0.2, 0.3, 0.01, 1.0, 1.0])
    last = torch.ones(3)
    assert lamb.limited(torch.tensor([3.0, 0.0, 1.05]), last, group).tolist() == pytest.approx([1.1, 0.9, 1.05])
    for wanted, end in ((100.0, 4.0), (0.0, 0.5)):
        r = torch.ones(1)
        for _ in range(40):
            r = lamb.limited(torch.full((1,), wanted), r, group)
        assert float(r) == end
    assert lamb.damped(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.0])).tolist() == [2.0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"eps": 0.0}, "eps must be more than 0"),
    ({"max_coeff": -1.0}, "max_coeff must be a number of at least 0"),
    ({"min_coeff": 0.5, "max_coeff": 0.3}, r"min_coeff=0\.5 must be at most max_coeff=0\.3"),
    ({"factor_min": 5.0}, r"factor_min=5\.0 must be at most factor_max=1\.0"),
    ({"coeff_beta": 1.0}, "coeff_beta must be less than 1"),
    ({"factor_threshold": 1.5}, "factor_threshold must be less than 1"),
    ({"factor_max": math.nan}, "factor_max must be a number of at least 0"),
    ({"freeze_step": 0}, "freeze_step must be"),
    ({"amsgrad": True}, "amsgrad=True is not supported"),
    ({"max_grad_norm": 1.0}, "clip_grad_norm_"),
    ({"trust": 1.0}, "there is no option 'trust'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnebitLamb(parameters(), **{"freeze_step": 5, **options})
