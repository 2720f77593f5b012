"""Runs whose gradients get numbers that are not finite, at random, beside the same runs without; by threads.

A step with such a number is made again without it, so both runs end after the same steps. In warm-up nothing tells them
apart. In the compressed phase error feedback is put back to within rounding, so from then on they agree to within
rounding too, but for the sign of a number that is itself no more than rounding: it is counted when it happens.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter

from onebit.comm import Backend, run_threads
from onebit.optim import CompressedOptimizer, ZeroOneAdam, check_replicas
from tests.faults.training import MAKERS, feedback
from tests.optim.samples import checksum, contents, values

SHAPES = ((11, 13), (37,), (), (0,), (5, 3, 2))
STEPS = 14
BAD = (math.nan, math.inf, -math.inf)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Injection:
    """A bad number in one gradient of one rank."""

    rank: int
    parameter: int
    element: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run; `bad` has, per step, the attempts that are spoiled before the one that is not."""

    optimizer: str
    world_size: int
    dtype: torch.dtype
    master_weights: bool
    scaler: bool
    bucket_mb: float | None
    bad: tuple[tuple[tuple[Injection, ...], ...], ...]

    @staticmethod
    def draw(dice: random.Random) -> Plan:
        """At random: every option, and in which steps, on which ranks and in which elements numbers are bad."""
        world_size = dice.choice((2, 2, 3))

        def attempt() -> tuple[Injection, ...]:
            guilty = dice.sample(range(world_size), dice.choice((1, 1, 1, world_size)))
            return tuple(_injection(dice, rank) for rank in guilty)

        return Plan(
            optimizer=dice.choice(tuple(MAKERS)),
            world_size=world_size,
            dtype=dice.choice(DTYPES),
            master_weights=dice.random() < 0.5,
            scaler=dice.random() < 0.3,
            bucket_mb=dice.choice((None, 0.0005)),
            bad=tuple(tuple(attempt() for _ in range(dice.choice((0, 0, 1, 1, 2)))) for _ in range(STEPS)),
        )


def _injection(dice: random.Random, rank: int) -> Injection:
    parameter = dice.choice([i for i, shape in enumerate(SHAPES) if math.prod(shape)])
    element = dice.randrange(math.prod(SHAPES[parameter]))
    return Injection(rank=rank, parameter=parameter, element=element, value=dice.choice(BAD))


