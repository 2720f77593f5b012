"""One case at one setting: it runs it against the clock and the byte counters, and keeps what they said."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.link import Link
from onebit.comm.numbers import gather_numbers

# Seconds before each run: OpenMP's threads spin for some milliseconds after their work, on the cores of what runs next.
SETTLE = 0.01


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
    before: dict[str, float] = field(default_factory=dict)
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
        if self.link:
            backend.barrier()  # a peer may still be receiving what waits in this interface's queue
            self.carried.append(self.link.sent() - carried)

    def check(self) -> None:
        """One run that is not timed, and the count of wrong elements over all ranks."""
        self.case.refresh(self.state)
        count = self.case.check(self.state)
        self.case.run(self.state)
        self.wrong = int(sum(row[0] for row in gather_numbers(self.setting.backend, [float(count())])))

    def forget(self) -> None:
        """Drop what warm-up runs measured."""
        self.seconds, self.wire, self.carried = [], [], []
        self.before = dict(self.case.stages(self.state))

    def stages(self) -> dict[str, float]:
        """Mean seconds of each stage in a timed run, on this rank; read before `check`."""
        now = self.case.stages(self.state)
        return {name: (total - self.before.get(name, 0.0)) / len(self.seconds) for name, total in now.items()}

    def slowest(self) -> list[float]:
        """The time of each round on its slowest rank; every rank calls it."""
        return [max(times) for times in zip(*gather_numbers(self.setting.backend, self.seconds), strict=True)]

    def bandwidths(self) -> np.ndarray:
        """Bytes per second of each round."""
        return self.case.moved(self.setting) / np.array(self.seconds)
