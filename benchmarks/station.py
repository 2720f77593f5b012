"""One case at one setting: it runs it against the clock and the byte counters, and keeps what they said."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.link import Link
from onebit.comm.numbers import gather_numbers

# Seconds before each run: OpenMP's threads spin for some milliseconds after their work, on the cores of what runs next.
SETTLE = 0.01


@dataclass
class Station:
    """One case at one setting, and what has been seen of it so far.

    Attributes:
        together: runs that are timed as one, so that on CUDA the launch of the first hides that of the others.
        graph: on CUDA, a captured run is replayed instead of started again.
    """

    case: Case[Any]
    setting: Setting
    link: Link | None
    together: int = 1
    graph: bool = False
    state: Any = None
    go: Callable[[], object] = field(default=lambda: None)
    seconds: list[float] = field(default_factory=list)
    wire: list[int] = field(default_factory=list)
    carried: list[int] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    wrong: int | None = None

    def prepare(self) -> None:
        """Make the inputs, and the graph."""
        self.state = self.case.inputs(self.setting)
        self.go = self._captured() if self.graph else lambda: self.case.run(self.state)

    def run(self) -> None:
        """One timed run, after a barrier."""
        backend = self.setting.backend
        self.case.refresh(self.state)
        time.sleep(SETTLE)
        backend.barrier()
        sent, carried = backend.traffic.wire_bytes, self.link.sent() if self.link else 0
        self.seconds.append(self._timed())
        self.wire.append((backend.traffic.wire_bytes - sent) // self.together)
        if self.link:
            backend.barrier()  # a peer may still be receiving what waits in this interface's queue
            self.carried.append((self.link.sent() - carried) // self.together)

    def check(self) -> None:
        """One run that is not timed, and the count of wrong elements over all ranks."""
        self.case.refresh(self.state)
        count = self.case.check(self.state)
        self.go()
        self.wrong = int(sum(row[0] for row in gather_numbers(self.setting.backend, [float(count())])))

    def forget(self) -> None:
        """Drop what warm-up runs measured."""
        self.seconds, self.wire, self.carried = [], [], []
        self.before = dict(self.case.stages(self.state))

    def stages(self) -> dict[str, float]:
        """Mean seconds of each stage in a timed run, on this rank; read before `check`."""
        now, runs = self.case.stages(self.state), len(self.seconds) * self.together
        return {name: (total - self.before.get(name, 0.0)) / runs for name, total in now.items()}

    def slowest(self) -> list[float]:
        """The time of each round on its slowest rank; every rank calls it."""
        return [max(times) for times in zip(*gather_numbers(self.setting.backend, self.seconds), strict=True)]

    def bandwidths(self) -> np.ndarray:
        """Bytes per second of each round."""
        return self.case.moved(self.setting) / np.array(self.seconds)

    def _timed(self) -> float:
        """Seconds of one run: on the CPU by the clock, on CUDA from event to event."""
        if self.setting.device.type == "cpu":
            start = time.perf_counter()
            for _ in range(self.together):
                self.go()
            return (time.perf_counter() - start) / self.together
        torch.cuda.synchronize(self.setting.device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        for _ in range(self.together):
            self.go()
        last.record()
        last.synchronize()
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3 / self.together

    def _captured(self) -> Callable[[], object]:
        """A replay of a run; the run before it allocates and compiles what may not be captured."""
        self.case.run(self.state)
        torch.cuda.synchronize(self.setting.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.case.run(self.state)
        return graph.replay
