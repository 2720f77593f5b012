"""What an average has cost so far: bytes sent, bytes a plain average would have sent, and time per stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from weakref import WeakMethod

from onebit.comm.backend import Backend


@dataclass
class Stats:
    """Counts of one rank since the last `reset()`.

    Attributes:
        calls: averages started.
        collectives: collectives started.
        wire_bytes: bytes this rank handed to the transport, as the backend counted them.
        local_bytes: how many of them stayed inside a node, where an average has two levels.
        dense_bytes: bytes it would have sent to average the same tensors in fp32: 2(n - 1)/n · 4 per element.
        seconds: host time per stage; on CUDA the time to launch, because nothing here waits for the device.
    """

    calls: int = 0
    collectives: int = 0
    wire_bytes: int = 0
    local_bytes: int = 0
    dense_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def total(parts: Iterable[Stats]) -> Stats:
        """The sums of several counts, in a new object."""
        total = Stats()
        for part in parts:
            total.calls += part.calls
            total.collectives += part.collectives
            total.wire_bytes += part.wire_bytes
            total.local_bytes += part.local_bytes
            total.dense_bytes += part.dense_bytes
            for stage, seconds in part.seconds.items():
                total.seconds[stage] = total.seconds.get(stage, 0.0) + seconds
        return total

    def reset(self) -> None:
        """Start counting anew."""
        self.__init__()  # type: ignore[misc]

    def stage(
        self, name: str, backend: Backend, on_failure: Callable[[], None] | None = None, *, local: bool = False
    ) -> Stage:
        """Count the time and the traffic of `with` blocks under `name`; one can be entered again and again.

        Args:
            backend: what carries what is sent in the block.
            on_failure: a method, called when the block ends with an exception; it is not kept alive.
            local: what is sent stays inside a node.
        """
        return Stage(self, name, backend, on_failure, local)


class Stage:
    """What `Stats.stage` returns; a class, for an average enters one seven times and a generator costs more."""

    def __init__(
        self, stats: Stats, name: str, backend: Backend, on_failure: Callable[[], None] | None, local: bool
    ) -> None:
        self._stats = stats
        self._name = name
        self._traffic = backend.traffic
        self._on_failure = None if on_failure is None else WeakMethod(on_failure)  # whose it is may have this stage
        self._local = local

    def __enter__(self) -> None:
        self._collectives = self._traffic.collectives
        self._wire_bytes = self._traffic.wire_bytes
        self._since = time.perf_counter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        seconds = self._stats.seconds
        seconds[self._name] = seconds.get(self._name, 0.0) + time.perf_counter() - self._since
        self._stats.collectives += self._traffic.collectives - self._collectives
        sent = self._traffic.wire_bytes - self._wire_bytes
        self._stats.wire_bytes += sent
        if self._local:
            self._stats.local_bytes += sent
        on_failure = self._on_failure() if error is not None and self._on_failure is not None else None
        if on_failure is not None:
            on_failure()


def fp32_bytes(numel: int, world_size: int) -> int:
    """Bytes one rank sends to average `numel` elements in fp32 with a bandwidth-optimal algorithm."""
    return 2 * (world_size - 1) * 4 * numel // world_size
