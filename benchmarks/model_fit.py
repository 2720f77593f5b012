"""The model's constants from results over loopback, and its errors at shaped links, which it was not fitted to."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onebit.benchmarks.model import Host, Wire, compressed, plain
from onebit.benchmarks.record import Document

CASES = {"all_reduce": "plain", "compressed": "compressed"}
BURST = 512 * 1024  # of the token bucket in `onebit.benchmarks.namespaces`
RATE = re.compile(r"\b(?P<number>[\d.]+)(?P<unit>[kmg])bit$")
UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
FITTED = 4  # that are searched for: message, call and byte, and by how much kernels are slower in an average than alone


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured average: its mode, `"plain"` or `"compressed"`, where, and how long it took."""

    source: str
    mode: str
    ranks: int
    numel: int
    bucket: int
    share: float
    wire: Wire
    seconds: float

    def predicted(self, host: Host) -> float:
        """Seconds by the model."""
        there = replace(host, share=self.share)
        if self.mode == "plain":
            return plain(there, self.wire, self.ranks, self.numel)
        return compressed(there, self.wire, self.ranks, self.numel, self.bucket)

    def error(self, host: Host) -> float:
        """Predicted over measured, less 1."""
        return self.predicted(host) / self.seconds - 1.0


def is_loopback(result: Document) -> bool:
    """Whether the constants come from it."""
    return bool(result["run"].get("link") == "loopback") and bool(_rows(result))


def is_shaped(result: Document) -> bool:
    """Whether the model is held against it: averages over a link of known rate per rank, without a delay."""
    run = result["run"]
    return RATE.search(run.get("link", "")) is not None and run.get("local", 1) == 1 and bool(_rows(result))


def points(result: Document) -> list[Point]:
    """The averages of float32 in a result."""
    run = result["run"]
    shaped = RATE.search(run["link"])
    rate = float(shaped["number"]) * UNITS[shaped["unit"]] / 8 if shaped else math.inf
    return [
        Point(
            source=result["name"],
            mode=CASES[row["case"]],
            ranks=run["ranks"],
            numel=row["numel"],
            bucket=int(run["bucket_mb"] * 2**20) // 4,
            share=max(1.0, run["ranks"] * run["threads"] / result["machine"]["cores"]),
            wire=Wire(rate=rate, burst=BURST if shaped else 0.0),
            seconds=row["time"]["median"],
        )
        for row in _rows(result)
    ]


def fit(results: Sequence[Document]) -> Host:
    """The constants of the machine that `results`, over loopback, come from.

    What kernels take beside each other is read from the stages of the largest averages; one factor for all of them, and
    the rest, make the mean squared logarithm of predicted over measured time least.

    Raises:
        ValueError: no result has an average whose stages are known.
    """
    rates = [_kernels(result, row) for result in results for row in _largest(result)]
    if not rates:
        raise ValueError("no result over loopback has a compressed average: make bench, or make bench-gloo NP=2")
    element, served = (statistics.median(values) for values in zip(*rates, strict=True))
    known = Host(message=1e-4, call=1e-3, byte=1e-9, element=element, served=served)
    measured = [point for result in results for point in points(result)]

    def loss(host: Host) -> float:
        return statistics.mean(math.log(point.predicted(host) / point.seconds) ** 2 for point in measured)

    return _search(known, loss)


def held_out(host: Host, results: Iterable[Document]) -> list[tuple[Point, float]]:
    """The points of shaped links, each with the model's error there."""
    return [(point, point.error(host)) for result in results for point in points(result)]


def _search(start: Host, loss: Callable[[Host], float]) -> Host:
    """The best neighbour, again and again, among those with constants that are a factor larger or smaller."""
    best, least, factor = start, loss(start), 2.0
    while factor > 1.001:
        steps = itertools.product((1.0, factor, 1.0 / factor), repeat=FITTED)
        tried = [_scaled(best, step) for step in steps]
        losses = [loss(host) for host in tried]
        if min(losses) < least - 1e-12:
            best, least = tried[losses.index(min(losses))], min(losses)
        else:
            factor = math.sqrt(factor)
    return best


def _scaled(host: Host, factors: Sequence[float]) -> Host:
    """Another host, with message, call, byte and both kernels multiplied."""
    message, call, byte, kernels = factors
    return replace(
        host,
        message=host.message * message,
        call=host.call * call,
        byte=host.byte * byte,
        element=host.element * kernels,
        served=host.served * kernels,
    )


def _rows(result: Document) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if row.get("case") in CASES and row["dtype"] == "float32"]


def _largest(result: Document) -> list[Mapping[str, Any]]:
    """The compressed average of most elements, if its stages are known."""
    rows = [row for row in _rows(result) if row["stages"]]
    return sorted(rows, key=lambda row: row["numel"])[-1:]


def _kernels(result: Document, row: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds per element to encode and decode it, and per element of a chunk to serve it, on a rank of its own."""
    stages, run = row["stages"], result["run"]
    share = max(1.0, run["ranks"] * run["threads"] / result["machine"]["cores"])
    alone = 1.0 / (share * row["numel"])
    return (stages["encode"] + stages["decode"]) * alone, stages["reduce_encode"] * run["ranks"] * alone
