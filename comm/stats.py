"""What an average has cost so far: bytes sent, bytes a plain average would have sent, and time per stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from onebit.comm.backend import Backend


@dataclass
class Stats:
    """Counts of one rank since the last `reset()`.

    Attributes:
        calls: averages started.
        collectives: collectives started.
        wire_bytes: bytes this rank handed to the transport, as the backend counted them.
        dense_bytes: bytes it would have sent to average the same tensors in fp32: 2(n - 1)/n · 4 per element.
        seconds: host time per stage; on CUDA the time to launch, because nothing here waits for the device.
    """

    calls: int = 0
    collectives: int = 0
    wire_bytes: int = 0
    dense_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def reset(self) -> None:
        """Start counting anew."""
        self.__init__()  # type: ignore[misc]

    @contextmanager
    def stage(self, name: str, backend: Backend) -> Iterator[None]:
        """Count the time and the traffic of a `with` block under `name`."""
        traffic, since = (backend.traffic.collectives, backend.traffic.wire_bytes), time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since
            self.collectives += backend.traffic.collectives - traffic[0]
            self.wire_bytes += backend.traffic.wire_bytes - traffic[1]


def fp32_bytes(numel: int, world_size: int) -> int:
    """Bytes one rank sends to average `numel` elements in fp32 with a bandwidth-optimal algorithm."""
    return 2 * (world_size - 1) * 4 * numel // world_size
