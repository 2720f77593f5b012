"""Contenders train one model side by side: every round is one step of each, on the same samples, against the clock."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebit.benchmarks.contenders import CONTENDERS, PLAIN, Plan, Trainee, adamw
from onebit.benchmarks.driver import Progress
from onebit.benchmarks.link import Link
from onebit.benchmarks.transformer import Shape, Text, make_model, next_token_loss
from onebit.comm.backend import Backend
from onebit.comm.numbers import gather_numbers

ALONE = "AdamW, no averaging"
EVALUATIONS = 10
WINDOWS = 64  # held-out windows of all ranks together
SETTLED = 2  # first steps of each kind that are not timed: they compile, allocate and agree
# A contender has learned as much as plain AdamW once its held-out loss is that of AdamW's last, to within this factor.
SAME = 1.02


@dataclass(frozen=True, kw_only=True)
class Course:
    """A plan, and what is trained by it.

    Attributes:
        batch: windows per rank and step.
        learns: held-out losses are taken; False: the steps are only timed.
        only: names of contenders; the plain one always takes part.
    """

    plan: Plan
    shape: Shape
    batch: int
    seed: int = 1
    learns: bool = True
    only: Sequence[str] = tuple(CONTENDERS)


@dataclass
class Log:
    """What one contender did, on this rank until `agree` and then on the slowest; one entry per step.

    held_out: steps made, and the loss then, mean over ranks.
    """

    kinds: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    replicas_equal: bool = True

    def agree(self, backend: Backend) -> None:
        """Take each step's time on its slowest rank; collective."""
        self.seconds = [max(times) for times in zip(*gather_numbers(backend, self.seconds), strict=True)]

    def timed(self) -> Iterator[tuple[int, str]]:
        """Number and kind of the steps that count for times: all of a kind but its first."""
        seen: dict[str, int] = {}
        for number, kind in enumerate(self.kinds):
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] > SETTLED:
                yield number, kind

    def by_kind(self, values: Sequence[float]) -> dict[str, dict[str, float]]:
        """Median and quartiles of `values`, one per step, for each kind of step."""
        found: dict[str, list[float]] = {}
        for number, kind in self.timed():
            found.setdefault(kind, []).append(values[number])
        return {kind: spread(numbers) for kind, numbers in found.items()}


def train(course: Course, backend: Backend, link: Link | None, progress: Progress) -> list[dict[str, Any]]:
    """Train every contender; returns a row for each, equal on all ranks but for the bytes sent; collective.

    link: the interface whose bytes are counted; None: none are.
    """
    plan, size = course.plan, backend.size
    trainees = {name: CONTENDERS[name](make_model(course.shape, course.seed), plan, backend) for name in _names(course)}
    trainees[ALONE] = _alone(course)
    logs = {name: Log() for name in trainees}
    text = Text(course.shape.context)
    held_out = text.held_out(WINDOWS, backend.rank, size)
    draw = torch.Generator().manual_seed(1_000_003 * course.seed + backend.rank)  # every rank reads other windows
    due = {plan.steps * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)} if course.learns else set()
    order = list(trainees)
    for number in range(plan.steps):
        inputs, targets = text.draw(course.batch, draw)
        turn = number % len(order)  # what runs next to what may matter
        for name in order[turn:] + order[:turn]:
            _step(trainees[name], logs[name], inputs, targets, learning_rate(number, plan), backend, link)
            progress(name)
        if number + 1 == plan.steps:
            for trainee in trainees.values():
                trainee.finish()
        for name in order if number + 1 in due else ():
            logs[name].held_out.append((number + 1, _evaluate(trainees[name], held_out, backend)))
    for name, log in logs.items():
        log.agree(backend)
        log.replicas_equal = _equal(trainees[name], backend)
    parameters = sum(p.numel() for p in trainees[PLAIN].model.parameters())
    return [row(name, log, logs[PLAIN], parameters) for name, log in logs.items()]


