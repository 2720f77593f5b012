"""Times of CUDA work by events, graphs of it, and the rows made of times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from onebit.benchmarks.row import Row, Spread
from onebit.compress import SignCodec

CODEC = SignCodec()
MI = 1 << 20
LAUNCHES = 8  # per measured interval, so that the time to launch the first is hidden behind the others


def differing(a: Tensor, b: Tensor) -> int:
    """Elements whose bits differ."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return int((a.view(words) != b.to(a.device).view(words)).sum())


def timed(run: Callable[[], object], rounds: int, launches: int = LAUNCHES) -> list[float]:
    """Seconds of one run per round, the slowest rank's; ranks start each round together."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        if dist.is_initialized():
            dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(launches):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / launches)
    if dist.is_initialized():
        slowest = torch.tensor(times, device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times = slowest.tolist()
    return times


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what a second run does."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def make_row(
    case: str,
    dtype: torch.dtype,
    numel: int,
    nbytes: int,
    times: list[float],
    wrong: int | None,
    wire: int = 0,
    counted: int | None = None,
) -> Row:
    """The row of a case that moves `nbytes` in memory or, for an average, has as many.

    times: seconds of each round. wire: bytes that a rank must send; counted: those that it handed to the transport,
    where onebit counts them.
    """
    median = float(np.median(times))
    return Row(
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        numel=numel,
        nbytes=nbytes,
        seconds=tuple(times),
        algbw=nbytes / median / 1e9,
        wire_bytes=counted,
        wire_formula=wire,
        wire_busbw=(counted or wire) / median / 1e9,
        link_bytes=None,
        stages={},
        ratios={},
        wrong=wrong,
    )


def against(role: str, row: Row, yardstick: Row, by_time: bool = False) -> dict[str, Spread]:
    """Bandwidth of `row` over that of `yardstick`; by_time: how many times as fast, whatever the bytes."""
    if row is yardstick:
        return {}
    scale = 1.0 if by_time else row.nbytes / yardstick.nbytes
    pairs = scale * np.array(yardstick.seconds) / np.array(row.seconds)
    low, median, high = np.quantile(pairs, [0.25, 0.5, 0.75])
    return {role: Spread(median=float(median), low=float(low), high=float(high))}
