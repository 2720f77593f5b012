"""The loop: sweep over sizes, warm up, time the cases of a family turn by turn, check what came out.

Compared cases run A B A B ... and a ratio is the median over rounds of one case's bandwidth divided by that of its
yardstick in the same round, so a machine that slows down for a second slows down both sides of the ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.link import Link
from onebit.benchmarks.row import Row, Spread
from onebit.benchmarks.station import Station

Progress = Callable[[str], None]  # called once a run with what has just run


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How often each case runs, and whether it is checked.

    Attributes:
        iterations: timed runs of each case, at least 1.
        warmup: runs before the first timed one.
        check: run each case once more and count wrong elements.
        together: runs that are timed as one, each on what the last has left.
        graph: on CUDA, capture each case that can be, and time its replays.
    """

    iterations: int = 20
    warmup: int = 3
    check: bool = True
    together: int = 1
    graph: bool = False

    def runs(self) -> int:
        """How often `Progress` is called for each case."""
        return self.warmup + self.iterations + int(self.check)

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.warmup < 0:
            raise ValueError(f"a sweep needs iterations >= 1 and warmup >= 0, got {self.iterations} and {self.warmup}")
        if self.together < 1:
            raise ValueError(f"a sweep times at least 1 run together, got {self.together}")


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
        stations = [
            Station(case, setting, link, sweep.together, sweep.graph and case.capturable)
            for case in cases
            if case.runs_with(setting.device.type, setting.codec, setting.local)
        ]
        rows += _measure(stations, sweep, progress)
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
    stages = [station.stages() for station in stations]
    for station in stations:
        station.seconds = station.slowest()
        if sweep.check:
            station.check()
            progress(station.case.name)
    return [_row(station, stations, shares) for station, shares in zip(stations, stages, strict=True)]


def _ratio(station: Station, role: str, stations: Sequence[Station]) -> Spread | None:
    """Bandwidth of `station` over that of the fastest case in `role`, round by round; None where none has that role."""
    yardsticks = [other.bandwidths() for other in stations if other.case.role == role]
    if not yardsticks:
        return None
    pairs = station.bandwidths() / max(yardsticks, key=lambda speeds: float(np.median(speeds)))
    low, median, high = np.quantile(pairs, [0.25, 0.5, 0.75])
    return Spread(median=float(median), low=float(low), high=float(high))


def _row(station: Station, stations: Sequence[Station], stages: dict[str, float]) -> Row:
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
        stages=stages,
        ratios={role: spread for role, spread in ratios.items() if spread},
        wrong=station.wrong,
    )