def learning_rate(number: int, plan: Plan) -> float:
    """Of step `number`, from 0: a linear warm-up that ends half-way to the freeze, then a straight line to 0."""
    warmup = max(1, plan.exact // 2)
    rest = (plan.steps - number) / max(1, plan.steps - warmup)
    return plan.lr * min(1.0, (number + 1) / warmup, rest)


def row(name: str, log: Log, plain: Log, parameters: int) -> dict[str, Any]:
    """What a result says of one contender."""
    faster = [theirs / mine for mine, theirs in zip(log.seconds, plain.seconds, strict=True)]
    sent = log.by_kind(log.sent) if log.sent else {}
    found: dict[str, Any] = {
        "case": name,
        "parameters": parameters,
        "steps": count(log.kinds),
        "seconds": log.by_kind(log.seconds),
        "times_plain": log.by_kind(faster),
        "link_bytes": {kind: round(numbers["median"]) for kind, numbers in sent.items()},
        "replicas_equal": log.replicas_equal,
    }
    if name != ALONE and log.held_out:
        elapsed = np.cumsum([0.0, *log.seconds])
        found["held_out"] = [
            {"step": step, "seconds": round(float(elapsed[step]), 4), "loss": loss} for step, loss in log.held_out
        ]
        found["to_target"] = _reached(log, SAME * plain.held_out[-1][1])
    return found


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = (float(value) for value in np.quantile(numbers, [0.25, 0.5, 0.75]))
    return {"median": median, "low": low, "high": high}


def count(kinds: Sequence[str]) -> dict[str, int]:
    """How often each of `kinds` occurs."""
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _reached(log: Log, target: float) -> dict[str, Any] | None:
    """Steps of each kind and seconds until the held-out loss is `target`, between evaluations on straight lines."""
    points = [(0, float("inf")), *log.held_out]
    for (before, above), (after, loss) in pairwise(points):
        if loss <= target:
            share = (above - target) / (above - loss) if above < float("inf") else 1.0
            made = round(before + share * (after - before))
            return {"steps": count(log.kinds[:made]), "seconds": round(sum(log.seconds[:made]), 4), "loss": target}
    return None


def _names(course: Course) -> list[str]:
    return [name for name in CONTENDERS if name == PLAIN or name in course.only]


def _alone(course: Course) -> Trainee:
    """What a step takes without any communication; every rank learns by itself."""
    model = make_model(course.shape, course.seed)
    return Trainee(model=model, optimizer=adamw(model, course.plan), kind=lambda: "local")


def _step(
    trainee: Trainee, log: Log, inputs: Tensor, targets: Tensor, rate: float, backend: Backend, link: Link | None
) -> None:
    """One step, after a barrier."""
    for group in trainee.optimizer.param_groups:
        group["lr"] = rate
    log.kinds.append(trainee.kind())
    backend.barrier()
    sent = link.sent() if link else 0
    start = time.perf_counter()
    trainee.optimizer.zero_grad()
    next_token_loss(trainee.model, inputs, targets).backward()  # type: ignore[no-untyped-call]
    trainee.optimizer.step()
    log.seconds.append(time.perf_counter() - start)
    if link:
        backend.barrier()  # a peer may still be receiving what waits in this interface's queue
        log.sent.append(link.sent() - sent)


@torch.no_grad()
def _evaluate(trainee: Trainee, held_out: tuple[Tensor, Tensor], backend: Backend) -> float:
    """The mean of the ranks' losses, each on its share of the held-out windows."""
    model = getattr(trainee.model, "module", trainee.model)
    losses = gather_numbers(backend, [float(next_token_loss(model, *held_out))])
    return float(np.mean(losses))


def _equal(trainee: Trainee, backend: Backend) -> bool:
    """Whether all ranks hold the same parameters, bit for bit."""
    crc = 0
    for p in trainee.model.parameters():
        crc = zlib.crc32(p.detach().numpy().tobytes(), crc)
    return len({numbers[0] for numbers in gather_numbers(backend, [float(crc)])}) == 1


def estimate(steps: Mapping[str, int], seconds: Mapping[str, Mapping[str, float]]) -> float | None:
    """Seconds of so many steps of each kind, from the median time of each kind; None where a kind was not timed."""
    if not all(kind in seconds for kind in steps):
        return None
    return sum(number * seconds[kind]["median"] for kind, number in steps.items())
