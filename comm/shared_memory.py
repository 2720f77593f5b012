"""Memory that all ranks of a node have mapped, without a name that a killed rank could leave behind."""

from __future__ import annotations

import logging
import mmap
import os
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from onebit.comm.backend import Backend
from onebit.comm.numbers import gather_numbers
from onebit.compress.layout import ceil_div

_log = logging.getLogger(__name__)

TOKEN_BYTES = 6  # what a float64 holds exactly, as which it travels


@dataclass(frozen=True)
class SharedMemory:
    """The same bytes in every rank of a node, zeros at first; unmapped when the last of these tensors is gone.

    Attributes:
        rows: (ranks, row_bytes) uint8, a row for each rank to write.
        common: (common_bytes,) uint8.
    """

    rows: Tensor
    common: Tensor


def share_memory(inside: Backend, row_bytes: int, common_bytes: int) -> SharedMemory | None:
    """Map memory that all ranks of `inside` share; None, said once by the log, if any of them cannot; collective.

    Every page is there when this returns: to write to one that is not to be had would kill the process. Each rank
    touches its row first, so that it lies near it.

    Args:
        inside: the ranks of one machine, or those that are said to be.
        row_bytes: size of every rank's row, the same on all of them.
        common_bytes: size of what all have in common, the same on all of them.

    Raises:
        TransportError: a rank did not take part within the timeout.
    """
    stride = ceil_div(row_bytes, mmap.PAGESIZE) * mmap.PAGESIZE
    start = inside.size * stride
    size = start + ceil_div(common_bytes + TOKEN_BYTES, mmap.PAGESIZE) * mmap.PAGESIZE
    offered, token = -1, secrets.token_bytes(TOKEN_BYTES)
    mapped, problem = None, None
    try:
        if inside.rank == 0:
            try:
                offered = _make(size, start, token)
            except (OSError, AttributeError) as error:  # AttributeError: only Linux has memfd_create
                problem = error
        mine = [float(os.getpid()), float(offered), float(int.from_bytes(token, "little"))]
        pid, descriptor, number = map(int, gather_numbers(inside, mine)[0])
        if descriptor >= 0:
            expected = number.to_bytes(TOKEN_BYTES, "little")
            try:
                mapped = _map(f"/proc/{pid}/fd/{descriptor}", size, expected, inside.rank * stride, stride)
            except OSError as error:
                problem = error
        everywhere = all(here for [here] in gather_numbers(inside, [float(mapped is not None)]))
    finally:
        if offered >= 0:
            os.close(offered)
    if mapped is None or not everywhere:
        _say_refused(inside.rank, size, problem)
        return None
    return SharedMemory(mapped[:start].view(inside.size, stride)[:, :row_bytes], mapped[start : start + common_bytes])


def _make(size: int, common_start: int, token: bytes) -> int:
    """A descriptor of new memory, with pages for what all have in common, and the token at its end.

    Raises:
        OSError: there is no room.
        AttributeError: there is no such memory on this system.
    """
    made = os.memfd_create("onebit")
    try:
        os.ftruncate(made, size)
        os.posix_fallocate(made, common_start, size - common_start)
        os.pwrite(made, token, size - TOKEN_BYTES)
    except OSError:
        os.close(made)
        raise
    return made


def _map(path: str, size: int, token: bytes, row_start: int, row_bytes: int) -> Tensor:
    """The whole of it, once it has proved to be what was offered and this rank's row has its pages.

    Raises:
        OSError: it cannot be opened, it is something else, or there is no room.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size != size or os.pread(descriptor, TOKEN_BYTES, size - TOKEN_BYTES) != token:
            raise FileNotFoundError(f"{path} is not the memory that was offered: the ranks do not see one list of pids")
        os.posix_fallocate(descriptor, row_start, row_bytes)
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)


_said = False


def _say_refused(rank: int, size: int, problem: Exception | None) -> None:
    global _said
    if problem is not None and not _said:
        _said = True
        _log.warning(
            "rank %d: the ranks of this node cannot share %d MiB of memory, so what they exchange goes through their "
            "transport, which is slower (%s: %s); they need one machine, one namespace of pids, /proc, and room",
            rank,
            size >> 20,
            type(problem).__name__,
            problem,
        )
