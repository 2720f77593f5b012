"""How long calls take that all ranks make together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from onebit.comm.backend import Backend
from onebit.comm.numbers import gather_numbers

ROUNDS = 5  # timed ones; the median counts


def medians(backend: Backend, device: torch.device, calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each call on its slowest rank, the median over rounds in which calls take turns; collective.

    Args:
        device: what the calls use; the host waits for it.

    Raises:
        TransportError: a rank did not take part within the timeout.
    """
    times: list[float] = []
    for _ in range(1 + ROUNDS):
        for call in calls:
            backend.barrier()
            with backend.limited("timing"):
                _settle(device)
                start = time.perf_counter()
                call()
                _settle(device)
            times.append(time.perf_counter() - start)
    slowest = [max(ranks) for ranks in zip(*gather_numbers(backend, times[len(calls) :]), strict=True)]
    return [statistics.median(slowest[i :: len(calls)]) for i in range(len(calls))]


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
