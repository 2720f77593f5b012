"""OnebitLamb is LAMB in warm-up and the published algorithm after it, by a float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from onebit.comm import Backend, CompressedAllreduce, run_threads
from onebit.compress import SignCodec
from onebit.optim import OnebitLamb
from tests.comm.oracle import UNIT
from tests.comm.samples import arrays, bits
from tests.optim import lamb_oracle as oracle
from tests.optim.lamb_runs import PUBLISHED, of_threads
from tests.optim.samples import SHAPES, Gradients, gradients, parameters, patchy, rate, values

FREEZE = 30
EVERY = 5  # steps between two looks at the numbers
LATER = 10_000  # a freeze that does not come

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
