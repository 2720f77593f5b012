"""Batches of ranks that have more or fewer of them, so that all ranks step equally often and end together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Literal, TypeVar

import torch

from onebit.comm import Backend
from onebit.compress import InputError
from onebit.optim.base import CompressedOptimizer

Batch = TypeVar("Batch")

_UNKNOWN = -1


def in_step(
    batches: Iterable[Batch], optimizer: CompressedOptimizer | Backend, *, until: Literal["last", "first"] = "last"
) -> Iterator[Batch | None]:
    """Yield this rank's batches, and then None for as long as another rank has any; collective.

        for batch in in_step(loader, optimizer):
            optimizer.zero_grad()
            if batch is not None:
                loss(model(batch)).backward()
            optimizer.step()

    A rank without a batch steps without gradients, which count as zeros: the mean is over all ranks, as it is under
    `torch.distributed.algorithms.Join`. If every rank's `batches` has a length, it is exchanged once, at the first
    batch, and must be right; else ranks tell each other before every batch whether they have one.

    Args:
        batches: such as a DataLoader; iterated over once.
        optimizer: whose ranks they are; or a backend.
        until: ``"last"``: all ranks have run out; ``"first"``: one has, and what others have left is not used.

    Raises:
        InputError: `until` is neither, or on a later batch: there are fewer batches than their length said.
        TransportError: a rank did not take part within the timeout; one that left the loop early, for one.
    """
    if until not in ("last", "first"):
        raise InputError(f'in_step: until must be "last" or "first", got {until!r}')
    backend = optimizer if isinstance(optimizer, Backend) else optimizer.backend
    return _in_step(batches, backend, max if until == "last" else min)


def _in_step(batches: Iterable[Batch], backend: Backend, pick: Callable[[list[int]], int]) -> Iterator[Batch | None]:
    lengths = _gather(backend, len(batches) if isinstance(batches, Sized) else _UNKNOWN)
    own = iter(batches)
    if _UNKNOWN not in lengths:
        for number in range(pick(lengths)):
            batch = next(own, None)
            if batch is None and number < lengths[backend.rank]:
                raise InputError(
                    f"rank {backend.rank}: in_step: there were {number} batches, and their length said "
                    f"{lengths[backend.rank]}; give an iterator, iter(batches), whose length is not asked"
                )
            yield batch
        return
    while True:
        batch = next(own, None)
        if not pick(_gather(backend, int(batch is not None))):
            return
        yield batch


def _gather(backend: Backend, number: int) -> list[int]:
    """Every rank's number, by rank."""
    mine = torch.tensor([number], device=backend.device_type or "cpu")
    theirs = mine.new_empty(backend.size)
    backend.all_gather(theirs, mine).wait()
    found: list[int] = theirs.tolist()
    return found
