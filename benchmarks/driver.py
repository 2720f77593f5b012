"""The loop: sweep over sizes, warm up, time the cases of a family turn by turn, check what came out.

Compared cases run A B A B ... and a ratio is the median over rounds of one case's bandwidth divided by that of its
yardstick in the same round, so a machine that slows down for a second slows down both sides of the ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.group import gather
from onebit.benchmarks.link import Link
from onebit.benchmarks.row import Row, Spread

Progress = Callable[[str], None]  # called once a run with what has just run

# Seconds before each run: OpenMP's threads spin for some milliseconds after their work, on the cores of what runs next.
SETTLE = 0.01


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How often each case runs, and whether it is checked.

    Attributes:
        iterations: timed runs of each case, at least 1.
        warmup: runs before the first timed one.
        check: run each case once more and count wrong elements.
    """

    iterations: int = 20
    warmup: int = 3
    check: bool = True

    def runs(self) -> int:
        """How often `Progress` is called for each case."""
        return self.warmup + self.iterations + int(self.check)

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.warmup < 0:
            raise ValueError(f"a sweep needs iterations >= 1 and warmup >= 0, got {self.iterations} and {self.warmup}")


@dataclass
class Station:
    """One case at one setting, and what has been seen of it so far."""

    case: Case[Any]
    setting: Setting
    link: Link | None
    state: Any = None
    seconds: list[float] = field(default_factory=list)
    wire: list[int] = field(default_factory=list)
    carried: list[int] = field(default_factory=list)
    wrong: int | None = None

    def prepare(self) -> None:
        """Make the inputs."""
        self.state = self.case.inputs(self.setting)

    def run(self) -> None:
        """One timed run, after a barrier."""
        backend = self.setting.backend
        self.case.refresh(self.state)
        time.sleep(SETTLE)
        backend.barrier()
        sent, carried = backend.traffic.wire_bytes, self.link.sent() if self.link else 0
        start = time.perf_counter()
        self.case.run(self.state)
        self.seconds.append(time.perf_counter() - start)
        self.wire.append(backend.traffic.wire_bytes - sent)
        self.carried.append(self.link.sent() - carried if self.link else 0)

    def check(self) -> None:
        """One run that is not timed, and the count of wrong elements over all ranks."""
        self.case.refresh(self.state)
        count = self.case.check(self.state)
        self.case.run(self.state)
        self.wrong = int(sum(row[0] for row in gather(self.setting.backend, [float(count())])))

    def forget(self) -> None:
        """Drop what warm-up runs measured."""
        self.seconds, self.wire, self.carried = [], [], []


def drive(
    cases: Sequence[Case[Any]],
    settings: Sequence[Setting],
    sweep: Sweep,
    *,
    progress: Progress = lambda name: None,
    link: Link | None = None,
) -> list[Row]:
    """Measure `cases` together at each of `settings`; every rank calls it alike and gets the same times.

    link: the network interface whose counter is read around each run.
    """
    rows: list[Row] = []
    for setting in settings:
        rows += _measure([Station(case, setting, link) for case in cases], sweep, progress)
    return rows


def _measure(stations: Sequence[Station], sweep: Sweep, progress: Progress) -> list[Row]:
    """One setting: prepare, warm up, time turn by turn, check, sum up."""
    for station in stations:
        station.prepare()
    for round_ in range(sweep.warmup + sweep.iterations):
        for station in stations:
            if round_ == sweep.warmup:
                station.forget()
            station.run()
            progress(station.case.name)
    for station in stations:
        station.seconds = _slowest(station)
        if sweep.check:
            station.check()
            progress(station.case.name)
    return [_row(station, stations) for station in stations]


def _slowest(station: Station) -> list[float]:
    """The time of each round on its slowest rank."""
    return [max(times) for times in zip(*gather(station.setting.backend, station.seconds), strict=True)]


def _bandwidths(station: Station) -> np.ndarray:
    """Bytes per second of each round."""
    return station.case.moved(station.setting) / np.array(station.seconds)


def _ratio(station: Station, role: str, stations: Sequence[Station]) -> Spread | None:
    """Bandwidth of `station` over that of the fastest case in `role`, round by round; None where none has that role."""
    yardsticks = [_bandwidths(other) for other in stations if other.case.role == role]
    if not yardsticks:
        return None
    pairs = _bandwidths(station) / max(yardsticks, key=lambda speeds: float(np.median(speeds)))
    low, median, high = np.quantile(pairs, [0.25, 0.5, 0.75])
    return Spread(median=float(median), low=float(low), high=float(high))


def _row(station: Station, stations: Sequence[Station]) -> Row:
    case, setting = station.case, station.setting
    formula = round(case.wire(setting))
    counted = int(np.median(station.wire))
    wire = counted or formula
    median = float(np.median(station.seconds))
    ratios = {role: _ratio(station, role, stations) for role in case.against}
    return Row(
        case=case.name,
        dtype=str(setting.dtype).removeprefix("torch."),
        numel=setting.numel,
        nbytes=round(case.moved(setting)),
        seconds=tuple(station.seconds),
        algbw=case.moved(setting) / median / 1e9,
        wire_bytes=counted if counted or not formula else None,
        wire_formula=formula,
        wire_busbw=wire / median / 1e9,
        link_bytes=int(np.median(station.carried)) if station.link else None,
        ratios={role: spread for role, spread in ratios.items() if spread},
        wrong=station.wrong,
    )
