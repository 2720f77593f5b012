"""How many threads a rank's CPU kernels use, and the pool that runs them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from math import isqrt

from onebit.compress.errors import InputError
from onebit.compress.launch_env import local_world_size

FEW = 4  # threads, which are worth their waking wherever there is work for each

_chosen: int | None = None
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def num_threads() -> int:
    """The most threads that a CPU kernel of this process uses; fewer work on tensors that are not worth waking so many.

    What `set_num_threads` or the variable ``ONEBIT_NUM_THREADS`` says; otherwise the cores this process may run on.
    Where it shares them, which the launcher tells (``LOCAL_WORLD_SIZE`` of torchrun and its like in Open MPI, MPICH and
    Slurm), a rank takes its part of half of them, at least 1: transports have threads, too, and two cores that the
    system counts are often one. ``OMP_NUM_THREADS`` is not looked at: torchrun sets it to 1.
    """
    if _chosen is not None:
        return _chosen
    wanted = os.environ.get("ONEBIT_NUM_THREADS")
    if wanted is not None:
        return _positive(wanted, "ONEBIT_NUM_THREADS")
    ranks = local_world_size()
    return cores() if ranks == 1 else max(1, cores() // (2 * ranks))


def set_num_threads(count: int | None) -> None:
    """Use `count` threads in CPU kernels from now on; None: decide as `num_threads` describes.

    Raises:
        InputError: `count` is not a positive integer.
    """
    global _chosen
    _chosen = None if count is None else _positive(count, "the number of threads")


def share_out(kernel: Callable[..., None], total: int, least: int, *arguments: int) -> None:
    """Call `kernel(first, last, *arguments)` over ranges that cover [0, total), on up to `num_threads()` threads.

    The caller works too, so it returns when all is done even if the pool is busy. A range has at least `least` items,
    which take about as long as waking a thread. Threads are woken one after the other, so p of them take w/p + p
    wakings for work that is worth w: more than √w only make it longer.
    """
    if total < 2 * least:
        if total:
            kernel(0, total, *arguments)
        return
    worth = total // least
    parts = min(num_threads(), worth, max(FEW, isqrt(worth)))
    bounds = [total * part // parts for part in range(parts + 1)]
    others = [_executor().submit(kernel, first, last, *arguments) for first, last in pairwise(bounds[1:])]
    try:
        kernel(bounds[0], bounds[1], *arguments)
    finally:  # after an interrupt, too: the caller lets go of the arrays that the others still write to
        wait(others)
    for other in others:
        other.result()


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=max(cores(), num_threads()), thread_name_prefix="onebit")
        return _pool


def _forget_pool() -> None:
    """A forked child has none of its parent's threads, and may have its lock held by one of them."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)


def cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _positive(value: int | str, name: str) -> int:
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1 or isinstance(value, (bool, float)):
        raise InputError(f"{name} must be a positive integer, got {value!r}")
    return count
