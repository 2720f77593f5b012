"""What one case did at one size: times, bytes, ratios, and how many elements were wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median of some figures, with the two that show how they scatter."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one case did at one size.

    Attributes:
        case, dtype, numel: which case, on how many elements of what.
        nbytes: the bytes that algbw counts.
        seconds: the time of each round, the slowest rank's.
        algbw: nbytes over the median time, in 1e9 bytes per second.
        wire_bytes: bytes this rank handed to the transport in one run, counted; None where the transport is called past
            onebit's counter.
        wire_formula: bytes that one rank must send.
        wire_busbw: wire bytes over the median time, in 1e9 bytes per second.
        link_bytes: bytes that left this rank's network interface in one run, headers included; None if none is watched.
        stages: mean seconds of a run that this rank spent in each stage, for a case that knows its stages.
        ratios: for each role it is measured against, by how much its bandwidth is the higher one (quartiles beside).
        wrong: wrong elements, over all ranks; None if not checked.
    """

    case: str
    dtype: str
    numel: int
    nbytes: int
    seconds: tuple[float, ...]
    algbw: float
    wire_bytes: int | None
    wire_formula: int
    wire_busbw: float
    link_bytes: int | None
    stages: dict[str, float]
    ratios: dict[str, Spread]
    wrong: int | None

    @property
    def time(self) -> Spread:
        """Minimum, median and 99th percentile of `seconds`."""
        low, median, high = np.quantile(self.seconds, [0.0, 0.5, 0.99])
        return Spread(median=float(median), low=float(low), high=float(high))
