"""Whole training steps of several optimizers, timed in turns, so that what disturbs a machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from onebit.comm.backend import Backend
from onebit.comm.numbers import gather_numbers


def timed_in_turns(
    steps: Mapping[str, Callable[[], object]], backend: Backend, rounds: int, each: int = 1
) -> dict[str, list[float]]:
    """Seconds of one run of each of `steps`, per round; a round's time is that of its slowest rank.

    Ranks start together. The order changes from round to round, as what runs next to what may matter.

    Args:
        each: runs one after the other that make one measurement.
    """
    own: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _settle(backend)
            start = time.perf_counter()
            for _ in range(each):
                steps[name]()
            _synchronize()
            own[name].append((time.perf_counter() - start) / each)
    slowest = {}
    for name, seconds in own.items():
        slowest[name] = [max(times) for times in zip(*gather_numbers(backend, seconds), strict=True)]
    return slowest


def ratio(seconds: Sequence[float], yardstick: Sequence[float]) -> dict[str, float]:
    """Time over that of the yardstick in the same round: the median and the quartiles of all rounds."""
    pairs = [mine / other for mine, other in zip(seconds, yardstick, strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4)
    return {"median": median, "low": low, "high": high}


def _settle(backend: Backend) -> None:
    _synchronize()
    backend.barrier()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
