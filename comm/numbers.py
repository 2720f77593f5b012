"""A few numbers of every rank, known to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from onebit.comm.backend import Backend


def gather_numbers(backend: Backend, values: Sequence[float]) -> list[list[float]]:
    """Every rank's `values`, in rank order; as many on every rank; collective, and the host waits for it.

    Raises:
        TransportError: a rank did not take part within the timeout.
    """
    if backend.size == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64, device=backend.device_type or "cpu")
    everyone = mine.new_empty(backend.size * mine.numel())
    with backend.limited("all_gather"):
        backend.all_gather(everyone, mine).wait()
        rows: list[list[float]] = everyone.view(backend.size, -1).tolist()
    backend.check()
    return rows