@dataclass
class Tally:
    """What came of spoiled runs.

    Attributes:
        runs: pairs of runs, with and without.
        injections: bad numbers given to a rank's gradient, also by `phases` of the optimizers.
        skipped: steps that all ranks skipped.
        left_out: local steps of 0/1 Adam in which a rank left its own contribution out, as the others cannot know.
        cut: runs with such a local step; there is no run without bad numbers that they would be equal to.
        bit_equal, within_rounding: of the other runs, those that ended as the one without.
        signs: runs in which rounding decided a sign, and some parameter therefore differs by more than rounding.
        diverged: runs after which the ranks did not hold the same bits.
        wrong: everything that should not have been, diverged runs included, as `said`.
    """

    runs: int = 0
    injections: int = 0
    skipped: int = 0
    left_out: int = 0
    cut: int = 0
    bit_equal: int = 0
    within_rounding: int = 0
    signs: int = 0
    diverged: int = 0
    wrong: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def take_in(self, other: Tally) -> None:
        """Add what was counted elsewhere."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def row(self) -> dict[str, Any]:
        """The counts as they stand in a result."""
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "said"}
        return {**named, "phases": dict(sorted(self.phases.items()))}


@dataclass
class Seen:
    """What one rank had at the end of a run, and on the way."""

    final: str = ""
    values: list[Tensor] = field(default_factory=list)
    injections: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    left_out: int = 0
    touched_feedback: bool = False
    wrong: list[str] = field(default_factory=list)


def spoil(plan: Plan, tally: Tally) -> None:
    """Make a run with and one without bad numbers, and take both in."""
    with_bad = run_threads(plan.world_size, _train, plan, True)
    without = run_threads(plan.world_size, _train, plan, False)
    found = [said for seen in (*with_bad, *without) for said in seen.wrong]
    tally.runs += 1
    tally.skipped += with_bad[0].skipped
    for seen in with_bad:
        tally.injections += sum(seen.injections.values())
        tally.phases += seen.injections
        tally.left_out += seen.left_out
    if len({seen.final for seen in with_bad}) > 1:
        tally.diverged += 1
        found.append("the ranks ended with different bits")
    if any(seen.left_out for seen in with_bad):
        tally.cut += 1
    else:
        _compare(with_bad[0], without[0], any(seen.touched_feedback for seen in with_bad), plan, tally, found)
    tally.wrong += len(found)
    tally.said += [f"{plan}: {said}" for said in found]


def _compare(ours: Seen, clean: Seen, touched_feedback: bool, plan: Plan, tally: Tally, found: list[str]) -> None:
    if ours.final == clean.final:
        tally.bit_equal += 1
        return
    if not touched_feedback:
        found.append("it ended with other bits, though error feedback was never put back")
    # 1e-2 is the rate, so an update is about that, and off by its rounding; in bf16 the parameter is rounded too.
    rtol = 2.0**-7 if plan.dtype == torch.bfloat16 else 0.0
    off = sum(
        int((~torch.isclose(a, b, rtol=rtol, atol=1e-6)).sum()) for a, b in zip(ours.values, clean.values, strict=True)
    )
    if not off:
        tally.within_rounding += 1
    else:
        tally.signs += 1


def _train(backend: Backend, plan: Plan, spoiled: bool) -> Seen:
    params = [Parameter(values(i, shape=shape).to(plan.dtype)) for i, shape in enumerate(SHAPES)]
    optimizer: CompressedOptimizer = MAKERS[plan.optimizer](
        params, lr=1e-2, bucket_mb=plan.bucket_mb, master_weights=plan.master_weights, backend=backend
    )
    scaler = GradScaler("cpu", init_scale=2.0**40, growth_interval=10**6) if plan.scaler else None
    seen = Seen()
    for number in range(STEPS):
        for attempt in plan.bad[number] if spoiled else ():
            _spoiled_step(optimizer, scaler, params, number, attempt, seen)
            if optimizer.param_groups[0]["step"] > number:
                break  # a local step: it was made
        if optimizer.param_groups[0]["step"] == number:
            _step(optimizer, scaler, params, number, ())
    if isinstance(optimizer, ZeroOneAdam):
        optimizer.synchronize()
        seen.left_out = optimizer.left_out_steps
    check_replicas(optimizer)
    if not all(bool(p.isfinite().all()) for p in params):
        seen.wrong.append(f"rank {backend.rank} has a parameter that is not finite")
    if optimizer.param_groups[0]["step"] != STEPS:
        seen.wrong.append(f"rank {backend.rank} has made {optimizer.param_groups[0]['step']} of {STEPS} steps")
    seen.final = checksum(contents(optimizer))
    seen.values = [p.detach().float().clone() for p in params]
    return seen


def _spoiled_step(
    optimizer: CompressedOptimizer,
    scaler: GradScaler | None,
    params: list[Parameter],
    number: int,
    attempt: tuple[Injection, ...],
    seen: Seen,
) -> None:
    rank, phase = optimizer.backend.rank, optimizer.phase()  # type: ignore[attr-defined]
    before, fed, skipped = contents(optimizer), feedback(optimizer.state_dict()), optimizer.skipped_steps
    mine = [injection for injection in attempt if injection.rank == rank]
    seen.injections[f"{type(optimizer).__name__} {phase}"] += len(mine)
    _step(optimizer, scaler, params, number, mine)
    if phase == "local":
        return
    after, where = feedback(optimizer.state_dict()), f"rank {rank}, step {number}, phase {phase}"
    seen.skipped += 1
    seen.touched_feedback |= phase in ("compressed", "sync")
    if optimizer.skipped_steps != skipped + 1:
        seen.wrong.append(f"{where}: the step was not skipped")
    elif contents(optimizer) != before:
        seen.wrong.append(f"{where}: a skipped step has changed parameters or moments")
    # Fewer than 8 + 4n roundings of numbers that feedback exceeds at most a hundredfold.
    elif fed.numel() and float((after - fed).abs().max()) > 20 * 2.0**-24 * 100 * max(float(fed.abs().max()), 1.0):
        seen.wrong.append(f"{where}: error feedback is off by {float((after - fed).abs().max())}")


def _step(
    optimizer: CompressedOptimizer,
    scaler: GradScaler | None,
    params: list[Parameter],
    number: int,
    injections: list[Injection] | tuple[()],
) -> None:
    if scaler is not None:
        scaler.scale(torch.ones(()))  # the scaler makes its scale at the first loss
    factor = 1.0 if scaler is None else scaler.get_scale()  # a power of two changes no bit
    for i, p in enumerate(params):
        g = values(i, number, optimizer.backend.rank, shape=tuple(p.shape)).to(p.dtype)
        p.grad = None if (i + number) % 7 == 6 else g * factor
    for injection in injections:
        p = params[injection.parameter]
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad.view(-1)[injection.element] = injection.value
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def spoil_all(injections: int, seed: int) -> Iterator[Tally]:
    """Make random runs until so many bad numbers were given; yields the counts after each."""
    dice, tally = random.Random(seed), Tally()
    while tally.injections < injections:
        spoil(Plan.draw(dice), tally)
        yield tally


def spoiled(injections: int, seed: int) -> Tally:
    """The counts of so many bad numbers."""
    return [Tally(), *spoil_all(injections, seed)][-1]
